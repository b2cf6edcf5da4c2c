"""Downstream tasks: the dense scores are lm-eval's own, changes are what they claim, and nothing is left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import random
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neuron_sparsity import downstream
from neuron_sparsity.ablation import AblationResult, removable_neurons
from neuron_sparsity.downstream import DownstreamResult, evaluate
from neuron_sparsity.errors import CorpusError
from neuron_sparsity.ranking import rank
from neuron_sparsity.recorder import record
from neuron_sparsity.sparsity import SparsityResult, cett_ppl_sparsity
from neuron_sparsity.store import to_json_text

pytest.importorskip("lm_eval", reason='needs the extra eval: pip install -e ".[eval]"')
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TASK = "everyday_choices"
ITEMS = 24


@pytest.fixture(scope="module")
def case(tiny_bridge: Any, tiny_hf_models: Any, tiny_tokenizer: Any, own_windows: Any) -> SimpleNamespace:
    bridge = tiny_bridge("gpt2")
    windows = own_windows(bridge, 8)
    stats = record(bridge, windows)
    result = cett_ppl_sparsity(bridge, windows, p_percent=10.0, tolerance_percent=5.0)
    removed = removable_neurons(bridge, windows, rank(stats), p_percent=20.0)
    return SimpleNamespace(
        bridge=bridge,
        hf=tiny_hf_models("gpt2"),
        tokenizer=tiny_tokenizer,
        stats=stats,
        result=result,
        removed=removed,
        options={"limit": ITEMS},
    )


def cutting(result: SparsityResult, threshold: float) -> SparsityResult:
    layers = tuple(dataclasses.replace(layer, threshold=threshold) for layer in result.layers)
    return dataclasses.replace(result, layers=layers)


def own_scores(case: SimpleNamespace, model: Any) -> dict[str, float]:
    """What lm-eval says by itself."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(downstream._TASKS), include_defaults=False)
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=copy.deepcopy(case.tokenizer), batch_size=16),
        tasks=[TASK],
        task_manager=manager,
        limit=ITEMS,
    )
    return dict(found["results"][TASK])


def test_dense_scores_are_those_of_lm_eval_alone(case: SimpleNamespace) -> None:
    found = evaluate(case.hf, case.tokenizer, TASK, **case.options).dense
    expected = own_scores(case, case.hf)
    for metric in ("acc", "acc_norm"):
        score = found.score(TASK, metric)
        assert (score.value, score.stderr) == (expected[f"{metric},none"], expected[f"{metric}_stderr,none"])
        assert (score.difference, score.difference_stderr, score.lost, score.gained, score.p_value) == (0, 0, 0, 0, 1)
        assert score.n == ITEMS


def test_thresholds_of_zero_change_nothing_and_cutting_everything_leaves_the_biases(case: SimpleNamespace) -> None:
    changes = {"nothing": cutting(case.result, 0.0), "everything": cutting(case.result, 1e30)}
    found = evaluate(case.hf, case.tokenizer, TASK, results=changes, **case.options)
    dense, nothing, everything = found.forms
    assert nothing.scores == dense.scores
    assert nothing.activation_ratio == 1.0
    assert everything.activation_ratio == 0.0
    without = copy.deepcopy(case.hf)
    for layer in without.transformer.h:
        layer.mlp.c_proj.weight.zero_()
    assert everything.score(TASK).value == own_scores(case, without)["acc,none"]
    lost, gained = everything.score(TASK).lost, everything.score(TASK).gained
    assert lost is not None
    assert gained is not None
    assert lost + gained > 0, "a change that changes no answer proves nothing"
    assert everything.score(TASK).difference == pytest.approx((gained - lost) / ITEMS)


@pytest.mark.parametrize("replacement", ["mean", "zero"])
def test_a_removal_is_the_edited_model(case: SimpleNamespace, replacement: str) -> None:
    every = tuple((layer, neuron) for layer in range(2) for neuron in range(0, 64, 2))
    removed = dataclasses.replace(case.removed, removable=every, n_removable=64, replacement=replacement)
    means = case.stats.mean_activation
    found = evaluate(case.hf, case.tokenizer, TASK, results=[removed], means=means, **case.options)
    edited = copy.deepcopy(case.hf)
    for layer, neuron in every:
        projection = edited.transformer.h[layer].mlp.c_proj
        if replacement == "mean":
            projection.bias += means[layer, neuron].float() * projection.weight[neuron]
        projection.weight[neuron] = 0
    assert found.forms[1].name == "64 neurons removed"
    assert found.forms[1].score(TASK).value == own_scores(case, edited)["acc,none"]
    assert found.forms[1].scores != found.dense.scores


def test_a_bridge_gives_what_its_plain_model_gives(case: SimpleNamespace) -> None:
    plain = evaluate(case.hf, case.tokenizer, TASK, results=[case.result], **case.options)
    wrapped = evaluate(case.bridge, case.tokenizer, TASK, results=[case.result], limit=ITEMS)
    assert wrapped.forms == plain.forms
    assert wrapped.model == {"name": case.result.model.name, "fingerprint": case.result.model.fingerprint}


