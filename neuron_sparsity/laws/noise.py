"""How alike neighbouring residuals are: the Durbin-Watson statistic, and the correlation of AR(1) noise by REML."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from neuron_sparsity.laws.linear import Array
from neuron_sparsity.laws.profile import Profile
from neuron_sparsity.laws.shapes import Shape

__all__ = ["durbin_watson", "estimate_correlation"]

_CORRELATIONS = np.linspace(0.0, 0.95, 39)


def durbin_watson(residuals: Array) -> float:
    """Return the Durbin-Watson statistic: 2 for independent residuals, 0 where each is like the one before.

    Example:
        >>> durbin_watson(np.array([1.0, -1.0, 1.0, -1.0]))
        3.0
    """
    total = float(residuals @ residuals)
    return float(np.sum(np.diff(residuals) ** 2)) / total if total > 0 else 2.0


def estimate_correlation(profile: Profile) -> tuple[float, float]:
    """Return the correlation of neighbouring residuals and the evidence for it, by restricted maximum likelihood.

    The law is linear in its parameters near the optimum, and what they can explain is left out of the likelihood.
    (The plain correlation of the residuals is too low by about 0.2: four parameters follow 28 points closely.)

    Returns:
        (rho, likelihood ratio): twice the gain in log-likelihood over rho = 0.
    """
    data, jacobian = profile.data, _jacobian(profile)
    residuals = data.y - profile.best.a - profile.best.b * profile.law.values(profile.best.shape, data.x)
    gains = []
    for rho in _CORRELATIONS:
        whitened = replace(data, correlation=float(rho)).whiten(np.vstack([jacobian.T, residuals]))
        basis, sizes, _ = np.linalg.svd(whitened[:-1].T, full_matrices=False)
        known = sizes > 1e-9 * sizes[0]
        rest = whitened[-1] - basis[:, known] @ (basis[:, known].T @ whitened[-1])
        freedom = len(data.y) - int(known.sum())
        size = freedom / 2 * np.log(max(float(rest @ rest), 1e-300))
        gains.append(-size - (len(data.y) - 1) / 2 * np.log1p(-(rho**2)) - float(np.log(sizes[known]).sum()))
    best = int(np.argmax(gains))
    return float(_CORRELATIONS[best]), float(2 * (gains[best] - gains[0]))


def _jacobian(profile: Profile) -> Array:
    """Return the derivatives of the law by its parameters at the optimum, each of norm 1, [point, parameter]."""
    law, shape, x = profile.law, profile.best.shape, profile.data.x
    columns = [np.ones_like(x), law.values(shape, x)]
    step = 1e-4
    if profile.best.b > 0:
        up, down = (Shape(shape.alpha * factor, shape.log_k) for factor in (1 + step, 1 - step))
        columns.append(law.values(up, x) - law.values(down, x))
        if len(law.log_k_grid) > 1:
            up, down = (Shape(shape.alpha, shape.log_k + side) for side in (step, -step))
            columns.append(law.values(up, x) - law.values(down, x))
    table = np.column_stack(columns)
    return np.asarray(table / np.maximum(np.linalg.norm(table, axis=0), 1e-300))
