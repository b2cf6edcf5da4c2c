"""Replacements: against the same edit of the weights, on wrapped and on plain models, and what resample promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_sparsity import replacement
from neuron_sparsity.adapter import attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import perplexity, token_losses
from neuron_sparsity.recorder import record
from neuron_sparsity.replacement import REPLACEMENTS, Replacer, ablate, neuron_mask

CHOSEN = [(0, 0), (0, 17), (1, 5), (1, 6), (1, 63)]
FAMILIES = ["llama", "gpt2", "opt", "neox"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out).log_softmax(-1)


@pytest.fixture(scope="module")
def text() -> Windows:
    tokens = torch.randint(3, 300, (6, 16), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    tokens[:, 0] = 0
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(tokens, scored, "random", ("d",) * 6, "apart", bos=True)


def posts(model: Any, tokens: Tensor, inside: Any) -> list[Tensor]:
    """What enters each down projection of a Hugging Face model while a context is open."""
    found: dict[int, Tensor] = {}
    with inside:
        handles = [
            module.register_forward_pre_hook(lambda module, args, layer=layer: found.update({layer: args[0].clone()}))
            for layer, module in replacement.mlp_outputs(model).items()
        ]
        with torch.no_grad():
            model(tokens)
        for handle in handles:
            handle.remove()
    return [found[layer].reshape(*tokens.shape, -1) for layer in sorted(found)]


def test_means_alone_are_put_in(tiny_model: Any, text: Windows) -> None:
    model = tiny_model("llama")
    means = torch.rand(2, 64)
    given: dict[str, dict[str, Any]] = {
        "alone": {"means": means},
        "mean": {"means": means, "replacement": "mean"},
        "zero": {"means": means, "replacement": "zero"},
        "nothing": {},
    }
    ppl = {}
    for name, options in given.items():
        with ablate(model, CHOSEN, **options):
            ppl[name] = perplexity(model, text).ppl
    assert ppl["alone"] == ppl["mean"] != ppl["zero"] == ppl["nothing"]
    with (
        pytest.raises(ValueError, match="corpus is for replacement='mean' or 'resample'"),
        ablate(model, CHOSEN, corpus=text),
    ):
        pass


# The same on a plain model as on a wrapped one, and as in the weights.


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_gives_what_its_bridge_gives(
    tiny_bridge: Any, tiny_hf_models: Any, text: Windows, family: str, kind: str, hooks_on: Callable[[Any], int]
) -> None:
    bridge, plain, tokens = tiny_bridge(family), tiny_hf_models(family), text.tokens.long()
    options: dict[str, Any] = {} if kind == "zero" else {"corpus": text}
    dense, before = logits_of(plain, tokens), hooks_on(plain)
    with ablate(plain, CHOSEN, replacement=kind, **options):
        ours = logits_of(plain, tokens)
    with ablate(bridge, CHOSEN, replacement=kind, **options):
        theirs = logits_of(bridge, tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert float((ours - dense).abs().max()) > 1e-2
    assert torch.equal(logits_of(plain, tokens), dense)
    assert hooks_on(plain) == before


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_ablating_a_whole_layer_by_zero_is_removing_its_mlp(tiny_hf_models: Any, text: Windows, family: str) -> None:
    model, edited = tiny_hf_models(family), tiny_hf_models(family)
    replacement.mlp_outputs(edited)[1].weight.zero_()
    with ablate(model, [(1, neuron) for neuron in range(64)]):
        torch.testing.assert_close(logits_of(model, text.tokens.long()), logits_of(edited, text.tokens.long()))


def test_the_mean_over_a_corpus_is_the_recorded_mean(tiny_bridge: Any, text: Windows) -> None:
    model = tiny_bridge("llama")
    means = record(model, text).mean_activation
    with ablate(model, CHOSEN, replacement="mean", means=means):
        recorded = perplexity(model, text).loss
    with ablate(model, CHOSEN, replacement="mean", corpus=text):
        assert perplexity(model, text).loss == pytest.approx(recorded, abs=1e-5)


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_ablating_twice_is_ablating_once_and_nothing_is_nothing(tiny_hf_models: Any, text: Windows, kind: str) -> None:
    model, tokens = tiny_hf_models("gpt2"), text.tokens.long()
    options: dict[str, Any] = {"replacement": kind, "corpus": text}
    dense = logits_of(model, tokens)
    with ablate(model, [], **options):
        assert torch.equal(logits_of(model, tokens), dense)
    with ablate(model, CHOSEN, **options):
        once = logits_of(model, tokens)
        if kind != "resample":  # what a second bank holds is the ablated model's
            with ablate(model, CHOSEN, **options):
                assert torch.equal(logits_of(model, tokens), once)
        assert torch.equal(logits_of(model, tokens), once)


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_nothing_is_left_behind_by_an_exception(
    tiny_bridge: Any, text: Windows, kind: str, hooks_on: Callable[[Any], int]
) -> None:
    model = attach(tiny_bridge("opt")).model  # TransformerLens keeps hooks of its own on a point once it was used
    before, dense = hooks_on(model), logits_of(model, text.tokens.long())

    def fail_inside() -> None:
        with ablate(model, CHOSEN, replacement=kind, corpus=text):
            logits_of(model, text.tokens.long())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    with pytest.raises(ValueError, match="no neuron"), ablate(model, [(7, 0)], replacement=kind, corpus=text):
        pass
    assert hooks_on(model) == before
    assert torch.equal(logits_of(model, text.tokens.long()), dense)


# Resample.


def test_resample_puts_the_values_of_one_other_token_in_every_position(tiny_hf_models: Any, text: Windows) -> None:
    model, tokens = tiny_hf_models("llama"), text.tokens.long()
    first = [pair for pair in CHOSEN if pair[0] == 0]  # later layers of the ablated model see other activations
    columns = [neuron for _, neuron in first]
    dense = posts(model, tokens, ablate(model, []))[0].reshape(-1, 64)
    kept = [neuron for neuron in range(64) if neuron not in columns]
    own, drawn = torch.arange(len(dense)), []
    starts = own % 16 == 0  # every window begins with BOS: one context
    for seed in range(12):  # by chance a token would draw itself about once a seed
        inside = ablate(model, first, replacement="resample", corpus=text, seed=seed)
        found = posts(model, tokens, inside)[0].reshape(-1, 64)
        assert torch.equal(found[:, kept], dense[:, kept])
        distance = torch.cdist(found[:, columns].double(), dense[:, columns].double())
        donor = distance.argmin(dim=1)
        assert float(distance.min(dim=1).values.max()) < 1e-6  # all neurons of a position come from one token
        assert not (donor == own).any()
        assert not (starts[donor] & starts).any()
        drawn.append(donor)
    assert len(torch.cat(drawn).unique()) > 80  # of 91 contexts


def test_the_same_draw_serves_all_layers(tiny_hf_models: Any, text: Windows) -> None:
    model, tokens = tiny_hf_models("llama"), text.tokens.long()
    pairs = [(0, 3), (1, 3)]
    replacer = Replacer(model, "resample", corpus=text)
    with replacer.on_post(neuron_mask([0, 1], 64, pairs)) as on_post, replacer.hooked(on_post):
        logits_of(model, tokens)
        donors = replacer._bank._donors
        assert donors.shape == (tokens.numel(),)
    dense = [z.reshape(-1, 64) for z in posts(model, tokens, ablate(model, []))]
    both = posts(model, tokens, ablate(model, pairs, replacement="resample", corpus=text))
    first = replacer._bank._values
    for layer in (0, 1):
        assert torch.equal(both[layer].reshape(-1, 64)[:, 3], first[layer][donors, 0])
        assert np.isin(first[layer][:, 0].numpy().round(4), dense[layer][:, 3].numpy().round(4)).all()


@pytest.mark.parametrize("wrapped", [True, False])
def test_resample_is_the_same_whatever_the_batch_size_and_the_company(
    tiny_bridge: Any, text: Windows, wrapped: bool
) -> None:
    adapter = attach(tiny_bridge("opt"), plain=not wrapped)
    replacer = Replacer(adapter, "resample", corpus=text, seed=4)
    mask = neuron_mask(adapter.info.layers, 64, CHOSEN)
    with replacer.on_post(mask) as on_post:
        one, four = (token_losses(adapter, text, on_post=on_post, batch_size=size) for size in (1, 4))
        some = token_losses(adapter, text.take(2), on_post=on_post)
    torch.testing.assert_close(one, four, atol=1e-5, rtol=0)
    rows = [text.tokens.tolist().index(row) for row in text.take(2).tokens.tolist()]
    torch.testing.assert_close(one[rows], some, atol=1e-5, rtol=0)
    with ablate(adapter.model, CHOSEN, replacement="resample", corpus=text, seed=4):
        torch.testing.assert_close(token_losses(attach(adapter.model), text), one, atol=1e-4, rtol=0)


def test_the_seed_and_nothing_else_changes_the_draw(tiny_hf_models: Any, text: Windows) -> None:
    model, tokens = tiny_hf_models("llama"), text.tokens.long()

    def inside(seed: int) -> Tensor:
        with ablate(model, CHOSEN, replacement="resample", corpus=text, seed=seed):
            logits_of(model, tokens.flip(0))  # what ran before does not count
            return logits_of(model, tokens)

    assert torch.equal(inside(1), inside(1))
    assert float((inside(1) - inside(2)).abs().max()) > 1e-2


def test_a_bank_holds_the_removed_neurons_of_a_bounded_number_of_tokens(
    tiny_hf_models: Any, text: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacement, "BANK_TOKENS", 20)
    replacer = Replacer(tiny_hf_models("llama"), "resample", corpus=text)
    mask = neuron_mask([0, 1], 64, CHOSEN)
    replacer.prepare(mask)
    assert [tuple(values.shape) for values in replacer._bank._values] == [(20, 2), (20, 3)]
    assert replacer.tokens_run == 32
    replacer.prepare(neuron_mask([0, 1], 64, CHOSEN[:2]))
    assert replacer.tokens_run == 32  # the bank serves any part of what it holds
    replacer.prepare(neuron_mask([0, 1], 64, [(0, 1)]))
    assert replacer.tokens_run == 64


def test_what_cannot_be_is_refused_in_one_line(tiny_hf_models: Any, text: Windows) -> None:
    model = tiny_hf_models("llama")
    same = Windows(
        torch.zeros(1, 2, dtype=torch.int32).index_fill(1, torch.tensor([1]), 5).expand(2, 2).contiguous(),
        torch.tensor([[False, True]] * 2), "two", ("d",) * 2, "apart", bos=False,
    )  # fmt: skip
    for pairs, error, message in (
        ([(2, 0)], ValueError, r"no neuron \(2, 0\): layers are 0 to 1, neurons 0 to 63"),
        ([(0, 3), (0, 3)], ValueError, r"neuron \(0, 3\) is named twice"),
        ([(0, 1.5)], TypeError, r"neurons are pairs \(layer, neuron\) of integers, got \(0, 1.5\)"),
        ([7], TypeError, "neurons are pairs"),
    ):
        with pytest.raises(error, match=message), ablate(model, pairs):
            pass
    with (
        pytest.raises(ValueError, match="'resample' needs a corpus to draw from"),
        ablate(model, CHOSEN, replacement="resample"),
    ):
        pass
    with pytest.raises(TypeError, match="must be a TransformerLens model or a causal language model"), ablate(3, []):
        pass
    with (
        ablate(model, CHOSEN, replacement="resample", corpus=text),
        torch.no_grad(),
        pytest.raises(ValueError, match="run the model on tokens, not on embeddings"),
    ):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with ablate(model, CHOSEN, replacement="resample", corpus=same):  # two contexts are enough
        logits_of(model, text.tokens.long())
