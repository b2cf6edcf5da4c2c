"""The packed table of all neurons: what the page's script reads is what was measured; what does not fit is told."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.report_page import synthetic_saliency, synthetic_statistics
from neuron_sparsity.kernels import histogram_edges
from neuron_sparsity.report import _classes as classes
from neuron_sparsity.report import report
from neuron_sparsity.report._explorer import KINDS, explorer
from neuron_sparsity.report._packed import Packed, asinh_codes, log_codes, unpack
from neuron_sparsity.report.views import neuron_table
from neuron_sparsity.taxonomy import atlas as taxonomy_atlas
from neuron_sparsity.taxonomy.classes import CLASSES
from tests.report.conftest import Run, make_atlas, make_run

MB = 1_000_000


def unpacked(run: Run, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    active = classes.activity(run.stats, run.result)
    return unpack(explorer(run.stats, active, run.removed, **options).text)


def decoded(header: dict[str, Any], sections: dict[str, np.ndarray], key: str) -> np.ndarray:
    """As the page's script decodes it."""
    column = next(column for column in header["columns"] if column["key"] == key)
    codes = sections[key].astype(np.float64)
    place = column["low"] + (codes - 1) / 65_533 * (column["high"] - column["low"])
    values = np.exp(place) if column["scale"] == "log" else column["step"] * np.sinh(place)
    if column["scale"] == "log":
        values[codes == 0] = 0.0
    values[codes == 65_535] = np.nan
    return values


def test_numbers_come_back_within_what_the_page_says(run: Run) -> None:
    header, sections = unpacked(run)
    stats, active = run.stats, classes.activity(run.stats, run.result)
    mean = (stats.contribution_sum / stats.n_tokens).numpy()
    expected = {
        "frequency": active.frequency,
        "mean": mean,
        "largest": stats.contribution_max.numpy(),
        "share": mean / mean.sum(axis=1, keepdims=True),
    }
    assert [column["key"] for column in header["columns"]] == list(expected)
    for key, values in expected.items():
        np.testing.assert_allclose(decoded(header, sections, key), values.ravel(), rtol=5e-4, err_msg=key)
    counts = classes.class_counts(active)
    totals = [int(counts.dead.sum()), int(counts.rare.sum()), int(counts.alive.sum()), int(counts.always_on.sum())]
    assert np.bincount(sections["class"], minlength=4).tolist() == totals
    assert min(totals) > 0


def test_examples_come_back_token_by_token(run: Run) -> None:
    header, sections = unpacked(run)
    stats, chosen = run.stats, sections["chosen"]
    assert chosen.tolist() == list(range(192))
    shape = (192, header["examples"]["count"], header["examples"]["context"])
    codes = sections["example_token"].reshape(shape)
    expected = stats.example_context.numpy().reshape(shape)
    there = stats.example_position.numpy().reshape(shape[:2]) >= 0
    for index in np.ndindex(*shape):
        wanted = int(expected[index])
        if wanted < 0 or not there[index[:2]]:
            assert codes[index] == 0
        else:
            shown = stats.token_strings[wanted].replace(" ", "·").replace("\n", "↵")
            assert header["strings"][codes[index] - 1] == shown
    position = sections["example_window"].astype(int) * 512 + sections["example_pos"]
    np.testing.assert_array_equal(position[there.ravel()], stats.example_position.numpy().ravel()[there.ravel()])
    assert (sections["example_value"].reshape(shape[:2])[~there] == 65_535).all()


def test_histograms_come_back_with_their_edges(run: Run) -> None:
    header, sections = unpacked(run, thresholds=[0.1, 0.2, 0.3, float("inf")])
    bins, edges = header["histogram"]["bins"], header["histogram"]["edges"]
    histogram = run.stats.histogram.numpy().reshape(192, 64)
    used = np.flatnonzero(histogram.any(axis=0))
    kept = [0, *range(used[1], used[-1] + 1)]
    every = histogram_edges().tolist()
    assert edges == [*(every[place] for place in kept), every[kept[-1] + 1]]
    assert 20 < bins < 60
    back = np.expm1(sections["histogram"].reshape(192, bins) / 255 * np.log1p(run.stats.n_tokens))
    np.testing.assert_allclose(back, histogram[:, kept], rtol=0.025, atol=0.03)
    assert header["histogram"]["thresholds"] == [0.1, 0.2, 0.3, None]


def test_removal_says_in_which_place_a_neuron_goes(run: Run) -> None:
    _, sections = unpacked(run)
    for place, (layer, neuron) in enumerate(run.removed.removable, start=1):
        assert sections["removal"][layer * 48 + neuron] == place
    assert (sections["removal"] > 0).sum() == run.removed.n_removable


