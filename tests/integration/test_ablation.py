"""Removing neurons: against the same edit made in the weights, and the removable set against a scan of every count."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity import ablation, removal
from neuron_sparsity.ablation import PARTIAL, AblationResult, ablate, removable_neurons, removable_sets
from neuron_sparsity.adapter import attach
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.perplexity import perplexity
from neuron_sparsity.ranking import Ranking, rank
from neuron_sparsity.recorder import record
from neuron_sparsity.removal import Removals, order_hash
from neuron_sparsity.replacement import Replacer
from neuron_sparsity.store import to_json_text
from neuron_sparsity.summary import summary_lines

CHOSEN = [(0, 0), (0, 17), (1, 5), (1, 6), (1, 63)]
P_PERCENT = 5.0
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def generous(case: SimpleNamespace) -> AblationResult:
    """The result of a search that may make as many passes as it likes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ablation, "_MAX_PASSES", (60.0, 5.0))
        return removable_neurons(case.model, case.windows, case.ranking, p_percent=P_PERCENT, n_controls=1)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out)


@pytest.fixture(scope="module")
def means() -> Tensor:
    return torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module", params=["gpt2", "hooked-silu"])
def case(request: pytest.FixtureRequest, tiny_model: Any, own_windows: Any) -> SimpleNamespace:
    model = tiny_model(request.param)
    windows = own_windows(model, 32)
    adapter = attach(model)
    stats = record(adapter, windows)
    ranking = rank(stats)
    result = removable_neurons(model, windows, ranking, p_percent=P_PERCENT)
    return SimpleNamespace(
        model=model, adapter=adapter, windows=windows, stats=stats, ranking=ranking, result=result, name=request.param
    )


# `ablate` against an edit of the weights.


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_zero_replacement_is_zeroing_rows_of_w_out(
    tiny_model: Any, tiny_hf_models: Any, sample_tokens: Any, family: str
) -> None:
    model, edited = tiny_model(family), tiny_hf_models(family)
    tokens = sample_tokens(model, 4).long()
    dense = logits_of(model, tokens)
    for layer, neuron in CHOSEN:
        if family == "gpt2":
            edited.transformer.h[layer].mlp.c_proj.weight[neuron] = 0
        elif family == "opt":
            edited.model.decoder.layers[layer].fc2.weight[:, neuron] = 0
        else:
            edited.model.layers[layer].mlp.down_proj.weight[:, neuron] = 0
    with ablate(model, CHOSEN):
        ablated = logits_of(model, tokens)
    # Bridges may leave a constant in the logits that softmax takes away again: compare what is predicted.
    assert torch.allclose(ablated.log_softmax(-1), logits_of(edited, tokens).log_softmax(-1), atol=1e-4)
    assert not torch.allclose(ablated, dense, atol=1e-2)
    assert torch.equal(logits_of(model, tokens), dense)


def test_mean_replacement_is_folding_the_mean_into_the_bias(
    tiny_model: Any, tiny_hf_models: Any, sample_tokens: Any, means: Tensor
) -> None:
    model, edited = tiny_model("gpt2"), tiny_hf_models("gpt2")
    tokens = sample_tokens(model, 4).long()
    for layer, neuron in CHOSEN:
        projection = edited.transformer.h[layer].mlp.c_proj
        projection.bias += means[layer, neuron].float() * projection.weight[neuron]
        projection.weight[neuron] = 0
    with ablate(model, CHOSEN, replacement="mean", means=means):
        ablated = logits_of(model, tokens)
    assert torch.allclose(ablated.log_softmax(-1), logits_of(edited, tokens).log_softmax(-1), atol=1e-4)


def test_mean_replacement_on_a_hooked_transformer(tiny_model: Any, sample_tokens: Any, means: Tensor) -> None:
    model, edited = tiny_model("hooked-silu"), tiny_model("hooked-silu")
    tokens = sample_tokens(model, 4).long()
    for layer, neuron in CHOSEN:
        mlp = edited.blocks[layer].mlp
        mlp.b_out += means[layer, neuron].float() * mlp.W_out[neuron]
        mlp.W_out[neuron] = 0
    with ablate(model, CHOSEN, replacement="mean", means=means):
        assert torch.allclose(logits_of(model, tokens), logits_of(edited, tokens), atol=1e-4)


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_ablating_nothing_changes_nothing_bit_for_bit(
    case: SimpleNamespace, means: Tensor, replacement: str, hooks_on: Callable[[Any], int]
) -> None:
    tokens, before = case.windows.tokens[:4].long(), hooks_on(case.model)
    dense = logits_of(case.model, tokens)
    with ablate(case.model, [], replacement=replacement, means=means):
        assert torch.equal(logits_of(case.model, tokens), dense)
    with pytest.raises(KeyError), ablate(case.model, CHOSEN):
        raise KeyError
    assert torch.equal(logits_of(case.model, tokens), dense)
    assert hooks_on(case.model) == before


