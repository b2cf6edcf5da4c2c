"""`track`: one CETT for all checkpoints, found on the last five; gaps, resuming, one model in memory at a time."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuron_sparsity.adapter import attach
from neuron_sparsity.errors import MeasurementError, RunFolderError
from neuron_sparsity.evaluation import Evaluator
from neuron_sparsity.laws import read_points
from neuron_sparsity.perplexity import perplexity
from neuron_sparsity.recorder import record
from neuron_sparsity.sparsity import cett_ppl_sparsity, sparsify
from neuron_sparsity.trajectory import SparsityAt, TrajectoryResult, track, tracker
from neuron_sparsity.trajectory.measure import LAST, common_cett, dead_share, sparsity_at

STEP = 1000


@pytest.fixture(scope="module")
def checkpoint(tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Any]:
    """`checkpoint(n)`: checkpoint n of seven: the tiny Llama, with less noise in its weights the later it is."""
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge

    def make(n: int, family: str = "llama", tokenizer: Any = None) -> Any:
        model = tiny_hf_models(family)
        generator = torch.Generator().manual_seed(n)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * (0.35 - 0.04 * n))
        return bridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer or tiny_tokenizer)

    return make


@pytest.fixture(scope="module")
def windows(own_windows: Callable[..., Any], tiny_hf_models: Callable[..., Any]) -> Any:
    return own_windows(tiny_hf_models("llama"), 32)


@pytest.fixture(scope="module")
def seven(checkpoint: Callable[..., Any]) -> list[tuple[str, Callable[[], Any]]]:
    return [(f"step{STEP * n}", lambda n=n: checkpoint(n)) for n in range(1, 8)]


@pytest.fixture
def last_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The common CETT is searched on two checkpoints, which is quicker than on five."""
    monkeypatch.setattr(tracker, "LAST", 2)


@pytest.fixture(scope="module")
def tracked(seven: Any, windows: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrajectoryResult]:
    folder = tmp_path_factory.mktemp("tracked")
    return folder, track(seven, windows, folder=folder, tokens_per_step=10)


def values(result: TrajectoryResult) -> Any:
    """Everything that was found, but the command and versions."""
    return {key: value for key, value in result.to_json().items() if key != "provenance"}


def test_the_common_cett_costs_p_on_average_over_the_last_five(tracked: tuple[Path, TrajectoryResult]) -> None:
    _, result = tracked
    assert result.common is not None
    assert result.complete
    assert result.common.checkpoints == tuple(f"step{STEP * n}" for n in range(3, 8))
    assert len(result.common.checkpoints) == LAST
    assert abs(result.common.ppl_increase_percent - 1) <= result.common.tolerance_percent == 0.1
    last = [point.at(result.cett) for point in result.points[-LAST:]]
    mean = np.mean([found.ppl_increase_percent for found in last if found is not None])
    assert mean == pytest.approx(result.common.ppl_increase_percent, abs=1e-9)
    assert [point.tokens for point in result.points] == [10 * STEP * n for n in range(1, 8)]
    assert {point.at(result.cett).cett for point in result.points} == {result.cett}


@pytest.mark.parametrize("n", [1, 6])
def test_a_point_is_what_its_thresholds_do_to_the_model(
    tracked: tuple[Path, TrajectoryResult], checkpoint: Callable[..., Any], windows: Any, n: int
) -> None:
    _, result = tracked
    point, model = result.points[n - 1], attach(checkpoint(n))
    assert point.ppl_dense == pytest.approx(perplexity(model, windows).ppl, rel=1e-6)
    for found in (point.own, point.at(result.cett)):
        thresholds = [layer.threshold for layer in found.layers]
        with sparsify(model, thresholds) as truncation:
            ppl = perplexity(model, windows).ppl
        assert 100 * (ppl / point.ppl_dense - 1) == pytest.approx(found.ppl_increase_percent, abs=1e-4)
        assert truncation.layer_activation_ratios == pytest.approx([layer.activation_ratio for layer in found.layers])
        assert found.activation_ratio == pytest.approx(truncation.activation_ratio)
        assert [layer.cett for layer in found.layers] == pytest.approx([found.cett] * 2, rel=0.005)
        stats = record(model, windows, thresholds={"t": thresholds})
        frequency = stats.activation_frequency("t")
        assert found.dead.dead_ratio == float((frequency < 0.001).double().mean())
        assert found.dead.never_active_ratio == float((frequency == 0).double().mean())
        assert np.mean(found.dead.layer_dead_ratios) == pytest.approx(found.dead.dead_ratio)
        assert found.dead.n_tokens == windows.n_tokens
        assert found.dead.frequency_bound_95 == 3 / windows.n_tokens


