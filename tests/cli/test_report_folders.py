"""`report` on folders that are there: rendered again with chosen neurons, with a damage, and side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report_page import synthetic_statistics
from neuron_sparsity.report import _explorer
from neuron_sparsity.report._packed import unpack
from neuron_sparsity.report_commands import neuron_places
from neuron_sparsity.store import RunFolder, write_json
from tests.report.conftest import make_damage

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """`folder("a")`: a run folder with statistics alone."""

    def make(name: str, n_layers: int = 2, d_mlp: int = 24) -> Path:
        stats = synthetic_statistics(n_layers, d_mlp, n_tokens=2048, n_vocab=50)
        path = tmp_path / name
        RunFolder(path, {"kind": "run", "model": {"name": name}})
        stats.save(path)
        return path

    return make


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("no model is needed")


def damage_of(path: Path, fingerprint: str = "synthetic") -> dict[str, Any]:
    model = synthetic_statistics(2, 24, n_tokens=2048, n_vocab=50).model
    data = make_damage(model=model).to_json()
    data["model"]["fingerprint"] = fingerprint
    write_json(path / "damage.json", data)
    return data


def test_a_damage_in_the_folder_is_on_the_page(cli: Callable[..., Any], folder: Folder) -> None:
    path = folder("run")
    assert cli("report", path, "--quiet").code == 0
    assert "At what cost?" not in (path / "report.html").read_text(encoding="utf-8")
    damage_of(path)
    assert cli("report", path, "--quiet").code == 0
    html = (path / "report.html").read_text(encoding="utf-8")
    assert "Which tokens pay, and in which layers: truncated at CETT-PPL-1%." in html
    assert "Tokens hurt most" in html
    assert "·peace" in html
    damage_of(path, fingerprint="another")
    assert "DamageResult come from different models" in cli("report", path).error()


def test_asked_for_neurons_are_on_the_page(
    cli: Callable[..., Any], folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder("run")
    monkeypatch.setattr("neuron_sparsity.adapter.load_model", refuse)
    monkeypatch.setattr(_explorer, "budget_bytes", lambda n: 400)
    cli("report", path, "--quiet")
    few = chosen(path)
    asked = [(0, 3), (0, 4), (1, 5), (1, 23)]
    assert len(few) < 6
    assert cli("report", path, "--quiet", "--neurons", *(f"{layer}:{neuron}" for layer, neuron in asked)).code == 0
    assert {24 * layer + neuron for layer, neuron in asked} <= set(chosen(path))


def chosen(path: Path) -> list[int]:
    html = (path / "report.html").read_text(encoding="utf-8")
    packed = html.split('<script type="application/octet-stream">')[1].split("</script>")[0]
    return list(unpack(packed)[1]["chosen"].tolist())


def test_neurons_that_are_not_there_are_refused(cli: Callable[..., Any], folder: Folder) -> None:
    path = folder("run")
    assert "there is no neuron 2:0; layers are 0 to 1" in cli("report", path, "--neurons", "2:0").error()
    assert "takes LAYER:NEURON, such as 3:17, got '3-17'" in cli("report", path, "--neurons", "3-17").error()
    assert "--neurons is for a run folder" in cli("report", "no-folder", "--neurons", "0:1").error()
    assert neuron_places(["L1:n2", "3:4"]) == [(1, 2), (3, 4)]


def test_folders_side_by_side(
    cli: Callable[..., Any], folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = folder("one"), folder("two", n_layers=3)
    monkeypatch.setattr("neuron_sparsity.adapter.load_model", refuse)
    done = cli("report", "--compare", one, two, "--out", tmp_path / "both.html")
    assert (done.code, done.err) == (0, "")
    assert "both.html" in done.out
    html = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "A · one" in html
    assert "B · two" in html
    assert "2 × 24 = 48" in html
    assert "3 × 24 = 72" in html
    assert cli("report", "--compare", one, two, "--out", tmp_path, "--json").json["page"] == str(
        tmp_path / "compare.html"
    )
    monkeypatch.chdir(tmp_path / "one")
    assert cli("report", "--compare", "../one", "../two", "--quiet").code == 0
    assert (tmp_path / "one" / "compare.html").is_file()


def test_what_cannot_be_compared_is_refused(cli: Callable[..., Any], folder: Folder, tmp_path: Path) -> None:
    one, two = folder("one"), folder("two")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = ("--out", tmp_path / "page.html")
    assert "takes two or more run folders" in cli("report", "--compare", one, *out).error()
    assert "is named twice" in cli("report", "--compare", one, tmp_path / "two" / ".." / "one", *out).error()
    assert "is no run folder" in cli("report", "--compare", one, empty, *out).error()
    assert "leave out --tokens" in cli("report", "--compare", one, two, "--tokens", 64, *out).error()
    assert "leave out model" in cli("report", "smollm2-135m", "--compare", one, two, *out).error()
    assert "does not exist" in cli("report", "--compare", one, two, "--out", tmp_path / "no" / "page.html").error()
    (two / "statistics.safetensors").unlink()
    assert "statistics.safetensors" in cli("report", "--compare", one, two, *out).error()
    assert not (tmp_path / "page.html").exists()