def test_ablating_every_neuron_by_zero_leaves_the_bias(case: SimpleNamespace) -> None:
    tokens = case.windows.tokens[:4].long()
    every = [(0, neuron) for neuron in range(64)]
    b_out = case.adapter.b_out(0)

    def only_bias(output: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(output) + b_out

    with ablate(case.model, every):
        ablated = logits_of(case.model, tokens)
    with torch.no_grad():
        expected = case.model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", only_bias)])
    assert torch.allclose(ablated, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ([(2, 0)], r"no neuron \(2, 0\): layers are 0 to 1, neurons 0 to 63"),
        ([(-1, 0)], r"no neuron \(-1, 0\)"),
        ([(0, 64)], r"no neuron \(0, 64\)"),
        ([(0, -1)], r"no neuron \(0, -1\)"),
        ([(0, 3), (1, 3), (0, 3)], r"neuron \(0, 3\) is named twice"),
    ],
)
def test_neurons_that_are_not_there_or_come_twice_are_refused(
    case: SimpleNamespace, neurons: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message), ablate(case.model, neurons):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replacement": "noise"}, "replacement must be one of mean, zero, resample, got 'noise'"),
        ({"replacement": "mean"}, r"needs means of shape \[2, 64\], got none; record the model first"),
        ({"replacement": "mean", "means": torch.zeros(2, 63)}, r"needs means of shape \[2, 64\], got \[2, 63\]"),
    ],
)
def test_bad_replacements_are_refused(case: SimpleNamespace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), ablate(case.model, CHOSEN, **options):
        pass


# The removable set.


def test_the_removable_set_is_that_of_a_scan_over_every_count(case: SimpleNamespace, generous: AblationResult) -> None:
    calibration, result = case.windows.split()[0], generous
    means = case.stats.mean_activation
    dense = perplexity(case.adapter, calibration).ppl
    rises = []
    for n in range(129):
        with ablate(case.adapter, case.ranking.weakest(n), replacement="mean", means=means):
            rises.append(100 * (perplexity(case.adapter, calibration).ppl / dense - 1))
    found = result.n_removable
    assert result.resolved
    assert rises[found] == pytest.approx(result.ppl_increase_percent, abs=1e-3)
    assert rises[found] <= P_PERCENT < rises[found + 1]
    whole = [point for point in result.curve if point["n_tokens"] == calibration.n_tokens]
    assert {point["n_removed"] for point in whole} >= {0, found, found + 1}
    assert [rises[int(point["n_removed"])] for point in whole] == pytest.approx(
        [point["ppl_increase_percent"] for point in whole], abs=1e-3
    )
    assert all(point["standard_error_percent"] == 0 for point in whole)
    estimated = [point for point in result.curve if point["n_tokens"] < calibration.n_tokens]
    for point in estimated:
        distance = abs(rises[int(point["n_removed"])] - point["ppl_increase_percent"])
        assert distance < 6 * point["standard_error_percent"]


def test_the_result_says_what_was_removed_and_on_what(case: SimpleNamespace) -> None:
    result, (calibration, heldout) = case.result, case.windows.split()
    assert 0 < result.n_removable < 128
    assert result.reached
    assert list(result.removable) == case.ranking.weakest(result.n_removable)
    assert result.corpus == calibration.describe()
    assert result.heldout["corpus"] == heldout.describe()
    shared = {tuple(row) for row in calibration.tokens.tolist()} & {tuple(row) for row in heldout.tokens.tolist()}
    assert not shared
    counts = [point["n_removed"] for point in result.curve]
    assert counts == sorted(set(counts))
    start = {"n_removed": 0, "ppl": result.ppl_dense, "ppl_increase_percent": 0.0}
    assert result.curve[0] == start | {"n_tokens": calibration.n_tokens, "standard_error_percent": 0.0}
    assert result.ranking_sha256 == order_hash(case.ranking) != order_hash(rank(case.stats, by="random"))
    assert result.ppl_ablated == pytest.approx(result.ppl_dense * (1 + result.ppl_increase_percent / 100))
    assert result.ranking_corpus == case.windows.describe() | {"unseen_in_search": False}