def test_dead_neurons_are_those_that_a_count_finds(tiny_model: Callable[..., Any], own_windows: Any) -> None:
    """A neuron that is active once in 1,152 tokens is dead; one that never is is that too; zeros are another matter."""
    adapter = attach(tiny_model("opt"))
    windows = own_windows(adapter.model, 64, window=18)
    posts: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        adapter.final_residual(windows.tokens.long(), lambda layer, z: posts.update({layer: z.flatten(0, 1).clone()}))
    c = [posts[layer].abs() * norm for layer, norm in enumerate(adapter.w_norms)]
    cuts = [float(values.topk(2, dim=0).values[1].median()) for values in c]
    counts = torch.stack([(values >= cut).sum(dim=0) for values, cut in zip(c, cuts, strict=True)])
    found = dead_share(adapter, windows, cuts)
    assert found.n_tokens == windows.n_tokens == 1152
    assert found.layer_dead_ratios == tuple((counts <= 1).double().mean(dim=1).tolist())
    assert found.dead_ratio == float((counts <= 1).double().mean()) > found.never_active_ratio
    assert found.never_active_ratio == float((counts == 0).double().mean()) > found.never_nonzero_ratio
    silent = torch.stack([(posts[layer] == 0).all(dim=0) for layer in range(2)])
    assert found.never_nonzero_ratio == float(silent.double().mean())


