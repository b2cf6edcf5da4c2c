"""Cost of `record` in F: one dense forward pass with loss on the same tokens. Bar: 1.15 on the CPU.

A recording needs no unembedding, which a dense pass with loss pays for; both numbers are given: against the dense
pass with loss (F), and against the same forward pass without the unembedding and without statistics. Last, the same
recording on TransformerLens' own forward, without the plain model inside.
"""

from __future__ import annotations

import torch

import neuron_sparsity as ns
from benchmarks.harness import against_dense_pass, load, parser, plain_pass, seconds, spread, write_row
from neuron_sparsity.adapter import attach
from neuron_sparsity.perplexity import default_batch_size


def main() -> None:
    options = parser(__doc__).parse_args()
    adapter, windows = load(options)
    batch = default_batch_size(adapter, windows.window)

    def body() -> None:
        with torch.no_grad():
            for start in range(0, windows.n_windows, batch):
                adapter.final_residual(windows.tokens[start : start + batch].long())

    record = against_dense_pass(adapter, windows, lambda: ns.record(adapter, windows), options.repeats)
    bodies = [seconds(body) for _ in range(options.repeats)]
    records = [seconds(lambda: ns.record(adapter, windows)) for _ in range(options.repeats)]
    row = {"model": options.model, "corpus": windows.name, "n_tokens": windows.n_tokens, "batch_size": batch}
    row |= {f"record_F_{key}": value for key, value in spread(record).items()}
    row |= plain_pass(adapter, windows, options.repeats)
    wrapped = attach(adapter.model, plain=False)
    on_bridge = against_dense_pass(adapter, windows, lambda: ns.record(wrapped, windows), options.repeats)
    row |= {"record_on_bridge_F": spread(on_bridge)["median"]}
    row |= {"record_over_body": spread(records)["median"] / spread(bodies)["median"], "bar_F": 1.15}
    write_row("record", row, save=options.save)


if __name__ == "__main__":
    main()
