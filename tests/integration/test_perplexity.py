"""Perplexity against Hugging Face's own loss, in any batch size, and without ever holding all logits."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity.adapter import attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.errors import MeasurementError
from neuron_sparsity.perplexity import default_batch_size, mean_loss, perplexity, token_losses

perplexity_module = sys.modules["neuron_sparsity.perplexity"]  # `ns.perplexity` is the function


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_windows(n_windows: int = 5, window: int = 24, *, bos: bool = True, seed: int = 0) -> Windows:
    tokens = torch.randint(3, 300, (n_windows, window), generator=torch.Generator().manual_seed(seed))
    if bos:
        tokens[:, 0] = 0
    scored = torch.ones(n_windows, window, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(tokens.int(), scored, "random", ("d",) * n_windows, "apart", bos)


def own_losses(model: Any, windows: Windows) -> Tensor:
    """Hugging Face's own loss of each window: it shifts the labels itself and leaves -100 out."""
    tokens = windows.tokens.long()
    labels = torch.where(windows.scored, tokens, -100)
    return torch.stack([model(row[None], labels=label[None]).loss for row, label in zip(tokens, labels, strict=True)])


# --- the number itself ---


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox", "gemma2", "granite"])
def test_it_is_hugging_faces_own_loss(make_hf: Any, make_bridge: Any, family: str, bos: bool) -> None:
    windows = make_windows(bos=bos)
    expected = float(own_losses(make_hf(family), windows).mean())  # all windows score the same number of tokens
    result = perplexity(make_bridge(family), windows)
    assert result.loss == pytest.approx(expected, abs=1e-5)
    assert result.ppl == pytest.approx(math.exp(expected), rel=1e-5)
    assert abs(expected - math.log(300)) > 0.01, "a model that knows nothing would prove nothing"
    assert (result.n_scored, result.corpus) == (windows.n_scored, windows.describe())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_folding_changes_nothing(make_bridge: Any, family: str) -> None:
    windows = make_windows()
    plain, compat = (perplexity(make_bridge(family, compat=compat), windows).loss for compat in (False, True))
    assert compat == pytest.approx(plain, abs=1e-4)


def test_the_soft_cap_is_there(make_hf: Any, make_bridge: Any) -> None:
    """Without it the loss would be another one: the cap of 2 is well inside the range of the logits."""
    model = make_bridge("gemma2")
    adapter = attach(model)
    assert adapter.chunked_logits
    logits = adapter.logits(adapter.final_residual(make_windows().tokens.long()))
    assert 1.5 < float(logits.abs().max()) <= 2.0
    raw = model.unembed(adapter.final_residual(make_windows().tokens.long()))
    assert float(raw.abs().max()) > 3.0


