"""Every command on a tiny model: what it writes, what it prints, what it does not do twice."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neuron_sparsity import __version__
from neuron_sparsity.cli import DEFAULT_MODEL, one_flag_a_text
from neuron_sparsity.kernels import OPS
from neuron_sparsity.report._packed import unpack
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.taxonomy import Atlas

FILES = {
    "run.json",
    "sparsity.json",
    "statistics.safetensors",
    "saliency.safetensors",
    "ablation.json",
    "atlas.parquet",
    "passage.json",
    "windows.safetensors",
    "report.html",
}
SPARSITY_KEYS = {
    "schema": int,
    "metric": str,
    "p_percent": float,
    "reached": bool,
    "model": dict,
    "ppl_dense": float,
    "ppl_sparse": float,
    "ppl_increase_percent": float,
    "cett": float,
    "activation_ratio": float,
    "sparsity_ratio": float,
    "layers": list,
    "corpus": dict,
    "cost": dict,
    "provenance": dict,
}
ABLATION_KEYS = {
    "schema": int,
    "p_percent": float,
    "ranking": str,
    "replacement": str,
    "n_neurons": int,
    "n_removable": int,
    "removable": list,
    "ppl_dense": float,
    "ppl_ablated": float,
    "curve": list,
}


def has_keys(data: dict[str, Any], keys: dict[str, type]) -> bool:
    return all(isinstance(data.get(key), kind) for key, kind in keys.items())


def check_sparsity(data: dict[str, Any]) -> None:
    assert has_keys(data, SPARSITY_KEYS), data
    assert data["schema"] == 1
    assert data["metric"] == "cett_ppl"
    assert set(data["model"]) >= {"name", "n_layers", "d_model", "d_mlp", "activation", "gated"}
    assert (data["model"]["n_layers"], data["model"]["d_mlp"]) == (2, 64)
    assert all(set(layer) >= {"layer", "threshold", "cett", "activation_ratio"} for layer in data["layers"])
    assert set(data["corpus"]) >= {"name", "sha256", "n_tokens", "window", "scored_tokens"}
    assert set(data["cost"]) >= {"forward_passes", "seconds"}
    assert set(data["provenance"]) >= {"versions", "seed", "command"}
    assert data["sparsity_ratio"] == pytest.approx(1 - data["activation_ratio"])


def test_report_writes_every_file_and_a_summary(measure: Callable[..., Any], tmp_path: Path) -> None:
    done = measure("report", "--out", tmp_path / "run")
    assert (done.code, done.err) == (0, "")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert "CETT-PPL-1%" in done.out
    assert "removable for good" in done.out
    assert done.out.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    check_sparsity(json.loads((tmp_path / "run/sparsity.json").read_text()))
    ablation = json.loads((tmp_path / "run/ablation.json").read_text())
    assert has_keys(ablation, ABLATION_KEYS), ablation
    assert ablation["n_neurons"] == 128
    assert len(ablation["removable"]) == ablation["n_removable"]
    assert all(set(point) >= {"n_removed", "ppl"} for point in ablation["curve"])
    assert "<html" in (tmp_path / "run/report.html").read_text()


def test_quiet_prints_nothing(measure: Callable[..., Any], tmp_path: Path) -> None:
    for command in ("record", "sparsity", "ablate", "report"):
        done = measure(command, "--out", tmp_path / command, "--quiet")
        assert (done.code, done.out, done.err) == (0, "", ""), command


def test_several_p_have_a_file_each_and_are_told_together(
    measure: Callable[..., Any], text_file: str, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "run", "--p", "3", "--p", "5")
    found = measure("sparsity", *out, "--json").json
    files = [json.loads((tmp_path / "run" / name).read_text()) for name in ("sparsity.json", "sparsity-p5.json")]
    assert [{"schema": 1} | one for one in found["sparsity"]] == files
    assert [one["p_percent"] for one in files] == [3.0, 5.0]
    said = measure("sparsity", *out).out
    assert "CETT-PPL-3%: activation ratio" in said
    assert "CETT-PPL-5%: activation ratio" in said
    by_kl = measure("sparsity", "--out", tmp_path / "kl", "--metric", "kl", "--json").json
    assert by_kl["metric"] == "cett_kl"
    assert {one["metric"] for one in by_kl["estimates"]} <= {"cett_ppl", "cett_kl"}
    page = tmp_path / "other.txt"
    page.write_text(Path(text_file).read_text(encoding="utf-8")[400:], encoding="utf-8")
    other = measure("sparsity", "--out", tmp_path / "other", "--calibration", page, "--json").json
    assert other["calibration"]["name"] == "other.txt"
    assert other["calibration"]["sha256"] != other["corpus"]["sha256"]
    assert "one of ppl, kl" in measure("sparsity", "--out", tmp_path / "x", "--metric", "js").error()


def test_json_of_each_command_is_all_of_stdout(measure: Callable[..., Any], cli: Any, tmp_path: Path) -> None:
    recorded = measure("record", "--out", tmp_path / "record", "--json")
    assert recorded.json["n_tokens"] == 192
    found = measure("sparsity", "--out", tmp_path / "sparsity", "--json")
    check_sparsity(found.json)
    assert found.json == json.loads((tmp_path / "sparsity/sparsity.json").read_text())
    removed = measure("ablate", "--out", tmp_path / "ablate", "--ranking", "activation_frequency", "--json")
    assert has_keys(removed.json, ABLATION_KEYS)
    assert removed.json["ranking"] == "activation_frequency"
    ranked = cli("rank", tmp_path / "record", "--weakest", "3", "--json")
    scores = [entry["score"] for entry in ranked.json["neurons"]]
    assert len(scores) == 3
    assert scores == sorted(scores)
    assert "saliency.safetensors does not exist" in cli("rank", tmp_path / "record", "--by", "fisher").error()
    again = cli("report", tmp_path / "record", "--json")
    assert again.json["folder"] == str(tmp_path / "record")
    examined = cli("doctor", "--json")
    assert examined.json["versions"]["neuron_sparsity"] == __version__
    for done in (recorded, found, removed, ranked, again, examined):
        assert (done.code, done.err) == (0, "")
        assert done.out.count("\n") == 1


def test_rank_lists_weakest_and_strongest(whole_run: Callable[[], Path], cli: Callable[..., Any]) -> None:
    folder = whole_run()
    weakest, strongest = cli("rank", folder), cli("rank", folder, "--strongest", "2", "--by", "maximum")
    assert len(weakest.out.splitlines()) == 21
    assert len(strongest.out.splitlines()) == 3
    assert strongest.out.startswith("strongest by largest contribution")
    assert cli("rank", folder, "--weakest", "0").out.count("\n") == 1


def test_doctor_names_versions_and_devices(cli: Callable[..., Any]) -> None:
    done = cli("doctor")
    assert done.code == 0
    assert all(word in done.out for word in ("python", "torch", "cpu:", "gpu:", "TransformerBridge", "built-ins:"))


def test_doctor_says_which_backend_each_op_runs_on_and_why(cli: Callable[..., Any]) -> None:
    found = cli("doctor", "--json").json["kernels"]
    assert set(found) == {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    for op in OPS:
        assert found["cpu"][op] == {"name": "torch", "reason": "tensors on cpu"}
    assert found["cpu"]["triton"]["name"] in ("runs", "refused")
    assert "kernels on cpu: torch (tensors on cpu): neuron_statistics" in cli("doctor").out


def test_a_backend_that_cannot_run_is_refused_before_any_work(
    measure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_sparsity.kernels.backend._interpreted", lambda: False)
    error = measure("record", "--out", tmp_path / "run", "--device", "cpu", "--backend", "triton").error()
    assert "backend 'triton' cannot run: it needs CUDA tensors" in error
    assert "one of auto, torch, triton" in measure("record", "--out", tmp_path / "run", "--backend", "cuda").error()
    assert not (tmp_path / "run").exists()


def test_version(cli: Callable[..., Any]) -> None:
    assert cli("--version").out == f"neuron-sparsity {__version__}\n"


def test_run_folder_is_rendered_again_without_a_model(
    whole_run: Callable[[], Path], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = whole_run()
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    monkeypatch.setattr("neuron_sparsity.adapter.load_model", refuse)
    done = cli("report", folder)
    assert (done.code, done.err) == (0, "")
    assert (folder / "report.html").read_bytes() == before
    assert "--out" in cli("report", folder, "--out", "elsewhere").error()


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was done already")


def test_finished_steps_are_not_taken_again(
    whole_run: Callable[[], Path], measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = whole_run()
    before = {name: (folder / name).read_bytes() for name in FILES}
    for step in ("cett_ppl_sparsities", "record", "saliency", "removable_sets", "token_activity"):
        monkeypatch.setattr(f"neuron_sparsity.pipeline.{step}", refuse)
    done = measure("report", "--out", folder)
    assert (done.code, done.err) == (0, "")
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert "this was done already" in measure("report", "--out", folder, "--seed", "1").error()
    assert "this was done already" in measure("report", "--out", folder, "--p", "2").error()


def results(folder: Path) -> dict[str, Any]:
    """What was measured, less what differs from one run to the next: seconds and the command."""
    found: dict[str, Any] = {name: json.loads((folder / name).read_text()) for name in FILES if name.endswith(".json")}
    for data in found.values():
        data.pop("cost", None)
        data.pop("provenance", None)
    return found | {
        name: {key: value.tolist() for key, value in load_file(folder / name).items()}
        for name in ("statistics.safetensors", "saliency.safetensors", "windows.safetensors")
    }


STEPS = {
    "sparsity": ("neuron_sparsity.evaluation", "truncated_losses", {"run.json", "windows.safetensors"}),
    "record": ("neuron_sparsity.kernels", "neuron_statistics", {"sparsity.json", "record.partial.safetensors"}),
    "ablate": (
        "neuron_sparsity.removal",
        "token_losses",
        {"sparsity.json", "statistics.safetensors", "saliency.safetensors", "ablation.partial.json"},
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_report_goes_on_and_ends_equal(
    step: str,
    whole_run: Callable[[], Path],
    measure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import importlib

    name, function, left_behind = STEPS[step]
    module = importlib.import_module(name)
    original = getattr(module, function)
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, function, interrupted)
        done = measure("report", "--out", tmp_path / "run", "--batch-size", "2")
    assert (done.code, done.out) == (130, "")
    assert done.err.startswith("error: interrupted")
    assert done.err.count("\n") == 1
    assert left_behind <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "run/report.html").exists()
    finished = measure("report", "--out", tmp_path / "run", "--batch-size", "2")
    assert (finished.code, finished.err) == (0, "")
    whole = measure("report", "--out", tmp_path / "whole", "--batch-size", "2")
    assert whole.code == 0
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def plain_ppl(folder: str, tokens: torch.Tensor, scored: torch.Tensor) -> float:
    """Perplexity with nothing but transformers and the windows of a run folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(tokens.long()).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:].long(), reduction="none")
    return math.exp(float(losses[scored[:, 1:]].double().mean()))