def test_a_pass_whose_layers_miss_the_common_cett_is_made_again(
    checkpoint: Callable[..., Any], windows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first check that finds every layer 3 % off: the thresholds are made and checked anew."""
    told, refined = [], []
    check, refine = Evaluator.check, Evaluator.refine

    def off(self: Evaluator, thresholds: Any) -> Any:
        (found,) = check(self, thresholds)
        told.append(found if told else found * 1.03)
        return [told[-1]]

    monkeypatch.setattr(Evaluator, "check", off)
    monkeypatch.setattr(Evaluator, "refine", lambda self, cuts: refined.append(cuts) or refine(self, cuts))
    found = sparsity_at(attach(checkpoint(5)), windows, 0.1)[1]
    assert (len(told), len(refined)) == (2, 1)
    assert [layer.cett for layer in found.layers] == told[1].tolist() == pytest.approx([0.1] * 2, rel=0.005)


def test_own_is_the_search_of_that_checkpoint(
    tracked: tuple[Path, TrajectoryResult], checkpoint: Callable[..., Any], windows: Any
) -> None:
    own = tracked[1].points[2].own
    alone = cett_ppl_sparsity(checkpoint(3), windows)
    assert (own.cett, own.activation_ratio, own.layers) == (alone.cett, alone.activation_ratio, alone.layers)
    assert (own.reached, own.converged) == (True, alone.converged)


def test_fit_reads_the_folder(tracked: tuple[Path, TrajectoryResult]) -> None:
    folder, result = tracked
    tokens, ratios = read_points(folder)
    assert (tokens.tolist(), ratios.tolist()) == result.curve()
    assert values(TrajectoryResult.load(folder)) == values(result)
    assert {"checkpoint", "tokens", "activation_ratio", "cett", "ppl_dense"} <= set(
        json.loads((folder / "trajectory.json").read_text())["points"][0]
    )


@pytest.mark.usefixtures("last_two")
def test_one_model_in_memory_at_a_time(checkpoint: Callable[..., Any], windows: Any, tmp_path: Path) -> None:
    alive: list[weakref.ref[Any]] = []
    loads: list[int] = []

    def source(n: int) -> Callable[[], Any]:
        def make() -> Any:
            assert not any(ref() is not None for ref in alive), f"checkpoint {loads[-1]} is still in memory"
            loads.append(n)
            model = checkpoint(n)
            alive.append(weakref.ref(model))
            alive.append(weakref.ref(model.original_model))
            if n == 2:
                with torch.no_grad():
                    next(model.original_model.model.layers[0].mlp.parameters()).fill_(math.nan)
            return model

        return make

    result = track([(f"step{n}", source(n)) for n in range(1, 5)], windows, folder=tmp_path, tokens_per_step=1)
    assert sorted(set(loads)) == list(range(1, 5))
    assert loads.count(2) == loads.count(1) == 1  # one is a gap at once, the other is visited once
    assert [gap.checkpoint for gap in result.gaps] == ["step2"]
    gc.collect()
    assert not any(ref() is not None for ref in alive)


@pytest.mark.usefixtures("last_two")
def test_a_checkpoint_that_does_not_load_is_a_gap(seven: Any, windows: Any, tmp_path: Path) -> None:
    def broken() -> Any:
        raise RuntimeError("the disk has died\nat sector 7")

    missing = str(tmp_path / "step2500")
    checkpoints = [seven[0], ("step2000", broken), missing, seven[2], ("step4000", broken)]
    result = track(checkpoints, windows, folder=tmp_path / "run", tokens_per_step=10)
    named = {gap.checkpoint: gap for gap in result.gaps}
    assert set(named) == {"step2000", missing, "step4000"}
    assert "RuntimeError: the disk has died" in named["step2000"].error
    assert named["step2000"].tokens == 20_000
    assert "step2500" in named[missing].error
    # Two are left at the end without the last one.
    assert result.common is not None
    assert result.common.checkpoints == ("step1000", "step3000")
    assert [point.checkpoint for point in result.points] == ["step1000", "step3000"]
    assert read_points(tmp_path / "run").tokens.tolist() == [10_000, 30_000]
    # Once they can be loaded, the gaps are closed, and the result is that of a run that never had any.
    again = track(seven[:4], windows, folder=tmp_path / "run", tokens_per_step=10)
    never = track(seven[:4], windows, tokens_per_step=10)
    assert again.gaps == ()
    assert again.common == never.common
    assert [point.at(again.cett) for point in again.points] == [point.at(never.cett) for point in never.points]


@pytest.mark.usefixtures("last_two")
def test_a_checkpoint_lost_between_two_visits_is_a_gap(seven: Any, windows: Any, tmp_path: Path) -> None:
    calls: list[str] = []

    def once() -> Any:
        calls.append("once")
        if len(calls) > 1:
            raise OSError("gone")
        return seven[2][1]()

    result = track([*seven[:2], ("step3000", once)], windows, folder=tmp_path, tokens_per_step=10)
    assert [gap.checkpoint for gap in result.gaps] == ["step3000"]
    assert "gone" in result.gaps[0].error
    assert result.common is not None
    assert result.common.checkpoints == ("step1000", "step2000")
    assert [point.checkpoint for point in result.points] == ["step1000", "step2000"]
    assert [point.checkpoint for point in result.pending] == ["step3000"]


def test_nothing_that_loads_is_an_error(windows: Any, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"none of the 2 checkpoints can be measured; .*step2.*"):
        track([str(tmp_path / "step1"), str(tmp_path / "step2")], windows, tokens_per_step=10)


def test_other_models_and_tokenizers_are_refused(
    checkpoint: Callable[..., Any], tiny_tokenizer: Any, windows: Any, tmp_path: Path
) -> None:
    first = ("step9", lambda: checkpoint(1))
    with pytest.raises(ValueError, match=r"not of one model: 'step9' has activation silu, not relu"):
        track([("step1", lambda: checkpoint(1, "opt")), first], windows, tokens_per_step=1, cett=0.1)
    other = type(tiny_tokenizer).from_pretrained(tiny_tokenizer.name_or_path)
    other.add_tokens(["Six hundred people"])
    other.save_pretrained(tmp_path / "tokenizer")
    other = type(tiny_tokenizer).from_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="'step9' has another tokenizer"):
        track(
            [("step1", lambda: checkpoint(1, tokenizer=other)), first],
            windows,
            tokens_per_step=1,
            cett=0.1,
            folder=tmp_path / "run",
        )
    # The folder remembers what its checkpoints are.
    with pytest.raises(ValueError, match="not of one model: 'step3' has activation"):
        track(
            [("step3", lambda: checkpoint(1, "opt")), first],
            windows,
            tokens_per_step=1,
            cett=0.1,
            folder=tmp_path / "run",
        )


def test_nothing_is_measured_twice(seven: Any, tracked: tuple[Path, TrajectoryResult], windows: Any) -> None:
    folder, result = tracked

    def refuse() -> Any:
        raise AssertionError("loaded again")

    again = track([(label, refuse) for label, _ in seven], windows, folder=folder, tokens_per_step=10)
    assert values(again) == values(result)


def test_another_question_needs_another_folder(
    seven: Any, tracked: tuple[Path, TrajectoryResult], windows: Any, own_windows: Any, tiny_hf_models: Any
) -> None:
    folder, _ = tracked
    with pytest.raises(RunFolderError, match=r"p_percent: 1\.0, not 5"):
        track(seven, windows, folder=folder, tokens_per_step=10, p_percent=5.0)
    with pytest.raises(RunFolderError, match=r"holds another run .*corpus"):
        track(seven, own_windows(tiny_hf_models("llama"), 8), folder=folder, tokens_per_step=10)


@pytest.mark.usefixtures("last_two")
def test_later_checkpoints_join_an_earlier_run(seven: Any, windows: Any, tmp_path: Path) -> None:
    early = track(seven[:3], windows, folder=tmp_path, tokens_per_step=10)
    assert early.common is not None
    assert early.common.checkpoints == ("step2000", "step3000")
    joined = track(seven[:4], windows, folder=tmp_path, tokens_per_step=10)
    assert joined.common is not None
    assert joined.common.checkpoints == ("step3000", "step4000")
    assert {point.at(joined.cett).cett for point in joined.points} == {joined.cett}
    assert [point.own for point in joined.points[:3]] == [point.own for point in early.points]
    part = track(seven[:3], windows, folder=tmp_path, tokens_per_step=10)
    assert part.common == early.common
    assert [point.checkpoint for point in part.pending] == ["step4000"]


@pytest.mark.usefixtures("last_two")
def test_other_weights_at_a_place_are_measured_anew(
    seven: Any, checkpoint: Callable[..., Any], windows: Any, tmp_path: Path
) -> None:
    early = track(seven[:2], windows, folder=tmp_path, tokens_per_step=10)
    later = track(
        [("step1000", lambda: checkpoint(6)), *seven[1:3]], windows, folder=tmp_path, tokens_per_step=10
    )  # step 3000 moves the common CETT, so that step 1000 is visited again
    first = later.points[0]
    assert first.fingerprint == attach(checkpoint(6)).info.fingerprint != early.points[0].fingerprint
    assert first.ppl_dense == pytest.approx(perplexity(checkpoint(6), windows).ppl, rel=1e-6)
    assert first.own != early.points[0].own
    assert [found.cett for found in first.passes] == [later.cett]
    assert later.points[1].own == early.points[1].own


def test_fewer_than_five_and_a_given_cett(seven: Any, windows: Any) -> None:
    few = track(seven[:1], windows, tokens_per_step=10)
    assert few.common is not None
    assert few.common.checkpoints == ("step1000",)
    given = track(seven[:1], windows, tokens_per_step=10, cett=0.2)
    assert given.common is not None
    assert (given.cett, given.common.given, given.common.checkpoints) == (0.2, True, ())
    assert all(point.at(0.2).cett == 0.2 for point in given.points)
    assert [point.own for point in given.points] == [point.own for point in few.points]


def test_an_untrained_model_is_apart(seven: Any, checkpoint: Callable[..., Any], windows: Any, tmp_path: Path) -> None:
    result = track([("step0", lambda: checkpoint(0)), seven[0]], windows, folder=tmp_path, tokens_per_step=10, cett=0.1)
    assert [point.tokens for point in result.points] == [0, 10_000]
    assert result.curve()[0] == [10_000]
    assert read_points(tmp_path).tokens.tolist() == [10_000]
    assert values(TrajectoryResult.load(tmp_path)) == values(result)


def test_windows_are_cut_with_the_tokenizer_of_the_last_that_loads(seven: Any, tiny_text: str, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text(tiny_text, encoding="utf-8")

    def broken() -> Any:
        raise RuntimeError("no")

    result = track([seven[0], ("step9000", broken)], tmp_path / "page.txt", tokens_per_step=10, cett=0.1)
    assert result.corpus["name"] == "page.txt"
    assert len(result.points) == len(result.gaps) == 1


def test_bad_arguments(seven: Any, windows: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="p must be a positive number"):
        track(seven, windows, tokens_per_step=10, p_percent=0)
    with pytest.raises(ValueError, match=r"cett must be in \[1e-06, 1\]"):
        track(seven, windows, tokens_per_step=10, cett=1.5)
    with pytest.raises(ValueError, match="dtype"):
        track(seven, windows, tokens_per_step=10, dtype="int8")
    with pytest.raises(TypeError, match="corpus must be"):
        track(seven, 7, tokens_per_step=10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training tokens of checkpoint 'step1000' are not known"):
        track(seven, windows)


def test_a_damaged_trajectory_is_told(seven: Any, windows: Any, tmp_path: Path) -> None:
    track(seven[:1], windows, folder=tmp_path, tokens_per_step=10, cett=0.1)
    path = tmp_path / "trajectory.json"
    data = json.loads(path.read_text())
    data["points"][0]["passes"][0]["cett"] = "much"
    path.write_text(json.dumps(data))
    with pytest.raises(RunFolderError, match=r"trajectory.json is damaged .*cett"):
        track(seven[:1], windows, folder=tmp_path, tokens_per_step=10, cett=0.1)


def test_the_joint_search_finds_the_mean() -> None:
    """Three checkpoints whose rise is known exactly: the answer can be computed."""
    own, costs = {"a": 0.05, "b": 0.1, "c": 0.2}, []

    def rise(label: str, cett: float) -> float:
        return 1.0 * (cett / own[label]) ** 2.3

    def measure(label: str, cett: float) -> Any:
        costs.append(label)
        return at(cett, rise(label, cett))

    def at(cett: float, percent: float) -> Any:
        return SparsityAt(cett, 0.5, percent, percent / 100, (), None)

    found = common_cett(list(own), [at(e, 1.0) for e in own.values()], 1.0, 10_000, measure)
    exact = (3 / sum(e**-2.3 for e in own.values())) ** (1 / 2.3)
    assert found.cett == pytest.approx(exact, rel=0.03)
    assert np.mean([rise(label, found.cett) for label in own]) == pytest.approx(found.ppl_increase_percent)
    assert abs(found.ppl_increase_percent - 1) <= found.tolerance_percent
    assert len(costs) == 3 * len(found.evaluations) <= 9


def test_a_rise_that_no_cett_reaches_is_said() -> None:
    def measure(label: str, cett: float) -> Any:
        return SparsityAt(cett, 0.5, 0.01 * cett, 0.0, (), None)

    found = common_cett(["a", "b"], [measure("a", 1.0)] * 2, 1.0, 10_000, measure)
    assert (found.reached, found.converged, found.cett) == (False, False, 1.0)