def test_hooked_transformer(tiny_hooked: Any) -> None:
    windows = make_windows()
    for options in ({"act_fn": "relu"}, {"act_fn": "silu", "gated": True}, {"act_fn": "solu_ln"}):
        model = tiny_hooked(**options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = float(model(windows.tokens.long(), return_type="loss"))
        assert perplexity(model, windows).loss == pytest.approx(expected, abs=1e-5)


def test_the_loss_stands_at_the_token_that_is_predicted(make_hf: Any, make_bridge: Any) -> None:
    windows = make_windows(2, 9)
    losses = token_losses(attach(make_bridge("llama")), windows)
    log_probs = make_hf("llama")(windows.tokens.long()).logits.log_softmax(-1)
    assert losses.dtype == torch.float32
    for row in range(2):
        assert float(losses[row, 0]) == 0.0
        for pos in range(1, 9):
            expected = -float(log_probs[row, pos - 1, windows.tokens[row, pos]])
            assert float(losses[row, pos]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_only_scored_positions_count(make_bridge: Any, family: str) -> None:
    adapter = attach(make_bridge(family))
    windows = make_windows(4, 12)
    scored = windows.scored & (torch.arange(12) % 3 != 0)
    scored[2] = False  # a window without anything to score
    sparse = Windows(windows.tokens, scored, "random", windows.documents, "apart", True)
    full, some = token_losses(adapter, windows), token_losses(adapter, sparse)
    assert not some[~scored].any()
    torch.testing.assert_close(some[scored], full[scored], rtol=1e-5, atol=1e-5)
    assert perplexity(adapter, sparse).loss == pytest.approx(float(full[scored].double().mean()), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_batch_size_does_not_matter(make_bridge: Any, family: str) -> None:
    adapter, windows = attach(make_bridge(family)), make_windows(5)
    losses = [perplexity(adapter, windows, batch_size=size).loss for size in (1, 2, 5, 100, None)]
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(make_hf: Any, tiny_tokenizer: Any, make_bridge: Any, dtype: torch.dtype) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    model = bridge.boot_transformers("t", hf_model=make_hf("llama").to(dtype), tokenizer=tiny_tokenizer, dtype=dtype)
    windows = make_windows()
    exact = perplexity(make_bridge("llama"), windows).loss
    assert perplexity(model, windows).loss == pytest.approx(exact, rel=0.05)
    assert token_losses(attach(model), windows).dtype == torch.float32


# --- hooks ---


def test_your_own_hooks_take_part(make_bridge: Any) -> None:
    model, windows = make_bridge("llama"), make_windows()
    dense = perplexity(model, windows).loss
    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", lambda z, hook: z * 0)]):
        silenced = perplexity(model, windows).loss
    by_us = token_losses(attach(model), windows, on_post=lambda layer, z: z * 0 if layer == 0 else None)
    assert silenced != dense
    assert mean_loss(by_us, windows.scored) == pytest.approx(silenced, abs=1e-6)
    assert perplexity(model, windows).loss == dense


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_returning_the_same_activations_changes_no_bit(make_bridge: Any, family: str) -> None:
    adapter, windows = attach(make_bridge(family)), make_windows()
    dense = token_losses(adapter, windows)
    assert torch.equal(token_losses(adapter, windows, on_post=lambda layer, z: z.clone()), dense)
    assert torch.equal(token_losses(adapter, windows, on_post=lambda layer, z: None), dense)


# --- memory ---


def largest_logits(model: Any, run: Callable[[], Any]) -> int:
    """Return the number of entries of the largest tensor the unembedding put out."""
    sizes = [0]
    handle = model.unembed.register_forward_hook(
        lambda module, args, output: sizes.append((output[0] if isinstance(output, tuple) else output).numel())
    )
    try:
        run()
    finally:
        handle.remove()
    return max(sizes)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_logits_of_a_batch_never_exist(make_bridge: Any, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = make_bridge(family)
    adapter, windows = attach(model), make_windows(6, 32)
    whole = perplexity(adapter, windows, batch_size=6).loss
    monkeypatch.setattr(perplexity_module, "_LOGIT_FLOATS", 64 * 300)  # 64 positions: the least there is
    chunked = []
    largest = largest_logits(model, lambda: chunked.append(perplexity(adapter, windows, batch_size=6).loss))
    assert largest == 64 * 300 < 6 * 32 * 300
    assert chunked == pytest.approx([whole], abs=1e-6)


def test_a_pass_for_statistics_pays_for_one_position(make_bridge: Any) -> None:
    model = make_bridge("llama")
    adapter = attach(model, plain=False)
    tokens = make_windows(6, 32).tokens.long()
    assert largest_logits(model, lambda: adapter.final_residual(tokens)) == 6 * 300


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_where_pieces_do_not_agree_windows_go_one_by_one(make_bridge: Any, family: str) -> None:
    """These models scale their logits after the unembedding: only the whole model knows them."""
    model = make_bridge(family)
    adapter = attach(model)
    assert not adapter.chunked_logits
    largest = largest_logits(model, lambda: perplexity(adapter, make_windows(4, 16), batch_size=4))
    assert largest == 16 * 300


# --- batches, progress and errors ---


def test_progress_is_told_after_each_batch(make_bridge: Any) -> None:
    told: list[tuple[str, int, int]] = []
    perplexity(make_bridge("opt"), make_windows(5, 8), batch_size=2, progress=lambda *now: told.append(now))
    assert told == [("dense pass", done, 40) for done in (0, 16, 32, 40)]


@pytest.mark.parametrize("family", ["opt", "granite"])
@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_that_cannot_be(make_bridge: Any, family: str, batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"^batch_size must be at least 1, got {batch_size}$"):
        perplexity(make_bridge(family), make_windows(), batch_size=batch_size)


def test_default_batch_size(make_bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = attach(make_bridge("opt"))
    assert default_batch_size(adapter, 32) == 1024 // 32
    assert default_batch_size(adapter, 100_000) == 1
    monkeypatch.setattr(perplexity_module, "_free_bytes", lambda device: 1e6)
    assert 1 <= default_batch_size(adapter, 8) < 1024 // 8
    monkeypatch.setattr(perplexity_module, "_free_bytes", lambda device: 0.0)
    assert default_batch_size(adapter, 8) == 1


def test_a_loss_that_is_no_number(make_bridge: Any) -> None:
    adapter, windows = attach(make_bridge("opt")), make_windows()
    expected = r"^the mean loss is nan; the weights or the activations are not finite numbers$"
    with pytest.raises(MeasurementError, match=expected):
        mean_loss(token_losses(adapter, windows, on_post=lambda layer, z: z * math.nan), windows.scored)


@pytest.mark.parametrize(
    ("error", "batch_size", "message"),
    [
        (MemoryError(), 4, "out of memory; lower --batch-size (now 4), or use a smaller model or --dtype bfloat16"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory; lower --n-ctx (now 24), or use a smaller"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "out of memory; lower --batch"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 2, "out of memory; lower --batch-size"),
    ],
)
def test_out_of_memory_names_the_option(make_bridge: Any, error: Exception, batch_size: int, message: str) -> None:
    def fail(layer: int, z: Tensor) -> None:
        raise error

    with pytest.raises(MeasurementError) as caught:
        token_losses(attach(make_bridge("opt")), make_windows(), on_post=fail, batch_size=batch_size)
    assert str(caught.value).startswith(message)
    assert caught.value.__cause__ is error


def test_other_errors_are_left_alone(make_bridge: Any) -> None:
    def fail(layer: int, z: Tensor) -> None:
        raise RuntimeError("shapes disagree")

    with pytest.raises(RuntimeError, match=r"^shapes disagree$"):
        token_losses(attach(make_bridge("opt")), make_windows(), on_post=fail)