def test_what_the_ranking_has_seen_is_found_in_the_text_itself(case: SimpleNamespace) -> None:
    first, second, third = (case.windows._pick(range(i, case.windows.n_windows, 3), "page") for i in range(3))
    ranking = rank(record(case.model, third))

    def seen(**options: Any) -> tuple[bool, bool]:
        found = removable_neurons(case.model, first, ranking, p_percent=20.0, n_controls=0, **options)
        assert found.heldout is not None
        return found.ranking_corpus["unseen_in_search"], found.heldout["unseen_by_ranking"]

    assert seen(heldout=second, ranked_on=third) == (True, True)
    assert seen(heldout=third, ranked_on=third) == (True, False)
    assert seen(heldout=second) == (False, False)  # not known
    with pytest.raises(ValueError, match="ranked_on is not what the ranking was made on"):
        seen(heldout=second, ranked_on=first)


def test_the_heldout_numbers_are_those_of_ablate(case: SimpleNamespace) -> None:
    heldout = case.windows.split()[1]
    with ablate(case.adapter, case.result.removable, replacement="mean", means=case.stats.mean_activation):
        ablated = perplexity(case.adapter, heldout).ppl
    dense = perplexity(case.adapter, heldout).ppl
    assert case.result.heldout["ppl_dense"] == pytest.approx(dense)
    assert case.result.heldout["ppl_ablated"] == pytest.approx(ablated, rel=1e-5)
    low, high = case.result.heldout["interval"]
    assert low < case.result.heldout["ppl_increase_percent"] < high
    assert case.result.heldout["holds"] == (high <= P_PERCENT)
    verdict = "holds" if high <= P_PERCENT else "fails" if low > P_PERCENT else "not refuted"
    assert case.result.heldout["verdict"] == verdict


def test_the_set_that_holds_on_heldout_text_is_shorter_and_does(
    case: SimpleNamespace, generous: AblationResult
) -> None:
    heldout = case.windows.split()[1]
    own = generous.heldout
    assert own["verdict"] != "holds", "this model and seed were chosen so that it does not"
    holding = own["holding"]
    assert 0 < holding["n_removable"] < generous.n_removable
    assert holding["interval"][1] <= P_PERCENT
    assert holding["chosen_on"] == "held-out text"
    neurons = case.ranking.weakest(holding["n_removable"])
    with ablate(case.adapter, neurons, replacement="mean", means=case.stats.mean_activation):
        ablated = perplexity(case.adapter, heldout).ppl
    assert holding["ppl_ablated"] == pytest.approx(ablated, rel=1e-5)


def test_the_controls_remove_as_many_of_every_layer(case: SimpleNamespace) -> None:
    control, n = case.result.control, case.result.n_removable
    per_layer = collections.Counter(layer for layer, _ in case.result.removable)
    calibration, means = case.windows.split()[0], case.stats.mean_activation
    removals = Removals(case.adapter, case.ranking, Replacer(case.adapter, "zero"), {"text": calibration}, {}, list)
    assert control["seeds"] == [0, 1, 2]
    exact = []
    for seed in control["seeds"]:
        mask = removals.matched(n, seed)
        pairs = [tuple(pair) for pair in mask.nonzero().tolist()]
        assert collections.Counter(layer for layer, _ in pairs) == per_layer
        assert set(pairs) != set(case.result.removable)
        with ablate(case.adapter, pairs, replacement="mean", means=means):
            exact.append(perplexity(case.adapter, calibration).ppl)
    assert len(set(exact)) == 3
    error = control["standard_error_percent"] / 100 * max(exact)
    assert control["ppl"] == pytest.approx(exact, rel=1e-5, abs=4 * error)
    rises = [100 * (ppl / case.result.ppl_dense - 1) for ppl in control["ppl"]]
    assert control["ppl_increase_percent"] == pytest.approx(statistics.fmean(rises))
    assert control["sd_percent"] == pytest.approx(statistics.stdev(rises))
    assert control["ratio"] == pytest.approx(statistics.fmean(rises) / case.result.ppl_increase_percent)
    assert 0 < control["n_tokens"] <= calibration.n_tokens