def test_nothing_is_left_behind(case: SimpleNamespace, hooks_on: Any) -> None:
    logger, pad = logging.getLogger("lm_eval"), case.tokenizer.pad_token
    case.hf.train()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002
    before = (hooks_on(case.hf), logger.level, random.getstate(), np.random.get_state()[2])  # noqa: NPY002
    state = torch.get_rng_state()

    @contextmanager
    def failing(model: Any) -> Any:
        raise KeyError("on purpose")
        yield

    for results, error in (([case.result], None), ([case.result, failing], KeyError)):
        if error:
            with pytest.raises(error):
                evaluate(case.hf, case.tokenizer, TASK, results=results, **case.options)
        else:
            evaluate(case.hf, case.tokenizer, TASK, results=results, **case.options)
        after = (hooks_on(case.hf), logger.level, random.getstate(), np.random.get_state()[2])  # noqa: NPY002
        assert after == before
        assert torch.equal(torch.get_rng_state(), state)
        assert case.hf.training
    case.hf.eval()
    assert case.tokenizer.pad_token == pad


def test_a_context_of_your_own_and_a_task_file_of_your_own(case: SimpleNamespace, tmp_path: Path) -> None:
    rows = [{"question": "The harbour was", "options": ["quiet", "threshold"], "right": k % 2} for k in range(6)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "own.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "own.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    seen = []

    @contextmanager
    def watched(model: Any) -> Any:
        seen.append(model)
        yield

    found = evaluate(case.hf, case.tokenizer, str(tmp_path / "own.yaml"), results=[watched])
    assert seen == [case.hf]
    assert [form.name for form in found.forms] == ["dense", "watched"]
    assert found.dense.score("own").value == 0.5  # the same answer to every question, right every other time
    assert found.dense.score("own").n == 6


def test_json_and_back(case: SimpleNamespace) -> None:
    found = evaluate(case.hf, case.tokenizer, TASK, results=[case.result], **case.options)
    again = DownstreamResult.from_json(json.loads(to_json_text(found.to_json())))
    assert again == found
    assert found.settings["n_shot"] == {TASK: 0}
    assert found.cost["evaluations"] == 2


def test_bad_input_is_refused_in_one_line(case: SimpleNamespace, tiny_hf_models: Any) -> None:
    def refused(error: type[Exception], match: str, model: Any = case.hf, tasks: Any = TASK, **options: Any) -> None:
        with pytest.raises(error, match=match) as caught:
            evaluate(model, options.pop("tokenizer", case.tokenizer), tasks, **{**case.options, **options})
        assert "\n" not in str(caught.value)

    refused(ValueError, "has no task 'everyday_choises'; did you mean everyday_choices", tasks="everyday_choises")
    refused(ValueError, "task file nowhere.yaml does not exist", tasks="nowhere.yaml")
    refused(ValueError, "name at least one task", tasks=[])
    refused(ValueError, "limit must be at least 1, got 0", limit=0)
    refused(ValueError, "num_fewshot must be at least 0, got -1", num_fewshot=-1)
    refused(TypeError, "tokenizer must be the one transformers loads with the model, got NoneType", tokenizer=None)
    refused(TypeError, "model must be a causal language model of transformers", model=torch.nn.Linear(2, 2))
    refused(TypeError, "a result must be a SparsityResult, an AblationResult or", results=[3])
    refused(ValueError, "two forms are named 'CETT-PPL-10%'", results=[case.result, case.result])
    refused(ValueError, "pass means=stats.mean_activation", results=[case.removed])
    refused(ValueError, "output weights differ", model=tiny_hf_models("gpt2", seed=1), results=[case.result])
    other: AblationResult = case.removed
    refused(ValueError, "with other weights", model=tiny_hf_models("gpt2", seed=1), results=[other])


def test_data_that_cannot_be_had_is_one_clear_error(case: SimpleNamespace, tmp_path: Path) -> None:
    task = {"task": "gone", "dataset_path": str(tmp_path / "none"), "output_type": "multiple_choice"}
    task |= {"test_split": "test", "doc_to_text": "a", "doc_to_choice": "b", "doc_to_target": "c"}
    (tmp_path / "gone.yaml").write_text(json.dumps(task), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"task '.*gone.yaml' cannot be loaded \(.*\); check its file or the network"):
        evaluate(case.hf, case.tokenizer, str(tmp_path / "gone.yaml"), **case.options)


def test_the_task_is_what_it_says() -> None:
    lines = (downstream._TASKS / "everyday_choices.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) == 96
    assert len({item["context"] for item in items}) == 96
    assert [item["answer"] for item in items] == [0, 1] * 48
    assert all(len(set(item["choices"])) == 2 for item in items)
    kinds = [item["kind"] for item in items]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(("agreement", "fact", "sense", "reference"), 24)
