"""What is given to a function is checked where it enters: one line, with what mends it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import neuron_sparsity as ns
from neuron_sparsity.truncation import _thresholds

MAKES_WINDOWS = 'ns.load_corpus("sotu", model) makes windows'


@pytest.fixture(scope="module")
def case(tiny_bridge: Callable[..., Any], sample_tokens: Callable[..., Any]) -> SimpleNamespace:
    model = tiny_bridge("llama")
    tokens = sample_tokens(model, 4, window=16)
    scored = torch.ones(tokens.shape, dtype=torch.bool)
    scored[:, 0] = False
    windows = ns.Windows(tokens, scored, "own", ("d",) * 4, "apart", bos=True)
    adapter = ns.attach(model)
    stats = ns.record(adapter, windows, thresholds={"half": [0.5, 0.5]})
    return SimpleNamespace(model=model, adapter=adapter, windows=windows, stats=stats, ranking=ns.rank(stats))


@pytest.fixture(scope="module")
def result(case: SimpleNamespace) -> Any:
    return ns.cett_ppl_sparsity(case.adapter, case.windows, p_percent=10.0)


def refusal(call: Callable[[], Any], kind: type[Exception] = TypeError) -> str:
    """Return the one line that a call is refused with."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "shown"),
    [("sotu", "'sotu'"), (torch.zeros(2, 4), "Tensor"), ([1, 2], "list"), (None, "None")],
    ids=["name", "tensor", "list", "nothing"],
)
def test_what_is_no_windows(case: SimpleNamespace, given: Any, shown: str) -> None:
    expected = f"windows must be Windows, got {shown}; {MAKES_WINDOWS}"
    neurons, cuts = [(0, 1)], [0.1, 0.1]
    for call in (
        lambda: ns.record(case.adapter, given),
        lambda: ns.perplexity(case.adapter, given),
        lambda: ns.saliency(case.adapter, given),
        lambda: ns.neuron_activations(case.adapter, given, neurons),
        lambda: ns.token_activity(case.adapter, given, cuts),
        lambda: ns.cett_ppl_sparsity(case.adapter, given),
        lambda: ns.removable_neurons(case.adapter, given, case.ranking),
        lambda: ns.damage(case.adapter, given, neurons),
        lambda: ns.refine(case.adapter, given, n_remove=2),
        lambda: ns.pareto(case.adapter, given),
    ):
        assert refusal(call) == expected


def test_further_windows_go_by_their_own_name(case: SimpleNamespace) -> None:
    for name in ("heldout", "ranked_on"):
        call = lambda name=name: ns.removable_neurons(case.adapter, case.windows, case.ranking, **{name: "sotu"})  # noqa: E731
        assert refusal(call) == f"{name} must be Windows, got 'sotu'; {MAKES_WINDOWS}"
    said = refusal(lambda: ns.cett_ppl_sparsity(case.adapter, case.windows, calibration="sotu"))
    assert said == f"calibration must be Windows, got 'sotu'; {MAKES_WINDOWS}"


def other_windows(n_pos: int, token: int) -> ns.Windows:
    tokens = torch.full((2, n_pos), token, dtype=torch.int32)
    scored = torch.ones(tokens.shape, dtype=torch.bool)
    scored[:, 0] = False
    return ns.Windows(tokens, scored, "other", ("a", "b"), "apart", bos=False)


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        (other_windows(16, 300), "hold token 300, and tiny-llama-test has tokens 0 to 299; "),
        (other_windows(65, 3), "are 65 tokens long, and tiny-llama-test takes 64; "),
    ],
    ids=["vocabulary", "context"],
)
def test_windows_of_another_model(case: SimpleNamespace, windows: ns.Windows, said: str) -> None:
    expected = said + "make them for this model: ns.load_corpus(source, model)"
    for call in (
        lambda: ns.record(case.adapter, windows),
        lambda: ns.perplexity(case.adapter, windows),
        lambda: ns.saliency(case.adapter, windows),
        lambda: ns.neuron_activations(case.adapter, windows, [(0, 1)]),
        lambda: ns.rank(case.adapter, windows, per_token=True),
    ):
        assert refusal(call, ValueError) == "windows " + expected
    removing = lambda: ns.removable_neurons(case.adapter, case.windows, case.ranking, heldout=windows)  # noqa: E731
    assert refusal(removing, ValueError) == "heldout " + expected
    with pytest.raises(ValueError, match="^corpus " + re.escape(said)):
        ns.ablate(case.adapter, [(0, 1)], replacement="mean", corpus=windows).__enter__()


def test_windows_that_just_fit(case: SimpleNamespace) -> None:
    assert ns.perplexity(case.adapter, other_windows(64, 299)).n_scored == 126


