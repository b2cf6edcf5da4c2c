"""Every rule on tiny models of both TransformerLens classes: cuts against hand-written hooks, answers against scans."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_sparsity.adapter import attach
from neuron_sparsity.errors import ModelError
from neuron_sparsity.pareto import TOLERANCE, ParetoResult, pareto
from neuron_sparsity.rule_passes import PASSES, RulePasses
from neuron_sparsity.rules import Rule, ThresholdCut, TopKCut, TopPCut, parse_rules
from neuron_sparsity.store import to_json_text
from neuron_sparsity.typed import checked

MODELS = ("llama", "opt", "hooked-relu", "hooked-silu")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tiny_model: Any, own_windows: Any) -> SimpleNamespace:
    model = tiny_model(request.param)
    windows = own_windows(model, 12, window=24)
    passes = RulePasses(attach(model), windows, ("contribution", "s"))
    return SimpleNamespace(name=request.param, model=model, windows=windows, passes=passes, dense=passes.dense())


@pytest.fixture(scope="module")
def llama(tiny_model: Any, own_windows: Any) -> SimpleNamespace:
    model = tiny_model("llama")
    return SimpleNamespace(model=model, windows=own_windows(model, 12, window=24))


def by_hand(case: SimpleNamespace, mask_of: Callable[[int, Tensor, Tensor], Tensor]) -> tuple[Tensor, float]:
    """Loss of every scored position under masks applied by hand-written hooks, and the share of pairs kept."""
    pre: dict[int, Tensor] = {}
    kept: list[float] = []

    def catch(value: Tensor, hook: Any, layer: int) -> None:
        pre[layer] = value.detach().clone()

    def cut(value: Tensor, hook: Any, layer: int) -> Tensor:
        z = value.flatten(0, 1)
        s = torch.nn.functional.silu(pre[layer].reshape(z.shape)) if case.name.endswith(("llama", "silu")) else z
        mask = mask_of(layer, z, s) & (z != 0)
        kept.append(float(mask.double().mean()))
        return (z * mask).view(value.shape)

    hooks = []
    for layer in range(2):
        hooks.append((f"blocks.{layer}.mlp.hook_pre", partial(catch, layer=layer)))
        hooks.append((f"blocks.{layer}.mlp.hook_post", partial(cut, layer=layer)))
    tokens = case.windows.tokens.long()
    with torch.no_grad():
        logits = case.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks).double()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.sum(dim=1), sum(kept) / len(kept)


def norms(case: SimpleNamespace, layer: int) -> Tensor:
    return case.model.blocks[layer].mlp.W_out.detach().norm(dim=1)


def ranks(scores: Tensor) -> Tensor:
    """Place of each score in its row, the largest 0, ties to the smaller index."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def held(scores: Tensor, share: float) -> Tensor:
    """Smallest set that holds a share, one token and one neuron at a time."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores.double()):
        total, reached = float(values.sum()), 0.0
        for index in values.argsort(descending=True, stable=True).tolist():
            if reached >= share * total:
                break
            mask[row, index] = True
            reached += float(values[index])
    return mask


def test_every_cut_is_what_hand_written_hooks_do(case: SimpleNamespace) -> None:
    thresholds = (0.05, 0.11)
    kinds: list[tuple[Any, Callable[[int, Tensor, Tensor], Tensor]]] = []
    for score in ("s", "contribution"):

        def values(layer: int, z: Tensor, s: Tensor, score: str = score) -> Tensor:
            return s.abs() if score == "s" else z.abs() * norms(case, layer)

        kinds += [
            (ThresholdCut(score, thresholds), lambda i, z, s, v=values: v(i, z, s) >= thresholds[i]),
            (TopKCut(score, 17), lambda i, z, s, v=values: ranks(v(i, z, s)) < 17),
            (TopPCut(score, 0.6), lambda i, z, s, v=values: held(v(i, z, s), 0.6)),
        ]
    dense, _ = by_hand(case, lambda i, z, s: torch.ones_like(z, dtype=torch.bool))
    seen = set()
    for cut, mask_of in kinds:
        made = case.passes.measure(cut, "test")
        losses, ratio = by_hand(case, mask_of)
        assert made.activation_ratio == pytest.approx(ratio, abs=2 / (2 * 288 * 64)), cut
        assert made.rise == pytest.approx((losses - dense).numpy(), abs=2e-3), cut
        assert (made.kl > 0).all()
        seen.add(round(made.activation_ratio, 6))
    assert len(seen) >= 5


def test_a_rule_that_cuts_nothing_changes_nothing_bit_for_bit(case: SimpleNamespace) -> None:
    everything = [*(ThresholdCut(score, (2.0**-149,) * 2) for score in ("s", "contribution"))]
    everything += [*(TopKCut(score, 64) for score in ("s", "contribution"))]
    everything += [*(TopPCut(score, 1.0) for score in ("s", "contribution"))]
    for cut in everything:
        made = case.passes.measure(cut, "test")
        assert (made.rise == 0).all(), cut
        assert made.activation_ratio == case.dense.nonzero_ratio, cut


def test_exact_zeros_changes_nothing_where_there_are_some(case: SimpleNamespace) -> None:
    made = case.passes.measure(Rule("zeros", "contribution").cut(0.0, case.dense), "zeros")
    assert (made.rise == 0).all()
    assert made.activation_ratio == case.dense.nonzero_ratio
    assert (case.dense.nonzero_ratio < 0.9) == (case.name in ("opt", "hooked-relu"))


def test_thresholds_of_the_dense_run(case: SimpleNamespace) -> None:
    posts: dict[int, Tensor] = {}
    for layer in range(2):
        case.model.add_hook(f"blocks.{layer}.mlp.hook_post", lambda z, hook, i=layer: posts.update({i: z.clone()}))
    with torch.no_grad():
        case.model(case.windows.tokens.long())
    case.model.reset_hooks()
    cut = Rule("quantile", "contribution").cut(0.7, case.dense)
    for layer in range(2):
        c = posts[layer].flatten(0, 1).abs() * norms(case, layer)
        assert float((c < cut.thresholds[layer]).double().mean()) == pytest.approx(0.7, abs=2e-3)
    cut = Rule("cett", "contribution").cut(0.2, case.dense)
    for layer in range(2):
        z = posts[layer].flatten(0, 1)
        tail = z * (z.abs() * norms(case, layer) < cut.thresholds[layer])
        w_out = case.model.blocks[layer].mlp.W_out.detach()
        assert float(((tail @ w_out).norm(dim=1) / (z @ w_out).norm(dim=1)).mean()) == pytest.approx(0.2, rel=0.03)


def test_the_answer_is_where_a_scan_of_every_k_puts_it(llama: SimpleNamespace) -> None:
    result = pareto(llama.model, llama.windows, rules=["topk:c"], p_percents=(5, 20), n_points=3)
    (curve,) = result.curves
    passes = RulePasses(attach(llama.model), llama.windows, ("contribution",))
    passes.dense()
    rises = [100 * math.expm1(passes.measure(TopKCut("contribution", k), "").mean("ppl")) for k in range(1, 65)]
    for answer in (a for a in curve.answers if a.metric == "ppl"):
        above = [k for k, rise in enumerate(rises, 1) if rise >= answer.p_percent]
        below = [k for k, rise in enumerate(rises, 1) if rise <= answer.p_percent]
        assert answer.reached
        assert answer.activation_ratio is not None
        assert (min(below) - 2) / 64 <= answer.activation_ratio <= (max(above) + 2) / 64
        assert answer.low <= answer.activation_ratio <= answer.high  # type: ignore[operator]
        if answer.converged:
            assert answer.measured_percent == pytest.approx(answer.p_percent, rel=TOLERANCE)


def test_a_result_is_whole_and_reads_back(llama: SimpleNamespace) -> None:
    result = pareto(llama.model, llama.windows, p_percents=(20, 5), n_points=2)
    assert [curve.label for curve in result.curves] == [rule.label for rule in parse_rules()]
    assert result.p_percents == (5.0, 20.0)
    assert [(v.metric, v.p_percent) for v in result.verdicts] == [("ppl", 5), ("ppl", 20), ("kl", 5), ("kl", 20)]
    for curve in result.curves:
        ratios = [point.activation_ratio for point in curve.points]
        assert ratios == sorted(ratios, reverse=True), curve.label
        assert [(a.metric, a.p_percent) for a in curve.answers] == [(v.metric, v.p_percent) for v in result.verdicts]
        if curve.rule == "zeros":
            assert (curve.points[0].ppl_increase_percent, curve.answers[0].reached) == (0.0, False)
            continue
        assert curve.points[-1].activation_ratio == 0
        assert curve.points[-1] == pytest.approx(result.curves[0].points[-1]) or curve.points[-1].parameter != 1
        assert sum(a.converged for a in curve.answers if a.metric == "ppl") == 2 or curve.rule == "topk", curve.label
    ends = {curve.points[-1].ppl for curve in result.curves if curve.rule != "zeros"}
    assert len(ends) == 1, "all rules share the pass that cuts everything"
    assert result.cost["cuts"] == len({(c.label, p.parameter) for c in result.curves for p in c.points}) - 8
    assert result.cost["forward_passes"] == pytest.approx(result.cost["cuts"] + 2, abs=1)
    firsts = result.verdicts[0]
    best = min((a.activation_ratio, c.label) for c in result.curves for a in c.answers[:1] if a.reached)
    assert (firsts.first, firsts.difference[0]) == (best[1], 0.0)
    text = to_json_text(result.to_json())
    back = checked(ParetoResult.from_json(json.loads(text)))
    assert back == result
    assert to_json_text(back.to_json()) == text


def test_not_reached_is_said_after_every_neuron_was_cut(llama: SimpleNamespace) -> None:
    result = pareto(llama.model, llama.windows, rules=["cett", "topk:s"], p_percents=(1e6,), n_points=1)
    for curve in result.curves:
        assert curve.points[-1].activation_ratio == 0
        for answer in curve.answers:
            assert (answer.reached, answer.activation_ratio, answer.converged) == (False, None, False)
    assert result.verdicts[0].order == ()
    assert result.dominant() is None


def test_fat_on_s_and_on_contributions_differ_on_a_gated_model(llama: SimpleNamespace) -> None:
    result = pareto(llama.model, llama.windows, rules=["fat"], p_percents=(10,), n_points=2)
    s, c = (curve.points for curve in result.curves)
    assert [round(p.activation_ratio, 2) for p in s[:2]] == pytest.approx([p.activation_ratio for p in c[:2]], abs=0.1)
    assert s[0].ppl != c[0].ppl


def test_an_interrupted_measurement_goes_on(llama: SimpleNamespace, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rules": ["cett", "topp:c"], "p_percents": (10,), "n_points": 3, "batch_size": 4}
    whole = pareto(llama.model, llama.windows, **options)
    seen: list[str] = []

    def stop(label: str, done: int, total: int) -> None:
        if done == 0:
            seen.append(label)
        if len(seen) == 6 and done:  # in the middle of the fourth cut
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pareto(llama.model, llama.windows, folder=tmp_path, progress=stop, **options)
    assert [path.name for path in tmp_path.iterdir()] == [PASSES]
    assert len(json.loads((tmp_path / PASSES).read_text())["passes"]) == 3
    further = pareto(llama.model, llama.windows, folder=tmp_path, **options)
    assert further.cost["taken_up"] == 3
    assert further.cost["cuts"] == whole.cost["cuts"]
    assert further.cost["forward_passes"] == pytest.approx(whole.cost["forward_passes"] - 3)
    assert (further.curves, further.verdicts) == (whole.curves, whole.verdicts), "to the last bit"


def test_passes_of_another_text_are_not_taken_up(llama: SimpleNamespace, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rules": ["topk:c"], "p_percents": (10,), "n_points": 2, "folder": tmp_path}
    pareto(llama.model, llama.windows, **options)
    other = pareto(llama.model, llama.windows.take(6), **options)
    assert other.cost["taken_up"] == 0


def test_a_damaged_file_of_passes_is_named(llama: SimpleNamespace, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rules": ["topk:c"], "p_percents": (10,), "n_points": 1, "folder": tmp_path}
    pareto(llama.model, llama.windows, **options)
    data = json.loads((tmp_path / PASSES).read_text())
    next(iter(data["passes"].values()))["kl"] = [0.0]
    (tmp_path / PASSES).write_text(json.dumps(data))
    from neuron_sparsity.errors import RunFolderError

    with pytest.raises(
        RunFolderError, match=r"pareto-passes.json is damaged \(ValueError: a pass is incomplete\); delete"
    ):
        pareto(llama.model, llama.windows, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_percents": ()}, "p_percents must hold at least one p"),
        ({"p_percents": (0,)}, "p must be a positive number of percent, got 0.0"),
        ({"p_percents": (float("nan"),)}, "p must be a positive number of percent, got nan"),
        ({"n_points": 0}, "n_points must be at least 1, got 0"),
        ({"rules": ["best"]}, "no rule 'best'"),
    ],
)
def test_bad_arguments(llama: SimpleNamespace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pareto(llama.model, llama.windows, **options)


def test_without_s_only_rules_on_contributions_run(tiny_hooked: Any, own_windows: Any) -> None:
    model = tiny_hooked(act_fn="solu_ln")
    windows = own_windows(model, 6, window=24)
    with pytest.raises(ModelError, match="use rules on contributions"):
        pareto(model, windows, rules=["topk"], p_percents=(10,), n_points=1)
    result = pareto(model, windows, rules=["topk:c"], p_percents=(10,), n_points=1)
    assert "s" not in result.provenance


def test_nothing_is_left_behind(llama: SimpleNamespace, hooks_on: Callable[[Any], int]) -> None:
    before = hooks_on(llama.model)
    tokens = llama.windows.tokens[:2].long()
    with torch.no_grad():
        dense = llama.model(tokens)
    pareto(llama.model, llama.windows, rules=["topk:s"], p_percents=(10,), n_points=1)
    assert hooks_on(llama.model) == before
    with torch.no_grad():
        after = llama.model(tokens)
    assert np.array_equal(getattr(after, "logits", after).numpy(), getattr(dense, "logits", dense).numpy())