@pytest.mark.parametrize("replacement", ["mean", "zero", "resample"])
def test_gradients_predict_what_each_neuron_alone_costs(run: Run, replacement: str) -> None:
    run.removed.replacement = replacement
    saliency = synthetic_saliency(run.stats)
    header, sections = unpacked(run, saliency=saliency)
    place = 0.0 if replacement == "zero" else saliency.activation_sum / 4096
    fisher = saliency.product_sq_sum - 2 * place * saliency.product_gradient_sum + place**2 * saliency.gradient_sq_sum
    nats = (place * saliency.gradient_sum - saliency.product_sum + fisher.clamp_min(0) / 2) / 4088
    assert nats.min() < -1e-4
    assert nats.max() > 1e-2
    np.testing.assert_allclose(decoded(header, sections, "rise"), nats.ravel(), rtol=5e-4, atol=1e-8)
    html = neuron_table(run.stats, run.result, run.removed, saliency=saliency)
    said = "predicted from gradients (first order, and half the Fisher information for the second) on 4,096 tokens of "
    assert f"{said}speeches for ranking, with " in html
    assert f"with {'zero' if replacement == 'zero' else 'its mean'} in its place on every token" in html


def test_gradients_of_other_neurons_are_refused(run: Run) -> None:
    other = synthetic_saliency(make_run(d_mlp=40).stats)
    with pytest.raises(ValueError, match=r"the saliency is of \[4, 40\] neurons, the statistics of \[4, 48\]"):
        neuron_table(run.stats, saliency=other)
    with pytest.raises(ValueError, match="the statistics and the NeuronSaliency come from different models"):
        report(run.stats, saliency=other)


def test_a_prediction_beyond_all_bounds_is_a_number(run: Run) -> None:
    saliency = synthetic_saliency(run.stats)
    saliency.product_sum[0, :2] = torch.tensor([-1e300, 1e300], dtype=torch.float64)
    header, sections = unpacked(run, saliency=saliency)
    found = decoded(header, sections, "rise")
    np.testing.assert_allclose(found[:2], [1e300 / 4088, -1e300 / 4088], rtol=1e-3)
    assert np.isfinite(found).all()


def test_an_atlas_is_shown_as_far_as_it_goes(run: Run) -> None:
    atlas = make_atlas(run.stats)
    header, sections = unpacked(run, atlas=atlas)
    kinds = np.array([[bool(code >> bit & 1) for bit in range(len(KINDS))] for code in sections["kind"]])
    np.testing.assert_array_equal(kinds[:, 0], atlas["is_token_detector"])
    np.testing.assert_array_equal(kinds[:, 1], atlas["ngram"] == 2)
    np.testing.assert_array_equal(kinds[:, 3], atlas["is_positional"])
    np.testing.assert_array_equal(kinds[:, 6], atlas["logit_role"] == "partition")
    for key in ("position_information_bits", "logit_skew", "logit_kurtosis", "n_triggers"):
        np.testing.assert_allclose(decoded(header, sections, key), atlas[key], rtol=1e-3, atol=1e-3, err_msg=key)
    top = sections["top_logit_tokens"].reshape(192, 10)
    assert header["strings"][top[7, 3] - 1] == "·up7.3"
    header, sections = unpacked(run, atlas=atlas[["layer", "neuron", "triggers"]])
    assert list(header["lists"]) == ["triggers"]
    assert "kind" not in sections


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda atlas: atlas.drop(columns="layer"), "has no layer"),
        (lambda atlas: atlas[:-1], "the atlas has 191 rows, the statistics 192 neurons"),
        (lambda atlas: atlas[::-1], "not ordered by layer and neuron"),
    ],
)
def test_an_atlas_of_other_neurons_is_refused(run: Run, change: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        report(run.stats, atlas=change(make_atlas(run.stats)))


def test_an_atlas_object_is_taken_by_its_table(run: Run) -> None:
    atlas = make_atlas(run.stats)
    assert neuron_table(run.stats, atlas=SimpleNamespace(table=atlas)) == neuron_table(run.stats, atlas=atlas)


def test_classes_are_those_of_an_atlas_of_the_same_statistics(run: Run) -> None:
    above = (run.stats.above_count.flatten() // 8)[None, :, None].repeat(2, 1, 1)  # just beside where classes begin
    stats = replace(synthetic_statistics(2, 192, n_tokens=2048, n_vocab=50), above_count=above)
    table = taxonomy_atlas(stats).table
    _, sections = unpack(explorer(stats, classes.activity(stats)).text)
    assert np.array(CLASSES)[sections["class"]].tolist() == table["class"].tolist()
    assert table["class"].nunique() == 4


def test_an_atlas_that_counts_otherwise_is_said(run: Run) -> None:
    atlas = SimpleNamespace(table=make_atlas(run.stats), model=run.stats.model, watched=None)
    atlas.definitions = {"active": "contribution >= the layer's CETT-PPL-1% threshold", "classes": "dead: unlike here"}
    html = neuron_table(run.stats, run.result, atlas=atlas)
    assert "<dt>active, for triggers and positions</dt><dd>contribution &gt;= the layer" in html
    assert "unlike here" not in html
    assert "the classes count otherwise" not in html
    atlas.definitions["active"] = "post-activation is not exactly zero"
    assert "not exactly zero; the classes count otherwise</dd>" in neuron_table(run.stats, run.result, atlas=atlas)


def test_an_atlas_says_what_it_was_measured_on(run: Run) -> None:
    watched = {"name": "<b>speeches", "n_tokens": 4096}
    parts = {"table": make_atlas(run.stats), "model": run.stats.model, "watched": watched}
    atlas = SimpleNamespace(**parts, definitions={"triggers": "at most 5 cover <95 %"})
    html = report(run.stats, atlas=atlas).html
    assert "<dt>triggers</dt><dd>at most 5 cover &lt;95 %</dd>" in html
    assert "<dd>&lt;b&gt;speeches, 4,096 tokens</dd>" in html
    atlas.model = SimpleNamespace(**{**vars(run.stats.model), "fingerprint": "other"})
    with pytest.raises(ValueError, match="different models: fingerprint c0ffee and other"):
        report(run.stats, atlas=atlas)


def test_examples_are_chosen_from_every_layer_and_those_asked_for_are_among_them(full_run: Run) -> None:
    active = classes.activity(full_run.stats, full_run.result)
    found = explorer(full_run.stats, active)
    _, sections = unpack(found.text)
    chosen = sections["chosen"]
    per_layer = np.bincount(chosen // 1536, minlength=30)
    assert found.n_chosen == len(np.unique(chosen)) == per_layer.sum() < 46_080
    assert per_layer.min() > 0.7 * per_layer.max() > 100
    mean, largest = full_run.stats.contribution_sum.numpy(), full_run.stats.contribution_max.numpy()
    for score in (mean, np.where(mean > 0, largest / np.maximum(mean, 1e-30), 0)):
        best = np.argsort(-score, axis=1)[:, :30] + 1536 * np.arange(30)[:, None]
        assert np.isin(best, chosen).all()
    outside = int(np.setdiff1d(np.arange(46_080), chosen)[1000])
    asked = explorer(full_run.stats, active, neurons=[divmod(outside, 1536)])
    assert outside in unpack(asked.text)[1]["chosen"]
    assert asked.n_chosen == found.n_chosen


def test_a_neuron_that_is_not_there_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="there is no neuron 4:0; layers are 0 to 3, neurons 0 to 47"):
        report(run.stats, neurons=[(4, 0)])
    with pytest.raises(ValueError, match="there is no neuron 0:48"):
        report(run.stats, neurons=[(0, 48)])


def test_a_run_without_examples_or_thresholds_has_its_table(run: Run) -> None:
    run.stats.example_value = run.stats.example_value[:, :, :0]
    run.stats.example_position = run.stats.example_position[:, :, :0]
    run.stats.example_context = run.stats.example_context[:, :, :0]
    run.stats.threshold_names, run.stats.thresholds = (), run.stats.thresholds[:, :0]
    run.stats.above_count = run.stats.above_count[:, :, :0]
    header, sections = unpack(explorer(run.stats, classes.activity(run.stats)).text)
    assert header["examples"]["count"] == 0
    assert sections["example_token"].size == 0
    assert "All 192 neurons" in report(run.stats).html


def test_what_does_not_fit_a_section_is_refused() -> None:
    with pytest.raises(ValueError, match="n has values outside u1: 0 to 256"):
        Packed().add("n", np.array([0, 256]), "u1")
    with pytest.raises(ValueError, match="needs values >= 0"):
        log_codes(np.array([-1.0, 1.0]), 65_534)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [np.nan], [3.0], [1e-30, 1e30, np.inf]])
