"""What is wrong is said in one line on stderr, with exit code 1; usage errors exit with 2; nothing computed is lost."""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_sparsity import store, terminal

SIZES = ("--tokens", "192", "--n-ctx", "16")
JSON_FILES = ("run.json", "sparsity.json", "ablation.json", "passage.json")


# --- texts


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no file and no built-in text is called"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"short", "shorter than a window"),
        (b"\x7fELF\x00\x01\x02" * 100, "NUL byte"),
        ("caf\u00e9 ".encode("latin-1") * 100, "bad byte at position 3"),
    ],
)
def test_text_that_cannot_be_measured(
    content: bytes | None, complaint: str, cli: Callable[..., Any], model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    done = cli("record", model_folder("llama"), "--text", text, *SIZES, "--out", tmp_path / "run")
    assert complaint in done.error()
    assert not (tmp_path / "run").exists()


def test_unknown_corpus(cli: Callable[..., Any], model_folder: Callable[[str], str], tmp_path: Path) -> None:
    for source in ("no-such-corpus", "hf:nobody/nothing"):
        done = cli("record", model_folder("llama"), "--text", source, *SIZES, "--out", tmp_path / "run")
        assert source in done.error()


def test_tokenizer_of_another_model(
    cli: Callable[..., Any], tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any, text_file: str, tmp_path: Path
) -> None:
    model = tiny_hf_models("llama")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    done = cli("record", tmp_path / "model", "--text", text_file, *SIZES, "--out", tmp_path / "run")
    assert "tokenizer does not fit the model" in done.error()


# --- models


def test_unknown_model_without_network(cli: Callable[..., Any], text_file: str) -> None:
    message = cli("record", "nobody/nothing", "--text", text_file, *SIZES).error()
    assert "'nobody/nothing' cannot be loaded" in message
    assert "check the name and the network" in message


def test_unreachable_hub(text_file: str, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        no_wait = "import time; time.sleep = lambda seconds: None; from neuron_sparsity.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", no_wait, "record", "nobody/nothing", "--text", text_file, *SIZES],
            env=os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: model 'nobody/nothing' cannot be loaded")
    assert done.stderr.count("\n") == 1, done.stderr


def test_mixture_of_experts(
    cli: Callable[..., Any], model_folder: Callable[[str], str], text_file: str, tmp_path: Path
) -> None:
    done = cli("sparsity", model_folder("mixtral"), "--text", text_file, *SIZES, "--out", tmp_path / "run")
    assert "mixture of experts" in done.error()


def test_model_without_mlp(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hugging Face class is attention-only, so the loaded model says that it is."""
    from neuron_sparsity import adapter

    boot = adapter._boot

    def attention_only(*arguments: Any) -> Any:
        model = boot(*arguments)
        model.cfg.attn_only = True
        return model

    monkeypatch.setattr(adapter, "_boot", attention_only)
    assert "no MLP neurons (attention-only" in measure("record", "--out", tmp_path / "run").error()


def test_damaged_model_folder(
    cli: Callable[..., Any], tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any, text_file: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    tiny_hf_models("llama").save_pretrained(model)
    assert "cannot be loaded" in cli("record", model, "--text", text_file).error()
    tiny_tokenizer.save_pretrained(model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in cli("record", model, "--text", text_file).error()
    (model / "config.json").unlink()
    assert "no config.json" in cli("record", model, "--text", text_file).error()
    assert "a.gguf does not exist" in cli("record", tmp_path / "a.gguf", "--text", text_file).error()


# --- numbers and names


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--p", "0"), "--p must be a positive number"),
        (("--p", "-1"), "--p must be a positive number"),
        (("--p", "nan"), "--p must be a positive number"),
        (("--p", "inf"), "--p must be a positive number"),
        (("--tokens", "0"), "--tokens must be at least 1"),
        (("--tokens", "-5"), "--tokens must be at least 1"),
        (("--n-ctx", "1"), "--n-ctx must be at least 2"),
        (("--n-ctx", "100000"), "at most the model's 64"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--device", "nonsense"), "--device nonsense does not work here"),
        (("--dtype", "float8"), "dtype must be"),
        (("--ranking", "beauty"), "--ranking must be one of contribution"),
        (("--replacement", "resampled"), "--replacement must be one of mean"),
        (("--scope", "galaxy"), "--scope must be one of model"),
    ],
)
def test_value_out_of_range(
    options: tuple[str, str], complaint: str, measure: Callable[..., Any], tmp_path: Path
) -> None:
    assert complaint in measure("report", "--out", tmp_path / "run", *options).error()
    assert not (tmp_path / "run").exists()


def test_the_names_cli_knows_are_those_of_the_library() -> None:
    from neuron_sparsity import options
    from neuron_sparsity.ablation import REPLACEMENTS
    from neuron_sparsity.ranking import RANKINGS

    assert tuple(RANKINGS) == options.RANKINGS
    assert REPLACEMENTS == options.REPLACEMENTS


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "--no-such-option"),
        ("no-such-command",),
        ("rank",),
        ("sparsity", "--p", "much"),
        ("sparsity", "--tokens", "1.5"),
        ("rank", ".", "--weakest", "3", "--strongest", "3"),
    ],
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...], cli: Callable[..., Any]) -> None:
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: ")


def test_rank_of_more_neurons_than_there_are(whole_run: Callable[[], Path], cli: Callable[..., Any]) -> None:
    folder = whole_run()
    assert "between 0 and 128, got 129" in cli("rank", folder, "--weakest", "129").error()
    assert "between 0 and 128, got -1" in cli("rank", folder, "--strongest", "-1").error()
    assert "unknown ranking 'beauty'" in cli("rank", folder, "--by", "beauty").error()


# --- the out folder


def test_rank_by_frequency_without_thresholds(
    measure: Callable[..., Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert measure("record", "--out", folder, "--quiet").code == 0
    said = cli("rank", folder, "--by", "activation_frequency").error()
    assert said.endswith(
        "not recorded under thresholds, which --by activation_frequency counts; `neuron-sparsity report` does that"
    )


def test_folder_that_cannot_be_written(measure: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/run", "/proc/run", "/dev/null"):
        assert "--out" in measure("record", "--out", out).error()


def test_folder_with_foreign_files(measure: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "holds other files" in measure("record", "--out", tmp_path).error()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_another_run(
    whole_run: Callable[[], Path], cli: Callable[..., Any], model_folder: Callable[[str], str], text_file: str
) -> None:
    folder = whole_run()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other_model = cli("report", model_folder("gpt2"), "--text", text_file, *SIZES, "--out", folder)
    other_text = cli("report", model_folder("llama"), "--text", text_file, "--n-ctx", "8", "--out", folder)
    assert "holds another run (model" in other_model.error()
    assert "holds another run (corpus" in other_text.error()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_full_disk_loses_nothing(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "ablation.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(store.os, "replace", full)
        assert "the disk is full" in measure("report", "--out", tmp_path / "run").error()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    tensors = {f"{name}.safetensors" for name in ("windows", "statistics", "saliency")}
    assert names == {"run.json", "sparsity.json", "ablation.partial.json"} | tensors
    monkeypatch.setattr("neuron_sparsity.pipeline.cett_ppl_sparsities", None)
    monkeypatch.setattr("neuron_sparsity.pipeline.record", None)
    monkeypatch.setattr("neuron_sparsity.pipeline.saliency", None)
    assert measure("report", "--out", tmp_path / "run").code == 0


def test_stdout_that_is_full(whole_run: Callable[[], Path]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "neuron_sparsity", "rank", str(whole_run())],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"


def test_reader_that_leaves(whole_run: Callable[[], Path]) -> None:
    command = f"{sys.executable} -m neuron_sparsity rank {whole_run()} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("", "")


# --- damaged run folders


def commands_on(folder: Path, measure: Callable[..., Any], cli: Callable[..., Any]) -> list[Any]:
    """Render again and measure again, without and with the model."""
    return [cli("report", folder), measure("report", "--out", folder)]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[1, 2]", "no schema number"),
        (lambda text: "\x00\xff", "cannot be read"),
        (lambda text: json.dumps(json.loads(text) | {"schema": 99}), "schema 99"),
    ],
    ids=["truncated", "empty", "list", "binary", "newer"],
)
def test_damaged_json(
    name: str, damage: Callable[[str], str], complaint: str, whole_run: Any, measure: Any, cli: Any
) -> None:
    folder = whole_run()
    path = folder / name
    path.write_text(damage(path.read_text()), encoding="latin-1")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for done in commands_on(folder, measure, cli):
        message = done.error()
        assert complaint in message
        assert name in message
    del before["windows.safetensors"]
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("name", ["sparsity.json", "ablation.json", "passage.json"])
def test_edited_json(name: str, whole_run: Any, measure: Any, cli: Any) -> None:
    """Whichever value of the file becomes a word or goes, nobody sees a traceback."""
    whole = whole_run()
    data = json.loads((whole / name).read_text())
    for key in data:
        if key == "schema":
            continue
        for edited in (data | {key: "edited"}, {other: data[other] for other in data if other != key}):
            (whole / name).write_text(json.dumps(edited))
            done = cli("report", whole)
            if done.code:
                message = done.error()
                assert str(whole) in message
                assert "unexpected" not in message
    again = measure("report", "--out", whole)
    if again.code:
        assert name in again.error()
    (whole / name).unlink()
    assert measure("report", "--out", whole).code == 0


def test_damaged_statistics(whole_run: Any, measure: Any, cli: Any) -> None:
    folder = whole_run()
    path = folder / "statistics.safetensors"
    whole, recorded = path.read_bytes(), store.read_tensors(path)[0]
    newer = whole.replace(b'\\"schema\\": 1', b'\\"schema\\": 9', 1)
    assert newer != whole
    for content, complaint in ((whole[:500], "cannot be read"), (b"", "cannot be read"), (newer, "schema 9")):
        path.write_bytes(content)
        for done in (*commands_on(folder, measure, cli), cli("rank", folder)):
            message = done.error()
            assert complaint in message
            assert path.name in message
    path.unlink()
    assert "does not exist" in cli("rank", folder).error()
    assert measure("report", "--out", folder).code == 0
    again = store.read_tensors(path)[0]
    assert all(torch.equal(again[name], tensor) for name, tensor in recorded.items())


def test_edited_statistics(whole_run: Any, cli: Any) -> None:
    folder = whole_run()
    path = folder / "statistics.safetensors"
    tensors, header = store.read_tensors(path)
    for name, tensor in tensors.items():
        store.write_tensors(path, tensors | {name: tensor[:1]}, header)
        assert path.name in cli("rank", folder).error()
        store.write_tensors(path, {other: tensors[other] for other in tensors if other != name}, header)
        assert path.name in cli("rank", folder).error()
    for key in header:
        if key not in ("schema", "provenance"):  # recordings of version 0.1.0 have no provenance
            store.write_tensors(path, tensors, {other: header[other] for other in header if other != key})
            assert path.name in cli("rank", folder).error()


def test_damaged_windows_are_written_again(whole_run: Any, measure: Any) -> None:
    folder = whole_run()
    path = folder / "windows.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert measure("report", "--out", folder).code == 0
    assert path.read_bytes() == whole


# --- memory, unforeseen errors, hostile names


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory: you tried to ..."),
    ],
)
@pytest.mark.parametrize("where", ["adapter.load_model", "perplexity._row_losses", "kernels.neuron_statistics"])
def test_out_of_memory_says_what_to_lower(
    error: Exception, where: str, measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    module, name = where.split(".")  # the package's public names hide some modules of the same name
    monkeypatch.setattr(importlib.import_module(f"neuron_sparsity.{module}"), name, fail)
    message = measure("report", "--out", tmp_path / "run", "--batch-size", "2").error()
    assert message.startswith("error: out of memory; lower --batch-size")


def test_unforeseen_error_is_one_line_and_debug_shows_the_rest(
    measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("blocks.0\nsecond line")

    monkeypatch.setattr("neuron_sparsity.pipeline.cett_ppl_sparsities", fail)
    message = measure("sparsity", "--out", tmp_path / "run").error()
    assert message.startswith("error: unexpected KeyError")
    assert message.endswith("NEURON_SPARSITY_DEBUG=1 shows where")
    monkeypatch.setenv(terminal.DEBUG, "1")
    with pytest.raises(KeyError, match="second line"):
        measure("sparsity", "--out", tmp_path / "run")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "neuron_sparsity", "rank", str(tmp_path)],
        env=os.environ | {terminal.DEBUG: "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RunFolderError" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "name", ["\x1b[2J\x1b[31mred", "two\nlines", "bell\a\r", "\u202egnp.exe", "byte\udcff", "x" * 5000]
)
def test_hostile_names(name: str, cli: Callable[..., Any], model_folder: Any, text_file: str, tmp_path: Path) -> None:
    assert len(cli("rank", name).error()) < 1000
    assert len(cli("record", name, "--text", text_file).error()) < 1000
    assert len(cli("record", model_folder("llama"), "--text", name).error()) < 1000
    assert len(cli("record", model_folder("llama"), "--text", text_file, "--device", name).error()) < 1000


def test_hostile_file_name_in_the_results(
    cli: Callable[..., Any], model_folder: Callable[[str], str], text_file: str, tmp_path: Path
) -> None:
    text = tmp_path / "\x1b[31mred.txt"
    text.write_bytes(Path(text_file).read_bytes())
    folder = tmp_path / "\x1b[2Jrun"
    done = cli("report", model_folder("llama"), "--text", text, *SIZES, "--out", folder)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert "\\x1b[31mred.txt" in done.out
    assert "\x1b" not in cli("rank", folder).out
    assert "\x1b" not in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_terminal_without_unicode(stream: str, whole_run: Any, tmp_path: Path) -> None:
    arguments = [str(whole_run())] if stream == "stdout" else [str(tmp_path / "\u00e9\u4e2d")]
    done = subprocess.run(
        [sys.executable, "-m", "neuron_sparsity", "rank", *arguments],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == (0 if stream == "stdout" else 1)
    assert "Traceback" not in done.stderr
    assert getattr(done, stream)