@pytest.mark.parametrize("given", ["fisher", [0.1], torch.zeros(2, 64)], ids=["name", "list", "tensor"])
def test_what_is_no_ranking(case: SimpleNamespace, given: Any) -> None:
    said = refusal(lambda: ns.removable_neurons(case.adapter, case.windows, given))
    assert said.startswith("ranking must be a Ranking, got ")
    assert said.endswith("; ns.rank(stats), or ns.rank(ns.saliency(model, corpus)), makes one")
    assert "got NeuronStatistics; " in refusal(lambda: ns.removable_neurons(case.adapter, case.windows, case.stats))


def test_what_is_no_result(case: SimpleNamespace, result: Any) -> None:
    made = "ns.cett_ppl_sparsity(model, corpus) makes one"
    said = f"result must be a SparsityResult, got NeuronStatistics; {made}"
    assert refusal(lambda: ns.sparsify(case.adapter, case.stats).__enter__()) == said
    assert refusal(lambda: ns.token_activity(case.adapter, case.windows, case.stats)) == said
    said = f"result must be a SparsityResult or one threshold a layer, got 0.5; {made}"
    assert refusal(lambda: ns.sparsify(case.adapter, 0.5).__enter__()) == said
    assert "got Tensor; " in refusal(lambda: _thresholds(torch.zeros(2, 3), 2))
    assert refusal(lambda: ns.apply_thresholds(case.model, [0.1, 0.1]).__enter__()).startswith("result must be a Spa")
    assert _thresholds(torch.tensor([0.5, 0.25]), 2) == [0.5, 0.25]
    with ns.sparsify(case.adapter, result):
        pass


def test_the_parts_of_a_report(case: SimpleNamespace, result: Any) -> None:
    stats = case.stats
    for call, said in (
        (lambda: ns.report(stats, stats), "result must be a SparsityResult, got NeuronStatistics; give it as stats="),
        (lambda: ns.report(result), "stats must be a NeuronStatistics, got SparsityResult; give it as result="),
        (
            lambda: ns.report(stats, result, case.ranking),
            "removed must be an AblationResult, got Ranking; ns.removable_neurons(model, corpus, ranking) makes one",
        ),
        (lambda: ns.report(stats, passage=result), "passage must be a TokenActivity, got SparsityResult; "),
        (lambda: ns.report(stats, saliency=3), "saliency must be a NeuronSaliency, got 3; ns.saliency(model, corpus) "),
        (lambda: ns.report(stats, atlas={}), "atlas must be an Atlas or DataFrame, got dict; ns.atlas(stats) makes "),
        (lambda: ns.viz.topk(case.ranking), "ranking must be a TokenRanking, got Ranking; ns.rank(model, corpus, per"),
        (lambda: ns.viz.removal_curve(result), "removed must be an AblationResult, got SparsityResult; "),
        (lambda: ns.viz.cett_curves(stats), "result must be a SparsityResult, got NeuronStatistics; "),
        (lambda: ns.classify(case.model), "stats must be a NeuronStatistics, got TransformerBridge; ns.record(mod"),
    ):
        assert refusal(call).startswith(said), said


def test_names_where_objects_are_due(tmp_path: Path, case: SimpleNamespace) -> None:
    expected = "config must be a StudyConfig, got 'tiny'; ns.load_config(\"tiny\") makes one"
    assert refusal(lambda: ns.study("tiny", tmp_path)) == expected  # type: ignore[arg-type]
    assert refusal(lambda: ns.plan(case.model)).startswith("model must be a name, a folder or a .gguf file, got Transf")
    assert refusal(lambda: ns.attach("demo-relu")).endswith("got 'demo-relu'; ns.load_model(name) makes one")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (5.0, "p_percents must be several numbers of percent, such as (1.0, 5.0), got 5.0"),
        ("5", "p_percents must be several numbers of percent, such as (1.0, 5.0), got '5'"),
        (None, "p_percents must be several numbers of percent, such as (1.0, 5.0), got None"),
        (np.array(5.0), "p_percents must be several numbers of percent, such as (1.0, 5.0), got ndarray"),
        (("1", "5"), "p_percents must be several numbers of percent, such as (1.0, 5.0), got '1' among them"),
        ((1.0, None), "p_percents must be several numbers of percent, such as (1.0, 5.0), got None among them"),
        ((1.0, True), "p_percents must be several numbers of percent, such as (1.0, 5.0), got True among them"),
        (np.array([]), "p_percents is empty; p_percents must hold at least one p, such as (1.0,)"),
        (np.array([1.0, -1.0]), "p must be a positive number of percent, got -1.0"),
    ],
)
def test_p_percents(given: Any, said: str, case: SimpleNamespace) -> None:
    for call in (
        lambda: ns.removable_sets(case.adapter, case.windows, case.ranking, p_percents=given),
        lambda: ns.cett_ppl_sparsities(case.adapter, case.windows, p_percents=given),
        lambda: ns.pareto(case.adapter, case.windows, p_percents=given),
    ):
        assert refusal(call, Exception) == said


