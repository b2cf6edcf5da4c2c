"""What measuring a model will need, computed from its configuration: memory, disk and time, without its weights.

1. `blueprint` counts the model: parameters, layers with an MLP, their width.
2. Weights are parameters times the bytes of the type they are loaded in.
3. What the recorder keeps a neuron, and what a batch needs beside it, follows from the code that runs: the tensors of
   `StatisticsState` and of `NeuronStatistics`, the buffers of the kernels. `benchmarks/memory.py` measures it against
   the real recorder.
4. Time is in F, one dense forward pass with loss on the same tokens. How many F a step takes was measured on one model
   and is no property of this one: each number says where it is from.

What it does not count: the Python process itself (about half a gigabyte with torch and transformers), what an allocator
keeps of freed memory, and copies that TransformerLens makes of weights it splits (fused query, key and value).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_sparsity.blueprint import Blueprint, blueprint
from neuron_sparsity.footprint import Footprint
from neuron_sparsity.perplexity import _BATCH_TOKENS
from neuron_sparsity.typed import said

__all__ = ["Plan", "Step", "plan", "plan_for"]

DEVICE_BYTES = 80_000_000_000
"""What a device of the 80 GB class can hold. Its memory is 80 GiB; the rest is left to driver and allocator."""

_DEFAULT_N_CTX = 512
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_MEASURED = "measured on smollm2-135m, float32, two CPU cores: "
_COST = {  # dense passes with loss on the tokens of the step
    "record": (0.90, _MEASURED + "docs/measured.md, Cost"),
    "sparsity": (4.2, _MEASURED + "docs/measured.md, Cost"),
    "ablate": (10.0, _MEASURED + "docs/scale.md, How long"),
}


@dataclass(frozen=True)
class Step:
    """One command's need.

    Attributes:
        name: The command.
        dense_passes: Time in F: dense forward passes with loss on the same tokens.
        peak_bytes: Largest memory on the device, weights included.
        source: Where `dense_passes` is from.
    """

    name: str
    dense_passes: float
    peak_bytes: int
    source: str


@dataclass(frozen=True)
class Plan:
    """What measuring a model will need. Bytes are live tensors, computed and not measured.

    Attributes:
        model: Sizes of the model.
        dtype: Type of the weights.
        device: `cpu` or `cuda`: a batch is larger on a GPU, and statistics come back to the machine's memory.
        n_tokens: Tokens to measure on, cut down to whole windows.
        n_ctx: Tokens a window.
        batch_size: Windows a forward pass. A run takes fewer where its memory is short.
        weights_bytes: All parameters.
        statistics_bytes: What a recording keeps of every neuron while it runs; no token makes it larger.
        result_bytes: The finished statistics, contexts of examples included.
        batch_bytes: Activations and temporaries of a batch in a recording.
        run_folder_bytes: `statistics.safetensors` and `windows.safetensors`. The page and the JSON files are a few
            megabytes more, and a recording that is under way keeps its state there too.
        peak_bytes: Largest memory of any step on one device that holds the whole model.
        host_bytes: Largest memory of the machine itself beside the GPU, on which weights arrive and results are kept;
            0 on the CPU, where all is in `peak_bytes`.
        dense_pass_flop: Floating-point operations of one F: two for each parameter of a matrix and token.
        steps: Time and peak of each command.
    """

    model: Blueprint
    dtype: str
    device: str
    n_tokens: int
    n_ctx: int
    batch_size: int
    weights_bytes: int
    statistics_bytes: int
    result_bytes: int
    batch_bytes: int
    run_folder_bytes: int
    peak_bytes: int
    host_bytes: int
    dense_pass_flop: float
    steps: tuple[Step, ...]

    @property
    def n_neurons(self) -> int:
        """Neurons of all layers."""
        return self.model.n_layers * self.model.d_mlp

    def peak_on(self, n_devices: int) -> int:
        """Return the largest memory of the fullest device where whole blocks are spread evenly over several.

        What is outside the blocks (embedding, unembedding) is taken to lie on that device too, and a batch passes
        through every one.
        """
        model, size = self.model, _ITEMSIZE[self.dtype]
        share = -(-model.n_blocks // n_devices) / model.n_blocks
        outside = model.n_parameters - model.n_stack_parameters
        held = outside * size + share * (model.n_stack_parameters * size + self.statistics_bytes)
        return round(held) + self.peak_bytes - self.weights_bytes - self.statistics_bytes

    def n_devices(self, device_bytes: int = DEVICE_BYTES) -> int | None:
        """Return how many devices hold the model while it is measured; None if even a block a device is too much."""
        counts = range(1, self.model.n_blocks + 1)
        return next((n for n in counts if self.peak_on(n) <= device_bytes), None)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        model = asdict(self.model) | {"layers": list(self.model.layers), "n_layers": self.model.n_layers}
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        devices = {"n_neurons": self.n_neurons, "n_devices_80gb": self.n_devices()}
        return own | {"model": model, "steps": [asdict(step) for step in self.steps]} | devices


def plan(
    model: str,
    *,
    n_tokens: int = 12_288,
    n_ctx: int | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Return what measuring a model will need: no weights are read, and nothing runs.

    Args:
        model: A built-in name, a Hugging Face name, a local folder (only its `config.json` is read) or a `.gguf` file
            (only its metadata).
        n_tokens: Tokens to measure on.
        n_ctx: Tokens a window; the model's, at most 512, if None.
        batch_size: Windows a forward pass; what a run takes at most, if None.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        device: Such as `"cuda"` or `"cpu"`, which need not be there; the first GPU if there is one, else the CPU, if
            None or `"auto"`.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        Memory, disk and time.

    Raises:
        ModelError: If the configuration cannot be found, or the model has no MLP neurons that could be measured.
        ValueError: If a size, the type or the device cannot be.
    """
    if not isinstance(model, str | Path):
        raise TypeError(
            f"model must be a name, a folder or a .gguf file, got {said(model)}; a plan is made before loading"
        )
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in _ITEMSIZE:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    kind = _device_kind(device)
    sizes = blueprint(str(model), trust_remote_code=trust_remote_code)
    return plan_for(sizes, n_tokens=n_tokens, n_ctx=n_ctx, batch_size=batch_size, dtype=dtype, device=kind)


