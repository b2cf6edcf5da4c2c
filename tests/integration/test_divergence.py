"""KL divergence of truncated models against its definition, on models whose logits are made in every way there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity import divergence
from neuron_sparsity.adapter import MLPAdapter, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.divergence import DenseReference
from neuron_sparsity.perplexity import token_losses

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Hook = Callable[[int, Tensor], Tensor]


def halve_some(layer: int, z: Tensor) -> Tensor:
    """A change of the model that is neither small nor large, and the same whatever the batch."""
    return z * (1 - 0.5 * (torch.arange(z.shape[-1]) % (3 + layer) == 0).to(z.dtype))


def kl_of(adapter: MLPAdapter, windows: Windows, hook: Hook, **options: Any) -> Tensor:
    reference = DenseReference(adapter, windows)
    token_losses(adapter, windows, on_rows=reference.remember, **options)
    comparison = reference.comparison()
    token_losses(adapter, windows, on_post=hook, on_rows=comparison.take, **options)
    return comparison.kl


def kl_by_definition(adapter: MLPAdapter, windows: Windows, hook: Hook) -> Tensor:
    """From the whole model's own logits, in float64."""
    tokens = windows.tokens.long()
    with torch.no_grad():
        log_p = adapter.model(tokens, return_type="logits").double().log_softmax(-1)
        with adapter.hooked(hook):
            log_q = adapter.model(tokens, return_type="logits").double().log_softmax(-1)
    kl = torch.zeros(tokens.shape, dtype=torch.float64)
    kl[:, 1:] = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1]
    return torch.where(windows.scored, kl, 0.0)


@pytest.fixture
def windows(own_windows: Any, make_bridge: Any) -> Windows:
    made = own_windows(make_bridge("llama"), 5, window=24)
    made.scored[1, 7:11] = False
    made.scored[3] = False  # a window without anything to score
    return Windows(made.tokens, made.scored, made.name, made.documents, made.packing, made.bos)


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("llama", "linear"),
        ("opt", "linear"),
        ("gpt2-compat", "linear"),
        ("gemma2", "hidden"),
        ("granite", "nothing"),
    ],
)
def test_it_is_the_divergence_of_the_definition(make_bridge: Any, windows: Windows, family: str, kept: str) -> None:
    name = family.removesuffix("-compat")
    adapter = attach(make_bridge(name, compat=name != family))
    reference = DenseReference(adapter, windows)
    assert (reference._unembedding is not None) == (kept == "linear")
    assert adapter.chunked_logits == (kept != "nothing")
    expected = kl_by_definition(adapter, windows, halve_some)
    assert float(expected[windows.scored].mean()) > 5e-4, "a change that does nothing would prove nothing"
    for batch_size in (1, 2, 5):
        found = kl_of(adapter, windows, halve_some, batch_size=batch_size)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=5e-6)
        assert not found[~windows.scored].any()


def test_hooked_transformer_too(tiny_hooked: Any, windows: Windows) -> None:
    adapter = attach(tiny_hooked(act_fn="silu", gated=True))
    expected = kl_by_definition(adapter, windows, halve_some)
    torch.testing.assert_close(kl_of(adapter, windows, halve_some).double(), expected, rtol=1e-4, atol=5e-6)


def test_a_pass_that_changes_nothing_diverges_by_nothing_but_rounding(make_bridge: Any, windows: Windows) -> None:
    for family in ("llama", "gemma2", "granite"):
        assert float(kl_of(attach(make_bridge(family)), windows, lambda layer, z: z).abs().max()) < 2e-6


def test_half_precision_keeps_hidden_states_and_agrees(make_hf: Any, tiny_tokenizer: Any, windows: Windows) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    model = make_hf("llama").to(torch.bfloat16)
    adapter = attach(bridge.boot_transformers("t", hf_model=model, tokenizer=tiny_tokenizer, dtype=torch.bfloat16))
    assert DenseReference(adapter, windows)._unembedding is None
    expected = kl_by_definition(adapter, windows, halve_some)
    found = kl_of(adapter, windows, halve_some).double()
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.05)  # batches round otherwise


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_long_reference_lies_in_a_file(
    make_bridge: Any, windows: Windows, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = attach(make_bridge(family))
    in_memory = kl_of(adapter, windows, halve_some, batch_size=2)
    files: list[Any] = []
    monkeypatch.setattr(divergence, "_IN_MEMORY", 64)
    opened = divergence.tempfile.TemporaryFile

    def counted(**options: Any) -> Any:
        files.append(opened(**options))
        return files[-1]

    monkeypatch.setattr(divergence.tempfile, "TemporaryFile", counted)
    assert torch.equal(kl_of(adapter, windows, halve_some, batch_size=2), in_memory)
    assert [file.closed for file in files] == [True]


def test_one_reference_serves_many_passes_in_any_batch_size(make_bridge: Any, windows: Windows) -> None:
    adapter = attach(make_bridge("llama"))
    reference = DenseReference(adapter, windows)
    token_losses(adapter, windows, on_rows=reference.remember, batch_size=5)
    found = []
    for batch_size in (1, 3):
        comparison = reference.comparison()
        token_losses(adapter, windows, on_post=halve_some, on_rows=comparison.take, batch_size=batch_size)
        found.append(comparison.kl)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=5e-6)


def test_a_token_that_no_model_gives_any_chance_adds_nothing() -> None:
    """Masked logits are -inf in both models."""
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.5, 0.0, -torch.inf]])
    changed = torch.tensor([[1.5, 2.0, -torch.inf], [0.5, 0.1, -torch.inf]])
    rows = divergence.ScoredRows(torch.arange(2), None, changed, changed.logsumexp(dim=1))
    expected = torch.nn.functional.kl_div(
        changed[:, :2].log_softmax(1), logits[:, :2].log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    torch.testing.assert_close(divergence._divergence(logits, rows), expected)
