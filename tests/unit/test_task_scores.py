"""Paired differences of scores, by hand, from reports of lm-eval's form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neuron_sparsity.task_scores import paired, scores_of


def report(acc: list[float], word_perplexity: float = 9.0) -> dict[str, Any]:
    samples = [{"doc_id": k, "filter": "none", "acc": x, "word_perplexity": (-3.0, 2)} for k, x in enumerate(acc)]
    values = {"alias": "t", "sample_len": len(acc), "acc,none": float(np.mean(acc)), "acc_stderr,none": 0.1}
    values |= {"word_perplexity,none": word_perplexity, "word_perplexity_stderr,none": "N/A"}
    group = {"alias": "g", "acc,none": 0.25 + float(np.mean(acc)), "acc_stderr,none": 0.2}
    return {"results": {"t": values}, "groups": {"g": group}, "samples": {"t": samples[::-1]}}


def test_paired_error_by_hand() -> None:
    dense, changed = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    stderr, lost, gained, p_value = paired(changed, dense)
    assert (lost, gained) == (3, 1)
    assert p_value == pytest.approx(2 * (1 + 4) / 2**4)  # two-sided: P(at most 1 of 4 heads), twice
    difference = changed - dense
    assert stderr == pytest.approx(np.sqrt(((difference - difference.mean()) ** 2).sum() / 5 / 6))
    assert paired(None, dense) == (None, None, None, None)
    assert paired(changed * 0.5, dense)[3] is None, "McNemar's test is of answers that are right or wrong"


def test_scores_of_a_report_and_its_reference() -> None:
    dense, changed = report([1.0, 1.0, 0.0, 1.0]), report([1.0, 0.0, 0.0, 0.0], 11.0)
    acc, perplexity, group = scores_of(changed, dense)
    assert (acc.task, acc.metric, acc.filter, acc.value, acc.stderr, acc.n) == ("t", "acc", "none", 0.25, 0.1, 4)
    assert (acc.difference, acc.lost, acc.gained, acc.p_value) == (-0.5, 2, 0, 0.5)
    assert (perplexity.difference, perplexity.stderr, perplexity.difference_stderr) == (2.0, None, None)
    assert (group.task, group.difference, group.difference_stderr, group.stderr) == ("g", -0.5, None, 0.2)


def test_a_score_that_is_not_the_mean_of_its_items_is_not_paired() -> None:
    dense, changed = report([1.0, 0.0]), report([1.0, 1.0])
    changed["results"]["t"]["acc,none"] = 0.7
    assert scores_of(changed, dense)[0].difference_stderr is None