def test_seeds_change_the_controls_and_nothing_else(case: SimpleNamespace) -> None:
    again, other = (
        removable_neurons(case.model, case.windows, case.ranking, p_percent=P_PERCENT, seed=seed) for seed in (0, 7)
    )
    assert dataclasses.replace(again, cost={}, provenance={}) == dataclasses.replace(
        case.result, cost={}, provenance={}
    )
    assert other.control["seeds"] == [7, 8, 9]
    assert other.control["ppl"] != case.result.control["ppl"]
    assert (other.removable, other.curve) == (case.result.removable, case.result.curve)
    none = removable_neurons(case.model, case.windows, case.ranking, p_percent=P_PERCENT, n_controls=0)
    assert none.control is None
    assert none.n_removable >= case.result.n_removable  # what controls do not take is left to the search


def test_all_of_it_costs_at_most_ten_passes(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    original = case.adapter.final_residual

    def counted(batch: Tensor, on_post: Any = None) -> Tensor:
        tokens.append(batch.numel())
        return original(batch, on_post)

    monkeypatch.setattr(case.adapter, "final_residual", counted)
    for replacement, p_percents in (("mean", (P_PERCENT,)), ("zero", (1.0,)), ("resample", (10.0,)), ("mean", (2, 20))):
        tokens.clear()
        results = removable_sets(
            case.adapter, case.windows, case.ranking, p_percents=p_percents, replacement=replacement
        )
        passes = sum(tokens) / results[0].corpus["n_tokens"]
        assert results[-1].cost["forward_passes"] == pytest.approx(passes)
        assert passes <= 10 + 5 * (len(p_percents) - 1), (replacement, p_percents)


def test_several_p_share_passes(case: SimpleNamespace) -> None:
    large, small = removable_sets(case.adapter, case.windows, case.ranking, p_percents=(20.0, P_PERCENT))
    assert (small.p_percent, large.p_percent) == (P_PERCENT, 20.0)
    assert small.removable == case.result.removable
    assert small.n_removable < large.n_removable
    assert large.per_p == small.per_p
    assert [one["p_percent"] for one in large.per_p] == [P_PERCENT, 20.0]
    assert [one["n_removable"] for one in large.per_p] == [small.n_removable, large.n_removable]
    alone = removable_neurons(case.adapter, case.windows, case.ranking, p_percent=20.0)
    of_small, of_both, of_large = (found.cost["forward_passes"] for found in (small, large, alone))
    assert of_both < of_small + of_large - 1  # although what the first leaves of its passes is there for the second
    assert of_both <= 15
    measured = [{(p["n_removed"], p["ppl"]) for p in found.curve if p["n_tokens"] == 512} for found in (small, large)]
    assert len(measured[0]) > 2
    assert measured[0] <= measured[1]  # every pass of the first serves the second


def test_the_set_that_holds_is_told_as_it_was_measured(case: SimpleNamespace, own_windows: Any) -> None:
    heldout = own_windows(case.model, 8, seed=5)
    found = removable_sets(
        case.adapter, case.windows, case.ranking, p_percents=(1.0, 5.0, 20.0), heldout=heldout, n_controls=0
    )
    shorter = [result for result in found if result.heldout["holding"]]
    assert shorter, "no search left a shorter set"
    for result in shorter:
        held = result.holding_set()
        n = held.n_removable
        assert n == result.heldout["holding"]["n_removable"] < result.n_removable
        assert held.removable == result.removable[:n]
        with ablate(case.adapter, held.removable, replacement="mean", means=case.ranking.mean_activation):
            assert held.ppl_ablated == pytest.approx(perplexity(case.adapter, heldout).ppl)
        assert held.ppl_dense == pytest.approx(perplexity(case.adapter, heldout).ppl)
        assert held.ppl_increase_percent <= held.p_percent
        assert held.corpus == held.heldout["corpus"] == heldout.describe()
        assert [point["n_removed"] for point in held.curve] == [0, n, result.n_removable]
        assert (held.control, held.heldout["holds"], held.heldout["holding"]) == (None, True, None)
        assert held.holding_set() == held
        assert AblationResult.from_json(json.loads(to_json_text(held.to_json()))) == held
        assert summary_lines(None, None, held)[-1].endswith("holds, but was chosen on it")
    none = dataclasses.replace(shorter[0], heldout=shorter[0].heldout | {"holding": None})
    with pytest.raises(ValueError, match=r"no set was found to hold at .* on the 256 tokens of held-out text \("):
        none.holding_set()
    with pytest.raises(ValueError, match=r"nothing is removable at .*; search at a larger p"):
        dataclasses.replace(none, n_removable=0, removable=(), heldout=None).holding_set()


def test_an_interrupted_search_goes_on_and_ends_equal(
    case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    calls: list[int] = []
    original = removal.token_losses

    def interrupted(adapter: Any, windows: Any, **options: Any) -> Tensor:
        calls.append(windows.n_tokens)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(adapter, windows, **options)

    def search(**options: Any) -> AblationResult:
        return removable_neurons(
            case.adapter, case.windows, case.ranking, p_percent=P_PERCENT, folder=tmp_path, **options
        )

    monkeypatch.setattr(removal, "token_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search()
    kept = json.loads((tmp_path / PARTIAL).read_text())["passes"]
    assert sum(len(entry["windows"]) for entry in kept["calibration"].values()) * 32 == sum(calls[:5])
    result = search()
    assert sum(calls) - calls[5] == round(result.cost["forward_passes"] * result.corpus["n_tokens"])
    for name in ("removable", "curve", "control", "heldout"):
        assert getattr(result, name) == getattr(case.result, name), name
    before = len(calls)
    assert search().curve == result.curve
    assert len(calls) == before, "all of it is kept"
    search(replacement="zero")  # another question: nothing of it is used
    assert len(calls) > before + 3


def test_what_is_kept_and_damaged_is_refused(case: SimpleNamespace, tmp_path: Any) -> None:
    removable_neurons(case.adapter, case.windows, case.ranking, p_percent=P_PERCENT, folder=tmp_path)
    data = json.loads((tmp_path / PARTIAL).read_text())
    data["passes"]["calibration"]["dense"]["sums"].pop()
    (tmp_path / PARTIAL).write_text(json.dumps(data))
    with pytest.raises(RunFolderError, match=r"ablation.partial.json is damaged .* delete it"):
        removable_neurons(case.adapter, case.windows, case.ranking, p_percent=P_PERCENT, folder=tmp_path)


def test_results_of_the_first_version_load(case: SimpleNamespace) -> None:
    data = json.loads(to_json_text(case.result.to_json()))
    for name in ("ranking_sha256", "resolved", "per_p"):
        del data[name]
    data["control"] = {"kind": "random", "seed": 0, "ppl": 30.0, "ppl_increase_percent": 50.0}
    data["heldout"] = {"ppl_increase_percent": 1.5, "holds": False, "corpus": data["corpus"]}
    old = AblationResult.from_json(data)
    assert (old.ranking_sha256, old.resolved, old.per_p) == ("", True, ())
    assert summary_lines(None, None, old)[-1].endswith("held-out tokens: +1.500 %, does not hold")
    del data["curve"]
    with pytest.raises(KeyError, match="curve"):
        AblationResult.from_json(data)


def test_heldout_windows_that_are_given_are_used_and_leave_all_others_to_the_search(
    case: SimpleNamespace, own_windows: Any
) -> None:
    heldout = own_windows(case.model, 4, seed=5)
    result = removable_neurons(case.model, case.windows, case.ranking, p_percent=P_PERCENT, heldout=heldout)
    assert result.corpus == case.windows.describe()
    assert result.heldout["corpus"] == heldout.describe()


@pytest.mark.parametrize("replacement", ["zero", "mean"])
@pytest.mark.parametrize("n_planted", [40, 128])
def test_planted_neurons_without_output_are_all_found(
    tiny_hf_models: Any, tiny_tokenizer: Any, own_windows: Any, replacement: str, n_planted: int
) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    hf_model = tiny_hf_models("opt")
    planted = [divmod(index, 64) for index in torch.randperm(128, generator=torch.Generator().manual_seed(1)).tolist()]
    planted = planted[:n_planted]
    for layer, neuron in planted:
        hf_model.model.decoder.layers[layer].fc2.weight[:, neuron] = 0
    model = bridge.boot_transformers("tiny-planted-test", hf_model=hf_model, tokenizer=tiny_tokenizer)
    windows = own_windows(model, 8)
    result = removable_neurons(model, windows, rank(record(model, windows)), p_percent=0.5, replacement=replacement)
    assert set(planted) <= set(result.removable)
    if n_planted == 128:
        assert (result.n_removable, result.reached, result.ppl_increase_percent) == (128, False, 0.0)
        assert result.curve[-1]["n_removed"] == 128


def test_a_p_beyond_any_rise_removes_everything(case: SimpleNamespace) -> None:
    result = removable_neurons(case.model, case.windows, case.ranking, p_percent=1e6)
    assert (result.n_removable, result.reached) == (128, False)
    assert result.curve[-1]["n_removed"] == 128
    assert result.heldout["holds"]
    assert result.control["ppl"] == pytest.approx([result.ppl_ablated] * 3)  # all neurons: the control is the same set
    assert AblationResult.from_json(json.loads(to_json_text(result.to_json()))) == result


def test_where_even_the_weakest_neuron_costs_too_much_nothing_is_removable(case: SimpleNamespace) -> None:
    calibration = case.windows.split()[0]
    costs = {}
    for pair in case.ranking.strongest(8):
        with ablate(case.adapter, [pair]):
            costs[pair] = perplexity(case.adapter, calibration).loss
    costly = max(costs, key=costs.__getitem__)
    scores = torch.ones(2, 64)
    scores[costly] = 0.0
    stubborn = dataclasses.replace(case.ranking, scores=scores)
    result = removable_neurons(case.model, case.windows, stubborn, p_percent=1e-7, replacement="zero")
    assert (result.n_removable, result.removable, result.reached) == (0, (), True)
    assert (result.control, result.heldout) == (None, None)
    assert (result.ppl_ablated, result.ppl_increase_percent) == (result.ppl_dense, 0.0)
    assert AblationResult.from_json(json.loads(to_json_text(result.to_json()))) == result


def test_json_holds_every_promised_key_and_comes_back_whole(case: SimpleNamespace) -> None:
    data = json.loads(to_json_text(case.result.to_json()))
    promised = "schema p_percent ranking replacement n_neurons n_removable removable ppl_dense ppl_ablated heldout "
    promised += "control curve"
    assert set(promised.split()) <= set(data)
    assert (data["schema"], data["ranking"], data["replacement"]) == (1, "contribution", "mean")
    assert data["removable"] == [list(pair) for pair in case.result.removable]
    assert {"n_removed", "ppl"} <= set(data["curve"][0])
    assert {"ppl_dense", "ppl_ablated", "ppl_increase_percent", "holds", "corpus"} <= set(data["heldout"])
    assert {"interval", "verdict", "holding", "unseen_by_ranking"} <= set(data["heldout"])
    assert {"kind", "seed", "seeds", "ppl", "ppl_increase_percent", "sd_percent", "ratio", "n_tokens"} <= set(
        data["control"]
    )
    assert AblationResult.from_json(data) == case.result


@pytest.mark.parametrize("p_percent", [0, -1, math.nan, math.inf])
def test_a_p_that_is_no_positive_number_is_refused(case: SimpleNamespace, p_percent: float) -> None:
    with pytest.raises(ValueError, match=rf"p must be a positive number of percent, got {p_percent}"):
        removable_neurons(case.model, case.windows, case.ranking, p_percent=p_percent)


def test_bad_requests_are_refused_before_any_pass(case: SimpleNamespace, tiny_model: Any) -> None:
    def refuse(*passed: Any) -> None:
        raise AssertionError("a pass was made")

    def call(windows: Any = case.windows, ranking: Ranking = case.ranking, **options: Any) -> None:
        removable_neurons(case.adapter, windows, ranking, progress=refuse, **options)

    with pytest.raises(ValueError, match="replacement must be one of"):
        call(replacement="noise")
    with pytest.raises(ValueError, match="one window cannot be split"):
        call(windows=case.windows.take(1))
    with pytest.raises(ValueError, match="needs means of shape"):
        call(ranking=dataclasses.replace(case.ranking, mean_activation=None))
    holes = case.ranking.scores.clone()
    holes[0, :3] = math.nan
    with pytest.raises(ValueError, match="3 of 128 scores by 'contribution' are NaN and cannot be ordered"):
        call(ranking=dataclasses.replace(case.ranking, scores=holes))
    with pytest.raises(ValueError, match=r"scores of shape \[2, 63\], the model \[2, 64\]"):
        call(ranking=dataclasses.replace(case.ranking, scores=holes[:, :63]))
    with pytest.raises(ValueError, match="n_controls must be >= 0, got -1"):
        call(n_controls=-1)
    with pytest.raises(ValueError, match="p_percents is empty"):
        removable_sets(case.adapter, case.windows, case.ranking, p_percents=(), progress=refuse)
    other = dataclasses.replace(case.ranking, model=attach(tiny_model(case.name, seed=1)).info)
    with pytest.raises(ValueError, match=r"the ranking was made on .* with other weights; record this model first"):
        call(ranking=other)
