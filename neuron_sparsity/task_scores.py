"""Scores of lm-eval's reports, and what changes between two reports on the same items; lm-eval itself is not needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

__all__ = ["Score", "paired", "scores_of"]


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: Name of the task, or of a group of tasks.
        metric: Such as `acc`, or `acc_norm` (by the length of the answer).
        filter: Of lm-eval; `none` where answers are not filtered.
        value: The score.
        stderr: Its standard error as lm-eval reports it; None where it has none.
        n: Items that were answered.
        difference: Score less that of the dense model; 0 for the dense model itself.
        difference_stderr: Standard error of the paired difference, `sd(x - x_dense) / sqrt(n)`; None where the score
            is not the mean of the items' scores (groups, perplexities).
        lost: Items whose score is lower than the dense model's; None likewise.
        gained: Items whose score is higher.
        p_value: McNemar's exact two-sided test of `lost` against `gained`; None where scores are not 0 or 1.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    difference: float
    difference_stderr: float | None
    lost: int | None
    gained: int | None
    p_value: float | None


def scores_of(run: Any, dense: Any) -> tuple[Score, ...]:
    """Return the scores of one run, compared with the dense one."""
    found = []
    for task, values in {**run["results"], **run.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            reference = {**dense["results"], **dense.get("groups", {})}[task][key]
            pair = [
                _items(part, task, metric, kind, float(part["results"].get(task, {}).get(key, math.nan)))
                for part in (run, dense)
            ]
            found.append(
                Score(
                    task,
                    metric,
                    kind,
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                    int(values.get("sample_len") or len(run["samples"].get(task, ()))),
                    float(value) - float(reference),
                    *paired(*pair),
                )
            )
    return tuple(found)


def _items(run: Any, task: str, metric: str, kind: str, value: float) -> Float[np.ndarray, " item"] | None:
    """Return each item's own score, if the score is their mean."""
    samples = sorted((s for s in run["samples"].get(task, ()) if s["filter"] == kind), key=lambda s: s["doc_id"])
    own = [sample.get(metric) for sample in samples]
    if not own or not all(isinstance(one, int | float) for one in own):
        return None
    scores = np.array(own, dtype=np.float64)
    return scores if math.isclose(float(scores.mean()), value, rel_tol=1e-6, abs_tol=1e-9) else None


def paired(
    changed: Float[np.ndarray, " item"] | None, dense: Float[np.ndarray, " item"] | None
) -> tuple[float | None, int | None, int | None, float | None]:
    """Return the standard error of the paired difference, items lost and gained, and McNemar's p.

    Example:
        >>> ones = np.array([1.0, 1.0, 1.0, 0.0])
        >>> stderr, lost, gained, p_value = paired(np.array([0.0, 0.0, 1.0, 1.0]), ones)
        >>> round(stderr, 3), lost, gained, p_value
        (0.479, 2, 1, 1.0)
    """
    if changed is None or dense is None or len(changed) != len(dense):
        return None, None, None, None
    difference = changed - dense
    stderr = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else None
    lost, gained = int((difference < 0).sum()), int((difference > 0).sum())
    binary = bool(np.isin(np.concatenate([changed, dense]), (0.0, 1.0)).all())
    p_value = float(stats.binomtest(lost, lost + gained).pvalue) if binary and lost + gained else None
    return stderr, lost, gained, (1.0 if binary and not lost + gained else p_value)