def test_windows_let_anyone_recompute_the_dense_perplexity(
    whole_run: Callable[[], Path], model_folder: Callable[[str], str]
) -> None:
    folder = whole_run()
    windows = load_file(folder / "windows.safetensors")
    sparsity, ablation = (json.loads((folder / f"{name}.json").read_text()) for name in ("sparsity", "ablation"))
    assert windows["tokens"].dtype == torch.int32
    assert windows["scored"].dtype == torch.bool
    searched = plain_ppl(model_folder("llama"), windows["tokens"], windows["scored"])
    heldout = plain_ppl(model_folder("llama"), windows["heldout_tokens"], windows["heldout_scored"])
    assert sparsity["ppl_dense"] == pytest.approx(searched, rel=1e-5)
    assert ablation["ppl_dense"] == pytest.approx(searched, rel=1e-5)
    assert ablation["heldout"]["ppl_dense"] == pytest.approx(heldout, rel=1e-5)


def test_windows_fit_every_result_of_a_shared_folder(
    measure: Callable[..., Any], tmp_path: Path, model_folder: Callable[[str], str]
) -> None:
    out = ("--out", tmp_path / "run", "--json")
    sparsity, ablation = measure("sparsity", *out).json, measure("ablate", *out).json
    windows = load_file(tmp_path / "run/windows.safetensors")
    llama = model_folder("llama")
    assert plain_ppl(llama, windows["tokens"], windows["scored"]) == pytest.approx(sparsity["ppl_dense"], rel=1e-5)
    part = plain_ppl(llama, windows["calibration_tokens"], windows["calibration_scored"])
    assert part == pytest.approx(ablation["ppl_dense"], rel=1e-5)


