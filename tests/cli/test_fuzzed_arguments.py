"""Command lines nobody would write: exit code 0, 1 or 2, one line beside the usage, no file elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from neuron_sparsity.cli import app
from tests.cli import damage

FUZZ = settings(
    max_examples=settings().max_examples // 4,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)
ODD = [
    "", " ", "-", "--", "-1", "0", "1", "2", "16", "1e3", "1.5", "nan", "-inf", "1e400", "5e-324", "9" * 30, "9" * 5000,
    "0x10", "1_000", "\u0661", "true", "None", "auto", "cpu", "cuda", "cuda:99", "meta", "cpu:7", "torch", "triton",
    "float16", "mean", "layer", "random", "activation_frequency", ".", "..", "/", "~", "~nobody", "/dev/null",
    "../../../tmp", "\x00", "a\x00b", "\ud800", "\udcff", "\x1b[2J", "a\nb", "\u202e", "x" * 5000, "hf:", "hf::::",
    "hf:a:b:c:d", "sotu", "*", "$(id)", "`id`", "; id", "%s", "{}", "@file", "<script>",
]  # fmt: skip


def options_of(command: str) -> list[str]:
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    return [name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts) if name[0] == "-"]


def commands() -> list[str]:
    return sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def loaded(model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny Llama's folder, loaded once; every other name is refused as ever, but without a network."""
    from neuron_sparsity import adapter

    name, load = model_folder("llama"), adapter.load_model
    model = load(name)

    def known(wanted: str, **options: Any) -> Any:
        return model if wanted == name and options["dtype"] == "float32" else load(wanted, **options)

    monkeypatch.setattr(adapter, "load_model", known)
    return name


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("command", commands())
def test_odd_arguments(
    command: str,
    data: st.DataObject,
    cli: Any,
    loaded: str,
    text_file: str,
    whole_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"rank": str(tmp_path / "run"), "fit": str(tmp_path / "run"), "doctor": None}
    place = places.get(command, loaded)
    odd = st.sampled_from(ODD) | st.text(
        st.characters(exclude_characters="/"), max_size=8
    )  # what is asked for may be written
    arguments = (
        [] if place is None else [data.draw(st.just(place) | odd) if data.draw(st.integers(0, 4)) == 0 else place]
    )
    if place == loaded:
        arguments += ["--text", text_file, "--tokens", "96", "--n-ctx", "16", "--out", "out"]
    for _ in range(data.draw(st.integers(1, 3))):
        arguments += [data.draw(st.sampled_from([*options_of(command), "--no-such"]))]
        if data.draw(st.integers(0, 5)):
            arguments += [data.draw(odd)]
    if not (tmp_path / "run").exists() and command in ("rank", "fit"):
        whole_run().rename(tmp_path / "run")
    with damage.guarded(tmp_path):
        done = cli(command, *arguments)
    assert done.code in (0, 1, 2), (done.code, done.err)
    assert "Traceback" not in done.err
    if done.code == 1:
        assert "unexpected" not in done.error(), done.err
    elif done.code == 2:
        assert done.err.startswith(("Usage: ", "Error: ")), done.err
        assert done.err.count("\n") <= 4, done.err
    else:
        assert done.err == "", done.err
    damage.replace(tmp_path / "out", "nothing", tmp_path)
