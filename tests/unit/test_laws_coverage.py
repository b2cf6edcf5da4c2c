"""How often 95 % intervals hold the truth, on synthetic curves of the eleven published settings (arXiv:2411.02335).

The test makes a few draws of each. The table in docs/laws.md is that of all of them:

    python tests/unit/test_laws_coverage.py 200
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from neuron_sparsity.laws import LawFit, fit_law

NOISE = 5e-4
NAMES = {"relu": ("alpha", "b", "c", "A_0"), "silu": ("alpha", "c", "A_0")}

# name: (published coefficients in the order of NAMES, billions of tokens of the first and the last point, points)
SETTINGS: dict[str, tuple[tuple[float, ...], float, float, int]] = {
    "0.1B relu": ((0.101, -0.0151, 3.20, 0.0614), 0.8, 41.6, 28),
    "0.2B relu": ((0.449, -3.05, 0.286, 0.0674), 2.8, 85.1, 30),
    "0.4B relu": ((0.683, -3.46, 0.0790, 0.0690), 3.6, 145.3, 40),
    "0.8B relu": ((1.01, -3.49, 0.00797, 0.0721), 11.4, 272.4, 24),
    "1.2B relu": ((1.33, -3.89, 0.000903, 0.0782), 7.6, 317.8, 42),
    "2.4B relu": ((2.11, -3.82, 9.04e-6, 0.0712), 9.7, 291.3, 30),
    "0.1B silu": ((0.479, 0.102, 0.409), 0.8, 41.6, 28),
    "0.2B silu": ((0.844, 0.208, 0.390), 2.8, 92.8, 33),
    "0.4B silu": ((1.03, 0.420, 0.385), 3.6, 145.3, 40),
    "0.8B silu": ((0.995, 0.562, 0.383), 5.7, 193.0, 34),
    "1.2B silu": ((0.967, 0.538, 0.382), 3.0, 227.0, 36),
}


def curve(law: str, D: Any, truth: tuple[float, ...]) -> Any:
    if law == "relu":
        alpha, b, c, A_0 = truth
        return np.exp(-c * D**alpha + b) + A_0
    alpha, c, A_0 = truth
    return A_0 - c / D**alpha


def hits(name: str, draws: int, *, correlation: float = 0.0, noise: str = "independent") -> Counter[str]:
    """Count the draws in which the interval of a coefficient, and the band at ten times the tokens, hold the truth."""
    law = name.split()[1]
    truth, first, last, n = SETTINGS[name]
    place = list(SETTINGS).index(name)
    D = np.linspace(first, last, n)
    found: Counter[str] = Counter()
    for seed in range(draws):
        steps = np.random.default_rng([place, seed]).standard_normal(n)
        for i in range(1, n):
            steps[i] = correlation * steps[i - 1] + np.sqrt(1 - correlation**2) * steps[i]
        ratio = curve(law, D, truth) + NOISE * steps
        fit: LawFit = fit_law(D * 1e9, ratio, law, noise=noise, compare=False)  # type: ignore[arg-type]
        for coefficient, value in zip(NAMES[law], truth, strict=True):
            low, high = fit.intervals[coefficient]
            found[coefficient] += low <= value <= high
        _, lows, highs = fit.predict(last * 1e10)
        found["curve"] += bool(lows[0] <= curve(law, 10 * last, truth) <= highs[0])
        found["warned"] += any("identify the limit" in sentence for sentence in fit.warnings)
    return found


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draws, total, made = 16, Counter[str](), Counter[str]()
    for name in SETTINGS:
        found = hits(name, draws)
        for coefficient in (*NAMES[name.split()[1]], "curve"):
            assert found[coefficient] >= 12, (name, coefficient, found)
            total[coefficient] += found[coefficient]
            made[coefficient] += draws
    for coefficient, n in made.items():
        assert 0.90 <= total[coefficient] / n <= 0.99, (coefficient, total[coefficient], n)


def main(draws: int) -> None:
    """Print the tables of docs/laws.md."""
    start = time.perf_counter()
    for correlation, noise in ((0.0, "independent"), (0.5, "independent"), (0.5, "ar1")):
        print(f"\nnoise {NOISE}, correlation of neighbours {correlation}, noise={noise!r}, {draws} draws\n")
        print("| setting | alpha | b | c | A_0 | curve at ten times the tokens | limit not identified |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in SETTINGS:
            found = hits(name, draws, correlation=correlation, noise=noise)
            shown = [
                f"{100 * found[key] / draws:.1f}" if key in found else "" for key in ("alpha", "b", "c", "A_0", "curve")
            ]
            print(f"| {name} | {' | '.join(shown)} | {100 * found['warned'] / draws:.0f} |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
