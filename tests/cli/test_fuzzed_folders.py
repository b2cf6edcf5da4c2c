"""Run folders that were damaged, edited or planted: one clear line, nothing outside is touched, no code runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from neuron_sparsity import pipeline, recorder, recording
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.store import write_json
from tests.cli import damage

# Nothing is made smaller: an example is one damage already, and each takes a tenth of a second.
FUZZ = settings(
    max_examples=settings().max_examples // 4,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.generate],
)


@pytest.fixture
def loaded(model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, whole_run: Callable[[], Path]) -> None:
    """The model is loaded once: what is fuzzed here is the folder."""
    from neuron_sparsity import adapter

    load, name = adapter.load_model, model_folder("llama")
    model = load(name)
    monkeypatch.setattr(
        adapter, "load_model", lambda wanted, **options: model if wanted == name else load(wanted, **options)
    )


@pytest.fixture
def jail(
    whole_run: Callable[[], Path], measure: Callable[..., Any], loaded: None, tmp_path: Path
) -> Callable[[], Path]:
    """`jail()`: a fresh run folder, with every file there is, beside a file that is not the run's."""
    whole = whole_run()
    points = [{"checkpoint": f"step{k}", "tokens": k * 1e9, "activation_ratio": 0.1 + 0.5 / k} for k in range(1, 12)]
    write_json(whole / "trajectory.json", {"points": points})
    half = whole_run()
    (half / "statistics.safetensors").unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "record", partial(recorder.record, checkpoint_seconds=0))
        patched.setattr(NeuronStatistics, "save", interrupt)
        assert measure("record", "--out", half).code == 130
    (half / recording.PARTIAL).rename(whole / recording.PARTIAL)
    (tmp_path / "precious.txt").write_text("not of this run")

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "run")
        return tmp_path / "run"

    return fresh


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def check(done: Any, folder: Path, *, named: bool) -> None:
    """0, or one line that names the folder and is about it; and the file next door is as it was."""
    assert done.code in (0, 1), (done.code, done.err)
    if done.code:
        message = done.error()
        assert str(folder) in message or not named, message
        assert "unexpected" not in message, message
    else:
        assert done.err == "", done.err
    assert (folder.parent / "precious.txt").read_text() == "not of this run"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["precious.txt", "run"]


COMMANDS: dict[str, Callable[..., Any]] = {
    "render": lambda folder, cli, measure: cli("report", folder),
    "render as JSON": lambda folder, cli, measure: cli("report", folder, "--json"),
    "rank": lambda folder, cli, measure: cli("rank", folder, "--by", "activation_frequency", "--scope", "layer"),
    "rank by gradients": lambda folder, cli, measure: cli("rank", folder, "--by", "fisher_mean"),
    "rank as JSON": lambda folder, cli, measure: cli("rank", folder, "--json", "--strongest", "128"),
    "fit": lambda folder, cli, measure: cli("fit", folder),
    "report": lambda folder, cli, measure: measure("report", "--out", folder),
    "record": lambda folder, cli, measure: measure("record", "--out", folder, "--json"),
    "sparsity": lambda folder, cli, measure: measure("sparsity", "--out", folder),
    "ablate": lambda folder, cli, measure: measure("ablate", "--out", folder, "--ranking", "maximum"),
}
READERS: dict[str, list[str]] = {
    "run.json": ["render", "rank", "report", "sparsity"],
    "sparsity.json": ["render", "render", "render as JSON", "report", "sparsity"],
    "ablation.json": ["render", "render", "render as JSON", "report", "ablate"],
    "passage.json": ["render", "render", "report"],
    "trajectory.json": ["fit", "fit", "render"],
    "statistics.safetensors": ["render", "rank", "rank", "rank as JSON", "report", "record"],
    "saliency.safetensors": ["rank by gradients", "render"],
    "atlas.parquet": ["render", "report"],
    "windows.safetensors": ["report"],
    "record.partial.safetensors": ["record"],
}


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, data: st.DataObject, jail: Any, cli: Any, measure: Any) -> None:
    folder = jail()
    path = folder / name
    if name == recording.PARTIAL:
        (folder / "statistics.safetensors").unlink()
    how = {".json": damage.damaged_json, ".safetensors": damage.damaged_safetensors}.get(
        path.suffix, damage.damaged_bytes
    )
    path.write_bytes(data.draw(how(path.read_bytes())))
    command = data.draw(st.sampled_from(READERS[name]))
    with damage.guarded(folder):
        done = COMMANDS[command](folder, cli, measure)
    check(done, folder, named=command != "fit")  # of that, each complaint is about the one file it was given


@FUZZ
@given(data=st.data())
def test_what_is_no_file(data: st.DataObject, jail: Any, cli: Any, measure: Any) -> None:
    folder = jail()
    name, what = data.draw(st.sampled_from(sorted(READERS))), data.draw(st.sampled_from(sorted(damage.STANDS_THERE)))
    damage.replace(folder / name, what, folder.parent / "precious.txt")
    command = data.draw(st.sampled_from(READERS[name]))
    with damage.guarded(folder, seconds=20):
        done = COMMANDS[command](folder, cli, measure)
    check(done, folder, named=command != "fit")  # of that, each complaint is about the one file it was given
