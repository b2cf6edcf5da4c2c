"""`read_points`: what it reads, and what it says about a file that it cannot use."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.laws import fit_law, read_points

TOKENS = [1e9, 2e9, 4e9, 8e9, 16e9]
RATIOS = [0.3, 0.34, 0.37, 0.39, 0.4]


def trajectory() -> dict[str, object]:
    pairs = zip(TOKENS, RATIOS, strict=True)
    points = [{"checkpoint": f"step-{i}", "tokens": t, "activation_ratio": a} for i, (t, a) in enumerate(pairs)]
    return {"schema": 1, "points": points}


TEXTS = {
    "trajectory.json": json.dumps(trajectory()),
    "lists.json": json.dumps({"token_passed": TOKENS, "activation_ratio": RATIOS}),
    "plain.csv": "tokens,activation_ratio\n" + "".join(f"{t},{a}\n" for t, a in zip(TOKENS, RATIOS, strict=True)),
    "wide.csv": "\ufeffname, tokens , activation_ratio\r\n"
    + "".join(f"x, {int(t)}, {a}\r\n" for t, a in zip(TOKENS, RATIOS, strict=True)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_form_gives_the_same_points(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TEXTS[name], encoding="utf-8")
    points = read_points(tmp_path / name)
    np.testing.assert_array_equal(points.tokens, TOKENS)
    np.testing.assert_array_equal(points.activation_ratio, RATIOS)
    assert fit_law(*points, law="silu", compare=False).n_points == 5


def test_a_run_folder_stands_for_its_trajectory(tmp_path: Path) -> None:
    (tmp_path / "trajectory.json").write_text(TEXTS["trajectory.json"], encoding="utf-8")
    assert read_points(str(tmp_path)).tokens[0] == 1e9


def test_order_is_kept(tmp_path: Path) -> None:
    (tmp_path / "curve.csv").write_text("activation_ratio,tokens\n0.2,5\n0.1,3\n", encoding="utf-8")
    assert read_points(tmp_path / "curve.csv").tokens.tolist() == [5.0, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the columns \(none\); pass trajectory.json, a CSV with the columns tokens,activation"),
        ("a,b\n1,2\n", "has the columns a, b; pass"),
        ("tokens,activation_ratio\n", "holds no points; pass trajectory.json, a CSV"),
        (
            "tokens,activation_ratio\n1e9,0.1\n2e9,\n",
            "point 1 has nothing for activation_ratio; give a number or remove",
        ),
        ("tokens,activation_ratio\n1e9,0.1\nmany,0.1\n", "point 1 has 'many' for tokens"),
        ("tokens,activation_ratio\n1e9\n", "point 0 has nothing for activation_ratio"),
        ('{"points": [', r"is damaged \(.*\); write it again"),
        ("[1, 2]", "holds a JSON list; pass"),
        ("{}", r"has the keys \(none\); pass"),
        ('{"x": 1, "activation_ratio": [0.1]}', "has the keys x, activation_ratio; pass"),
        ('{"schema": 2, "points": []}', "has schema 2, and this version reads 1; update neuron-sparsity"),
        ('{"schema": 1, "points": []}', "holds no points"),
        ('{"points": [{"tokens": 1}]}', "point 0 has no activation_ratio; measure it again or remove it"),
        ('{"points": [7]}', "point 0 has no tokens and no activation_ratio"),
        ('{"points": [{"tokens": 1, "activation_ratio": null}]}', "point 0 has nothing for activation_ratio"),
        ('{"points": [{"tokens": true, "activation_ratio": 0.1}]}', "point 0 has True for tokens"),
        ("[" * 100_000, r"is damaged \(maximum recursion depth"),
        ('{"points": ' + "9" * 5000 + "}", r"is damaged \(Exceeds the limit"),
        ('{"token_passed": [1' + "0" * 400 + '], "activation_ratio": [0.1]}', "point 0 has 1000.* for tokens"),
        ("tokens,activation_ratio\n" + "9" * 200_000 + ",0.1\n", r"is no CSV \(field larger than field limit"),
        (
            '{"token_passed": [1, 2], "activation_ratio": [0.1]}',
            "has 2 token counts and 1 ratios; give one ratio a count",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "curve"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match=message) as caught:
        read_points(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_study_holds_several_curves(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"schema": 1, "runs": []}', encoding="utf-8")
    for path in (tmp_path, tmp_path / "study.json"):
        with pytest.raises(RunFolderError, match=r"holds a study, of several curves; pass one of them, .*track$"):
            read_points(path)


def test_a_missing_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"curve.csv does not exist; pass trajectory.json"):
        read_points(tmp_path / "curve.csv")
    with pytest.raises(RunFolderError, match=r"trajectory.json does not exist"):
        read_points(tmp_path)
    (tmp_path / "curve.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RunFolderError, match="cannot be read as text"):
        read_points(tmp_path / "curve.bin")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_is_read_to_its_end_and_never_waited_for_in_a_folder(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, TEXTS["plain.csv"].encode())
    os.close(write)
    try:
        assert read_points(f"/dev/fd/{read}").tokens.tolist() == TOKENS
    finally:
        os.close(read)
    os.mkfifo(tmp_path / "trajectory.json")
    with pytest.raises(RunFolderError, match=r"trajectory.json is no file; pass"):
        read_points(tmp_path)
    with pytest.raises(RunFolderError, match="/dev/zero holds more than 64 MiB; pass"):
        read_points("/dev/zero")
    with pytest.raises(RunFolderError, match="cannot be read as text"):
        read_points("a\0b")
