"""A Hugging Face checkpoint whose MLPs changed shape, so that plain `from_pretrained` loads it.

1. Which configuration describes the new shapes is not looked up by architecture: settings that may be the width (an
   integer equal to it, or a list of widths) and those that may put biases on (a switch with `bias` in its name) are
   tried one after the other on torch's meta device, until the model class itself builds tensors of exactly these names
   and shapes. Bias vectors that come along are returned, to be filled with zeros.
2. The folder is written beside its place and moved there: it is there whole or not at all.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.store import write_bytes, write_json
from neuron_sparsity.weights import first_line

__all__ = ["check_vacant", "fitting_settings", "shapes_of", "write_checkpoint"]

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all saved tensors of the model that a configuration describes; nothing is allocated.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> shapes_of(GPT2LMHeadModel, GPT2Config(n_layer=1, n_inner=100))["transformer.h.0.mlp.c_fc.weight"]
        (768, 100)
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        built = model_class(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def fitting_settings(
    model_class: Any, config: Any, shapes: Shapes, d_mlp: int, widths: Sequence[int]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]] | None:
    """Return the settings of a configuration under which `model_class` has tensors of these names and shapes.

    Args:
        model_class: Class of a Hugging Face causal language model.
        config: Its configuration before the change; not changed.
        shapes: Names and shapes of the tensors that the changed model saves.
        d_mlp: Width of its MLPs before the change.
        widths: Width of the MLP of each block after it.

    Returns:
        The settings that change (of the text model's part), and names and shapes of the bias vectors that they put on
        beside `shapes`; None if there are no such settings.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> wanted = shapes_of(GPT2LMHeadModel, GPT2Config(n_layer=2, n_inner=100))
        >>> fitting_settings(GPT2LMHeadModel, GPT2Config(n_layer=2), wanted, 3072, [100, 100])
        ({'n_inner': 100}, {})
    """
    text = config.get_text_config()
    for bias in _bias_settings(text):
        for width in _width_settings(text, d_mlp, widths):
            tried = copy.deepcopy(config)
            try:
                for name, value in (*width, *bias):
                    setattr(tried.get_text_config(), name, value)
                built = shapes_of(model_class, tried)
            except Exception:  # whatever a foreign class raises on a setting that is not what it seems
                continue
            extra = sorted(set(built) - set(shapes))
            only_biases = all(name.endswith(".bias") and len(built[name]) == 1 for name in extra)
            if only_biases and all(built.get(name) == shape for name, shape in shapes.items()):
                return dict((*width, *bias)), {name: built[name] for name in extra}
    return None


Settings = tuple[tuple[str, Any], ...]


def _width_settings(text: Any, d_mlp: int, widths: Sequence[int]) -> Iterator[Settings]:
    """Yield settings that may make MLPs this wide: none, one width, a list of widths."""
    yield ()
    values = {name: value for name, value in text.to_dict().items() if not isinstance(value, bool)}
    told = ("intermediate", "inner", "ffn")
    for name, value in sorted(values.items(), key=lambda item: not any(word in item[0] for word in told)):
        named = any(word in name for word in told)
        if len(set(widths)) == 1 and (value == d_mlp or (value is None and named)):
            yield ((name, widths[0]),)
        if isinstance(value, list) and len(value) == len(widths) and d_mlp in value:
            yield ((name, list(widths)),)


def _bias_settings(text: Any) -> Iterator[Settings]:
    """Yield settings that may put biases on: none, each switch for biases turned."""
    yield ()
    for name, value in text.to_dict().items():
        if "bias" in name and isinstance(value, bool):
            yield ((name, not value),)


def check_vacant(out: Path) -> None:
    """Refuse a folder that holds anything, or a file.

    Raises:
        RunFolderError: If it does.
    """
    if out.is_dir() and any(out.iterdir()):
        raise RunFolderError(f"{out} is not empty; name an empty or new folder for the checkpoint")
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; name an empty or new folder for the checkpoint")


def write_checkpoint(out: Path, model: Any, tokenizer: Any, record: Mapping[str, Any], card: str) -> None:
    """Write weights, configuration, generation configuration, tokenizer, `pruning.json` and `README.md`.

    Args:
        out: Folder that is empty or not there.
        model: Hugging Face model whose configuration describes it.
        tokenizer: Or None.
        record: What `pruning.json` says.
        card: The model card.

    Raises:
        RunFolderError: If the folder is not empty or cannot be written; then nothing is there.
    """
    check_vacant(out)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        with _no_bars():
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        write_json(temporary / "pruning.json", record)
        write_bytes(temporary / "README.md", card.encode())
        temporary.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        temporary.replace(out)
    except RunFolderError:
        raise
    except Exception as error:  # the disk's errors come as those of safetensors and tokenizers too
        raise RunFolderError(f"{out} cannot be written ({first_line(error)}); name another folder") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()