def plan_for(
    model: Blueprint,
    *,
    n_tokens: int = 12_288,
    n_ctx: int | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> Plan:
    """Return what measuring a model of known sizes will need; arguments as `plan`.

    Raises:
        ValueError: If a size cannot be.

    Example:
        >>> from transformers import GPT2Config
        >>> from neuron_sparsity.blueprint import draw
        >>> gpt2 = plan_for(draw(GPT2Config(), name="gpt2"), n_tokens=8192)
        >>> gpt2.weights_bytes, gpt2.statistics_bytes, gpt2.batch_size
        (497759232, 22855680, 2)
    """
    limit = model.max_ctx
    n_ctx = min(limit or _DEFAULT_N_CTX, _DEFAULT_N_CTX) if n_ctx is None else n_ctx
    if n_ctx < 2 or (limit is not None and n_ctx > limit):
        allowed = "at least 2" if n_ctx < 2 else f"at most the model's {limit}"
        raise ValueError(f"n_ctx must be {allowed}, got {n_ctx}")
    if n_tokens < n_ctx:
        raise ValueError(f"{n_tokens} tokens do not fill a window of {n_ctx}; raise n_tokens or lower n_ctx")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    n_windows = n_tokens // n_ctx
    most = max(1, _BATCH_TOKENS.get(device, 4096) // n_ctx)
    batch_size = min(most if batch_size is None else batch_size, n_windows)
    size = _ITEMSIZE[dtype]
    need = Footprint(model.n_layers, model.d_mlp, model.d_model, n_ctx, batch_size, size, device, n_cuts=1)
    weights = model.n_parameters * size
    beside = {"record": need.recording, "sparsity": need.search(model.n_vocab), "ablate": need.removal(model.n_vocab)}
    multiplied = model.n_parameters - (0 if model.tied else model.n_embedding_parameters)
    return Plan(
        model=model,
        dtype=dtype,
        device=device,
        n_tokens=n_windows * n_ctx,
        n_ctx=n_ctx,
        batch_size=batch_size,
        weights_bytes=weights,
        statistics_bytes=need.state,
        result_bytes=need.result,
        batch_bytes=need.batch,
        run_folder_bytes=need.result + need.windows(n_windows),
        peak_bytes=weights + max(beside.values()),
        host_bytes=0 if device == "cpu" else max(weights, need.result),
        dense_pass_flop=2.0 * multiplied * n_windows * n_ctx,
        steps=tuple(Step(name, cost, weights + beside[name], source) for name, (cost, source) in _COST.items()),
    )


def _device_kind(device: str | None) -> str:
    if device in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device must be such as cpu or cuda, got {device!r}") from error