def test_codes_of_few_or_strange_values(values: list[float]) -> None:
    for encode in (log_codes, asinh_codes):
        codes, *ends = encode(np.array(values), 65_534)
        assert np.isfinite(ends).all()
        assert ((codes == 65_535) == ~np.isfinite(values)).all()


def test_the_page_of_30_layers_stays_under_6_mb(full_run: Run) -> None:
    parts = {"passage": full_run.passage, "atlas": make_atlas(full_run.stats)}
    parts |= {"saliency": synthetic_saliency(full_run.stats)}
    html = report(full_run.stats, full_run.result, full_run.removed, **parts).html
    assert 2 * MB < len(html.encode()) < 6 * MB


def test_a_page_of_random_text_stays_under_6_mb() -> None:
    """Text that deflate gains least from: tokens of a large vocabulary, independent of each other."""
    stats = synthetic_statistics(30, 1536)
    html = report(stats, saliency=synthetic_saliency(stats), atlas=make_atlas(stats)).html
    assert len(html.encode()) < 6 * MB


@pytest.mark.slow
def test_the_page_of_32_layers_of_14336_stays_under_15_mb() -> None:
    stats = synthetic_statistics(32, 14_336, n_vocab=128_256)
    atlas = make_atlas(stats, n_texts=5_000)
    html = report(stats, saliency=synthetic_saliency(stats), atlas=atlas).html
    assert len(html.encode()) < 15 * MB
    assert "458,752" in html
    said = re.search(r"are in this page for ([\d,]+) neurons", html)
    assert said is not None
    assert int(said[1].replace(",", "")) > 5_000


def test_the_same_run_gives_the_same_table() -> None:
    first, second = make_run(), make_run()
    assert neuron_table(first.stats, first.result) == neuron_table(second.stats, second.result)
