"""Perplexity against activation ratio under every rule: one row a rule, score, metric and p.

Costs are counted in passes, not timed. With `--folder DIR` every pass is kept there as it is made, and a run that was
interrupted goes on from it; `pareto.json` is written there too.
"""

from __future__ import annotations

from pathlib import Path

import neuron_sparsity as ns
from benchmarks.harness import load, parser, write_row
from neuron_sparsity.store import make_folder, write_json


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--p", type=float, nargs="+", default=[1.0, 5.0, 10.0])
    options.add_argument("--rules", nargs="+", default=[])
    options.add_argument("--points", type=int, default=6)
    options.add_argument("--n-ctx", type=int, default=None, help="tokens a window")
    options.add_argument("--batch-size", type=int, default=None)
    options.add_argument("--folder", type=Path, default=None)
    options.set_defaults(tokens=4096)
    given = options.parse_args()
    adapter, windows = load(given)
    if given.n_ctx is not None:
        windows = ns.load_corpus(given.text, adapter.model, n_tokens=given.tokens, n_ctx=given.n_ctx)
    if given.folder is not None:
        make_folder(given.folder)

    def told(label: str, done: int, total: int) -> None:
        if done == total:
            print(f"  {label}", flush=True)

    result = ns.pareto(
        adapter,
        windows,
        rules=given.rules,
        p_percents=given.p,
        n_points=given.points,
        folder=given.folder,
        batch_size=given.batch_size,
        progress=told,
    )
    if given.folder is not None:
        write_json(given.folder / "pareto.json", result.to_json())
    shared = {
        "model": Path(given.model).name,
        "corpus": windows.name,
        "n_tokens": windows.n_tokens,
        "window": windows.window,
        "ppl_dense": result.ppl_dense,
        "nonzero_ratio": result.nonzero_ratio,
        "cuts": result.cost["cuts"],
    }
    verdicts = {(verdict.metric, verdict.p_percent): verdict for verdict in result.verdicts}
    for curve in result.curves:
        for answer in curve.answers:
            verdict = verdicts[answer.metric, answer.p_percent]
            place = verdict.order.index(curve.label) if curve.label in verdict.order else None
            compared = {
                "place": None if place is None else place + 1,
                "behind_first": None if place is None else verdict.difference[place],
                "behind_low": None if place is None else verdict.low[place],
                "behind_high": None if place is None else verdict.high[place],
            }
            row = shared | {"rule": curve.rule, "score": curve.score} | vars(answer) | compared
            write_row("pareto", row, save=given.save)


if __name__ == "__main__":
    main()
