"""`neuron-sparsity fit`: points of a file -> coefficients with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOKENS = [2e9 * step for step in range(1, 31)]
RATIOS = [0.4 - 0.1 / (tokens / 1e9) ** 0.5 + 2e-4 * math.sin(17 * tokens / 1e9) for tokens in TOKENS]


def write_csv(folder: Path, ratios: list[float] = RATIOS) -> Path:
    path = folder / "points.csv"
    rows = [f"{tokens:.0f},{ratio}" for tokens, ratio in zip(TOKENS, ratios, strict=False)]
    path.write_text("\n".join(["tokens,activation_ratio", *rows]), encoding="utf-8")
    return path


def test_three_kinds_of_file_give_the_same_fit(cli: Callable[..., Any], tmp_path: Path) -> None:
    points = [
        {"checkpoint": str(i), "tokens": t, "activation_ratio": r}
        for i, (t, r) in enumerate(zip(TOKENS, RATIOS, strict=True))
    ]
    trajectory, lists = tmp_path / "trajectory.json", tmp_path / "lists.json"
    trajectory.write_text(json.dumps({"schema": 1, "points": points}), encoding="utf-8")
    lists.write_text(json.dumps({"token_passed": TOKENS, "activation_ratio": RATIOS}), encoding="utf-8")
    fits = [cli("fit", path, "--law", "silu", "--json").json for path in (write_csv(tmp_path), trajectory, lists)]
    assert fits[0] == fits[1] == fits[2]
    found = fits[0]
    assert found["law"] == "silu"
    assert {"alpha", "c", "A_0", "intervals", "mae", "mse", "limit"} <= set(found)
    assert found["limit"] == found["A_0"] == pytest.approx(0.4, abs=0.005)
    for name, true in (("alpha", 0.5), ("c", 0.1), ("A_0", 0.4)):
        low, high = found["intervals"][name]
        assert low < true < high


def test_it_prints_coefficients_intervals_and_rivals(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("fit", write_csv(tmp_path), "--drop-first", "2")
    assert (done.code, done.err) == (0, "")
    first, *others = done.out.splitlines()
    assert (
        first == "silu law, -c / D^alpha + A_0, D in billions of tokens; 28 points of points.csv, the first 2 left out"
    )
    assert all(any(word in line for line in others) for word in ("alpha", "A_0", "95 % interval", "MAE", "logarithm"))
    assert cli("fit", write_csv(tmp_path), "--quiet").out == ""


@pytest.mark.parametrize(
    ("ratios", "options", "complaint"),
    [
        (RATIOS[:3], (), "points"),
        ([*RATIOS[:5], 1.5, *RATIOS[6:]], (), "1.5"),
        ([100 * ratio for ratio in RATIOS], (), "divide percentages by 100"),
        ([*RATIOS[:-1], -0.1], (), "-0.1 at position 29; leave that point out"),
        ([*RATIOS[:5], math.nan, *RATIOS[6:]], (), "nan"),
        (RATIOS, ("--law", "gelu"), "gelu"),
        (RATIOS, ("--drop-first", "-1"), "-1"),
        (RATIOS, ("--noise", "pink"), "pink"),
    ],
)
def test_bad_points_and_options_are_one_line(
    cli: Callable[..., Any], tmp_path: Path, ratios: list[float], options: tuple[str, ...], complaint: str
) -> None:
    assert complaint in cli("fit", write_csv(tmp_path, ratios), *options).error()


def test_a_missing_file_and_a_damaged_one_are_named(cli: Callable[..., Any], tmp_path: Path) -> None:
    assert "nowhere.csv" in cli("fit", tmp_path / "nowhere.csv").error()
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    assert "broken.json" in cli("fit", tmp_path / "broken.json").error()