def test_stdout_of_libraries_stays_out_of_the_result(
    measure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuron_sparsity import adapter

    original = adapter.load_model

    def chatty(*arguments: Any, **options: Any) -> Any:
        print("Loaded pretrained model into HookedTransformer")
        return original(*arguments, **options)

    monkeypatch.setattr(adapter, "load_model", chatty)
    assert measure("record", "--out", tmp_path / "run", "--json").json["n_tokens"] == 192


def test_folder_is_named_after_model_and_text_by_default(
    measure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[[str], str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert measure("record").code == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"{Path(model_folder('llama')).name}-page.txt"]


def test_help_names_the_default_model_and_every_command(cli: Callable[..., Any]) -> None:
    done = cli("--help")
    assert done.code == 0
    assert all(name in done.out for name in ("report", "record", "sparsity", "rank", "ablate", "doctor"))
    assert DEFAULT_MODEL in cli("sparsity", "--help").out


@pytest.mark.parametrize("module", [["-m", "neuron_sparsity"], ["-m", "neuron_sparsity.cli"]])
def test_a_real_process_says_what_fails_in_one_line(module: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *module, "rank", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path} is no run folder (it has no run.json); name a folder made by `record`\n"


def test_a_real_process_measures_without_a_word_on_stderr(
    tmp_path: Path, model_folder: Callable[[str], str], text_file: str
) -> None:
    command = [sys.executable, "-m", "neuron_sparsity", "sparsity", model_folder("llama"), "--text", text_file]
    command += ["--tokens", "64", "--n-ctx", "16", "--out", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    check_sparsity(json.loads(done.stdout))
    assert json.loads(done.stdout)["provenance"]["command"].startswith("neuron-sparsity sparsity ")


@pytest.mark.parametrize("family", ["opt", "gpt2", "neox"])
def test_other_families_are_measured_from_a_folder(
    family: str, cli: Callable[..., Any], model_folder: Callable[[str], str], text_file: str, tmp_path: Path
) -> None:
    sizes = ("--tokens", "64", "--n-ctx", "16", "--out", tmp_path / "run", "--json")
    done = cli("sparsity", model_folder(family), "--text", text_file, *sizes)
    assert (done.code, done.err) == (0, "")
    check_sparsity(done.json)


def test_one_text_flag_takes_several_files() -> None:
    given = ["report", "model", "--text", "a", "b", "c", "--p", "1"]
    assert one_flag_a_text(given) == ["report", "model", "--text", "a", "--text", "b", "--text", "c", "--p", "1"]
    assert one_flag_a_text(["report", "--text", "a", "--text", "b"]) == ["report", "--text", "a", "--text", "b"]
    assert one_flag_a_text(["rank", "folder"]) == ["rank", "folder"]
    several = ["sparsity", "--p", "5", "10", "model", "--json"]
    assert one_flag_a_text(several) == ["sparsity", "--p", "5", "--p", "10", "model", "--json"]
    assert one_flag_a_text(["report", "--p", "5", "10"]) == ["report", "--p", "5", "10"]


def test_device_auto(measure: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="pip install -e '.[large]'")
    options = ("--json", "--p", 5)
    spread, kept = (
        measure("sparsity", *options, "--device", device, "--out", tmp_path / device).json for device in ("auto", "cpu")
    )
    assert spread["model"] == kept["model"]
    assert spread["activation_ratio"] == pytest.approx(kept["activation_ratio"], abs=1e-4)


def test_device_auto_without_accelerate(
    measure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_sparsity.placement.find_spec", lambda name: None)
    complaint = measure("record", "--device", "auto", "--out", tmp_path / "run").error()
    assert "needs the package accelerate" in complaint
    assert not (tmp_path / "run").exists()


def test_report_finds_what_kind_of_neuron_each_one_is_and_shows_it(
    measure: Callable[..., Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    run, without = tmp_path / "run", tmp_path / "without"
    assert measure("report", "--out", run, "--quiet").code == 0
    assert measure("report", "--no-atlas", "--out", without, "--quiet").code == 0
    assert not (without / "atlas.parquet").exists()
    made = Atlas.load(run)
    assert "n_triggers" in made.table
    assert "top_logit_tokens" in made.table
    for folder, expected in ((run, True), (without, False)):
        header, _ = packed_table(folder / "report.html")
        assert ("position_information_bits" in {column["key"] for column in header["columns"]}) is expected
    first = packed_table(run / "report.html")[0]
    (run / "report.html").unlink()
    assert cli("report", run, "--quiet").code == 0
    assert packed_table(run / "report.html")[0] == first  # rendered again, it is still there


def test_a_recording_of_other_weights_is_recorded_anew(
    measure: Callable[..., Any], whole_run: Callable[[], Path]
) -> None:
    folder = whole_run()
    whole = NeuronStatistics.load(folder)
    replace(whole, model=replace(whole.model, fingerprint="0" * 16)).save(folder)
    done = measure("report", "--out", folder)
    assert (done.code, done.err) == (0, "")
    assert NeuronStatistics.load(folder).model == whole.model


def packed_table(page: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the columns of a page's table of neurons."""
    found = re.search(r'<script type="application/octet-stream">([^<]+)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    return unpack(found[1])
