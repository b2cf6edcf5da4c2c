"""Other curves through the same points, and which of them extrapolates: the laws are compared, not believed.

Every curve is fitted by the same variable projection, without bounds. The logarithm and the sigmoid-like curve are
those that SparsingLawData, the data of arXiv:2411.02335, is compared with, written without redundant coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from neuron_sparsity.laws.linear import Array, Bowls, Observations
from neuron_sparsity.laws.profile import Law, find_optimum, valleys
from neuron_sparsity.laws.shapes import LAWS

__all__ = ["RIVALS", "LawScore", "score_laws"]

_N_STARTS = 3


@dataclass(frozen=True)
class LawScore:
    """How one law or rival does on a curve.

    Attributes:
        law: `relu`, `silu`, or a rival's name.
        formula: With D in billions of tokens.
        n_parameters: Free coefficients.
        mse: Weighted mean squared residual on all points.
        aicc: Akaike's criterion with the correction for few points, lower is better; inf with too few points.
        heldout_mse: Weighted mean squared error on the last points when fitted to the first; None where too few points
            are left to fit or to score.
    """

    law: str
    formula: str
    n_parameters: int
    mse: float
    aicc: float
    heldout_mse: float | None


@dataclass(frozen=True)
class _Rival:
    """A curve `A_0 + B h(x; theta)`; `solve` says which of the two are free."""

    name: str
    formula: str
    n_parameters: int
    axes: Callable[[Array], list[Array]]
    values: Callable[[Array, Array], Array]  # [shape, parameter], x - x_first -> [shape, point]
    a: float | None = None  # a fixed A_0
    b: float | None = None  # a fixed B

    def solve(self, data: Observations, theta: Array, origin: float) -> tuple[Array, Array, Array]:
        bowls = Bowls.of(data, self.values(theta, data.x - origin), bounded=False)
        a = bowls.a if self.a is None else np.full_like(bowls.a, self.a)
        b = bowls.b if self.b is None else np.full_like(bowls.b, self.b)
        if self.a is not None:
            b = bowls.b_at(self.a)
        if self.b is not None:
            a = bowls.a_at(self.b)
        return bowls.sse(a, b), a, b


def _span(x: Array) -> float:
    return float(x[-1] - x[0])


RIVALS = (
    _Rival(
        "logarithm",
        "a ln(D + s) + d",
        3,
        lambda x: [np.linspace(-12.0, _span(x) + 8.0, 100)],
        lambda theta, x: np.logaddexp(x, theta[:, :1]),
    ),
    _Rival(
        "sigmoid",
        "a - 1 / (1 + exp(c D + d))",
        3,
        lambda x: [
            np.concatenate([-np.geomspace(1e2, 1e-3, 30), np.geomspace(1e-3, 1e2, 30)]) * np.exp(-_span(x)),
            np.linspace(-12.0, 12.0, 49),
        ],
        lambda theta, x: expit(-(theta[:, :1] * np.exp(x) + theta[:, 1:])),
        b=-1.0,
    ),
    _Rival(
        "power",
        "a D^k",
        2,
        lambda x: [np.linspace(-20.0, 20.0, 161) / max(1.0, _span(x))],
        lambda theta, x: np.exp(theta * x),
        a=0.0,
    ),
    _Rival(
        "exponential",
        "a exp(-D / s) + d",
        3,
        lambda x: [np.linspace(-3.0, _span(x) + 5.0, 100)],
        lambda theta, x: np.exp(-np.expm1(x) * np.exp(-theta)),
    ),
)
"""The rivals of the two laws."""


def score_laws(data: Observations, holdout: float) -> tuple[LawScore, ...]:
    """Return the two laws and the rivals, each fitted to all points and, for the held-out error, to the first ones.

    Args:
        data: The curve.
        holdout: Share of the tokens of the last point up to which points are fitted when the rest is predicted.
    """
    first = data.x <= data.x[-1] + np.log(holdout)
    head = Observations(data.x[first], data.y[first], data.weight[first])
    tail = Observations(data.x[~first], data.y[~first], data.weight[~first])
    whole = Observations(data.x, data.y, data.weight)
    scores = []
    for law in LAWS.values():
        scores.append(_score(law.name, law.formula, len(law.names), _law_fitter(law), whole, head, tail))
    for rival in RIVALS:
        scores.append(_score(rival.name, rival.formula, rival.n_parameters, _rival_fitter(rival), whole, head, tail))
    return tuple(scores)


_Predictor = Callable[[Array], Array]


def _score(
    name: str,
    formula: str,
    n_parameters: int,
    fit: Callable[[Observations], _Predictor],
    whole: Observations,
    head: Observations,
    tail: Observations,
) -> LawScore:
    mse = _mse(fit(whole), whole)
    heldout = _mse(fit(head), tail) if len(head.y) > n_parameters and len(tail.y) > 0 else None
    return LawScore(name, formula, n_parameters, mse, aicc(mse, len(whole.y), n_parameters), heldout)


def aicc(mse: float, n: int, n_parameters: int) -> float:
    """Return Akaike's criterion with the correction for few points, the size of the noise counted as a parameter."""
    k = n_parameters + 1
    if n <= k + 1:
        return np.inf
    return float(n * np.log(max(mse, 1e-300)) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def _mse(predict: _Predictor, data: Observations) -> float:
    return float(np.average((data.y - predict(data.x)) ** 2, weights=data.weight))


def _law_fitter(kind: type[Law]) -> Callable[[Observations], _Predictor]:
    def fit(data: Observations) -> _Predictor:
        law = kind(float(data.x[0]), float(data.x[-1]))
        best = find_optimum(law, data)
        return lambda x: best.a + best.b * law.values(best.shape, x)

    return fit


def _rival_fitter(rival: _Rival) -> Callable[[Observations], _Predictor]:
    def fit(data: Observations) -> _Predictor:
        origin = float(data.x[0])
        axes = rival.axes(data.x)
        grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
        sse = rival.solve(data, grid, origin)[0]
        # Local minima along the first axis, at the best place of the others.
        rows = sse.reshape(len(axes[0]), -1)
        starts = [grid[place * rows.shape[1] + rows[place].argmin()] for place in valleys(rows.min(axis=1))[:_N_STARTS]]
        scale = np.array([np.median(np.diff(axis)) for axis in axes])
        found = []
        options: dict[str, Any] = {"xatol": 1e-8, "fatol": 1e-10 * float(sse.min()), "maxiter": 300}
        for start in starts:
            options["initial_simplex"] = np.vstack([start, start + np.diag(scale)])
            done = minimize(
                lambda point: float(rival.solve(data, point[None], origin)[0][0]),
                start,
                method="Nelder-Mead",
                options=options,
            )
            found.append((float(done.fun), np.asarray(done.x)))
        theta = min(found, key=lambda pair: pair[0])[1][None]
        _, a, b = rival.solve(data, theta, origin)
        return lambda x: a[0] + b[0] * rival.values(theta, x - origin)[0]

    return fit