def test_p_percents_that_are_no_list(case: SimpleNamespace) -> None:
    expected = ns.removable_sets(case.adapter, case.windows, case.ranking, p_percents=(2.0, 20.0), n_controls=0)
    for given in (np.array([2, 20]), torch.tensor([2.0, 20.0]), (p for p in (2.0, 20.0))):
        found = ns.removable_sets(case.adapter, case.windows, case.ranking, p_percents=given, n_controls=0)
        assert [result.p_percent for result in found] == [2.0, 20.0]
        assert [result.removable for result in found] == [result.removable for result in expected]


def test_means_and_thresholds(case: SimpleNamespace) -> None:
    ablating = ns.ablate(case.adapter, [(0, 1)], replacement="mean", means=[0.0])  # type: ignore[arg-type]
    expected = "means must be a tensor [layer, neuron], got list; stats.mean_activation is one"
    assert refusal(lambda: ablating.__enter__()) == expected
    for bad in (float("nan"), float("inf")):
        means = torch.zeros(case.adapter.info.n_layers, case.adapter.info.d_mlp)
        means[0, 1] = bad
        ablating = ns.ablate(case.adapter, [(0, 1)], means=means)
        assert refusal(ablating.__enter__, ValueError) == "means are NaN or infinite; record the model again"
    record: Any = ns.record
    said = refusal(lambda: record(case.adapter, case.windows, thresholds=[0.1, 0.1]))
    assert said == "thresholds must be sets by name, {result.name: result.thresholds}, got list"
    said = refusal(lambda: record(case.adapter, case.windows, thresholds={"half": 0.5}))
    assert said == "thresholds 'half' must be 2 numbers, one a layer, got 0.5"


@pytest.fixture
def dropping(tiny_bridge: Callable[..., Any]) -> Iterator[Any]:
    model = tiny_bridge("gpt2")
    yield model
    model.eval()


def test_dropout_in_training_mode(dropping: Any, case: SimpleNamespace) -> None:
    adapter = ns.attach(dropping)
    dropping.train()
    for call in (lambda: ns.attach(dropping), lambda: ns.perplexity(adapter, case.windows)):
        said = refusal(call, ns.ModelError)
        assert re.fullmatch(
            r"the model is in training mode and \S+ drops activations at random; call model.eval\(\)", said
        )
    dropping.eval()
    assert ns.perplexity(adapter, case.windows) == ns.perplexity(dropping, case.windows)


def test_training_mode_without_dropout(tiny_bridge: Callable[..., Any], case: SimpleNamespace) -> None:
    model = tiny_bridge("llama").train()
    assert ns.perplexity(model, case.windows).ppl == pytest.approx(ns.perplexity(case.adapter, case.windows).ppl)


def test_what_load_corpus_is_given(case: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The harbour was quiet when the ships came in. " * 20, encoding="utf-8")
    options: dict[str, Any] = {"n_tokens": 64, "n_ctx": 32}
    through = ns.load_corpus(path, case.adapter, **options)
    assert through.sha256 == ns.load_corpus(path, case.model, **options).sha256
    said = "model must be a model, got the name 'demo-relu'; ns.load_model('demo-relu') loads one"
    assert refusal(lambda: ns.load_corpus("sotu", "demo-relu")) == said
    said = "load_corpus takes the text first and then the model: load_corpus('sotu', model)"
    assert refusal(lambda: ns.load_corpus(case.model, "sotu")) == said


def test_the_same_weights_in_another_type(case: SimpleNamespace, result: Any, tiny_hf_models: Any) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = tiny_hf_models("llama").to(torch.bfloat16)
    rounded = TransformerBridge.boot_transformers(
        "tiny-llama-test", hf_model=hf_model, tokenizer=case.model.tokenizer, dtype=torch.bfloat16
    ).eval()
    how = "was measured on tiny-llama-test in float32, and this model is in bfloat16; measure this model first"
    assert refusal(lambda: ns.sparsify(rounded, result).__enter__(), ValueError) == f"the result {how}"


def test_types_and_devices_as_torch_has_them() -> None:
    model = ns.load_model("demo-relu", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert ns.attach(model).info.dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got 'float64'"):
        ns.load_model("demo-relu", dtype=torch.float64)


def test_folders_that_are_missing(case: SimpleNamespace, tmp_path: Path) -> None:
    page = ns.report(case.stats)
    said = refusal(lambda: page.save(tmp_path / "nodir" / "r.html"), ns.RunFolderError)
    assert said == f"folder {tmp_path / 'nodir'} does not exist; make it, or save the page elsewhere"
    case.stats.save(tmp_path / "new" / "folder")
    assert ns.NeuronStatistics.load(tmp_path / "new" / "folder").corpus == case.stats.corpus
