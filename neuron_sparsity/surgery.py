"""Take neurons out of the MLPs of a Hugging Face model: the operations on its weights.

`pruning` decides what goes and in which form; here rows and columns are taken, means become biases, and the outcome is
compared with the model whose post-activations are replaced on the fly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from neuron_sparsity.blueprint import MLP, measured_mlps
from neuron_sparsity.errors import ModelError
from neuron_sparsity.plain import relative_error
from neuron_sparsity.weights import first_line

__all__ = ["add_zero_biases", "check_same_logits", "fold", "is_quantised", "shared_copy", "take_out"]

# Largest difference of the logits, relative to the largest logit: the same sums in another order.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_PROBE = 16  # tokens, if the model takes so many
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)


def shared_copy(model: Any, *, meta: bool = False) -> Any:
    """Return a model of its own in eval mode whose parameters share the memory of `model`'s; tied ones stay tied.

    With `meta` they have shapes only, and take no memory.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> made = shared_copy(model)
        >>> made.weight is model.weight, made.weight.data_ptr() == model.weight.data_ptr()
        (False, True)
    """
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(
            parameter.detach().to("meta") if meta else parameter.detach(), requires_grad=parameter.requires_grad
        )
        for parameter in model.parameters()
    }
    made = copy.deepcopy(model, shared).eval()
    if getattr(made, "hf_quantizer", None) is not None and not is_quantised(made):
        made.hf_quantizer.remove_quantization_config(made)  # or transformers would not save it
    return made


def is_quantised(model: Any) -> bool:
    """Whether weights are anything but numbers that can be taken one by one.

    Those of a GGUF file mostly are: transformers unpacks them when it reads them.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "gguf")
    packed = any(tensor.dtype in _PACKED and tensor.dim() > 1 for tensor in model.state_dict().values())
    return packed or getattr(method, "value", method) != "gguf"


def take_out(mlp: MLP, gone: Bool[Tensor, " neuron"], width: int) -> tuple[int, int]:
    """Take neurons out of an MLP, in place; the tensors it had are not changed.

    Args:
        mlp: Of a `shared_copy`.
        gone: Which neurons go.
        width: Neurons that are left, at least as many as stay. Where more are left than stay, the first of those that
            go are left as zeros.

    Returns:
        How many numbers went, and how many of those that are left were set to zero.

    Example:
        >>> down, up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4)
        >>> take_out(MLP(2, 4, False, (down, up)), torch.tensor([True, False, True, False]), width=3)
        (5, 5)
        >>> down.weight.shape, down.weight[:, 0].tolist()
        (torch.Size([2, 3]), [0.0, 0.0])
    """
    left = gone.logical_not()
    left[gone.nonzero()[: width - int(left.sum()), 0]] = True
    index, zero = left.nonzero()[:, 0], gone[left].nonzero()[:, 0]
    down, *ups = mlp.matrices
    n_numbers = _count(mlp)
    n_zeroed = _keep(down, index, zero, reads=True)
    for up in ups:
        rows = [part * mlp.d_mlp + index for part in range(_n_neuron(up) // mlp.d_mlp)]  # gate and up may be one matrix
        zeros = [part * len(index) + zero for part in range(len(rows))]
        n_zeroed += _keep(up, torch.cat(rows), torch.cat(zeros), reads=False)
    return n_numbers - _count(mlp), n_zeroed


def fold(down: Any, rows: Float[Tensor, "gone d_model"], means: Float[Tensor, " gone"]) -> int:
    """Add the constant `sum_i means[i] * rows[i]` to a down projection's bias, summed in float64.

    Args:
        down: The down projection, with or without a bias; changed in place.
        rows: Output weights of what went.
        means: What takes its place.

    Returns:
        Numbers of a bias that was not there before.

    Example:
        >>> down = nn.Linear(3, 2, bias=False)
        >>> fold(down, torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([0.5, -1.0])), down.bias.tolist()
        (2, [0.5, 0.0])
    """
    constant = means.to(rows.device, torch.float64) @ rows.double()
    bias, weight = down.bias, down.weight
    total = constant if bias is None else bias.detach().double() + constant
    down.bias = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)
    return down.bias.numel() if bias is None else 0


def add_zero_biases(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Give modules biases of zeros, by the names of the tensors; return how many numbers these are."""
    for name, shape in shapes.items():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        module.bias = nn.Parameter(module.weight.new_zeros(shape), requires_grad=module.weight.requires_grad)
    return sum(module_size for (module_size,) in shapes.values())


def check_same_logits(
    model: Any, pruned: Any, gone: Mapping[int, Bool[Tensor, " neuron"]], fill: Mapping[int, Float[Tensor, " neuron"]]
) -> None:
    """Compare a pruned model with one whose post-activations are replaced while it runs, on a few tokens.

    Args:
        model: `shared_copy` of the model as it was.
        pruned: The pruned one.
        gone: Which neurons went, by block.
        fill: What takes their place, by block.

    Raises:
        ModelError: If they differ, or the pruned one does not run.
    """
    embedding = model.get_input_embeddings().weight
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PROBE
    n_tokens = min(_PROBE, context) if context > 0 else _PROBE  # XLNet says -1
    tokens = (torch.arange(n_tokens, device=embedding.device) * 7 + 5).remainder(embedding.shape[0])[None]
    mlps = measured_mlps(model)
    with torch.no_grad(), ExitStack() as stack:
        for block, mask in gone.items():

            def before(module: nn.Module, args: tuple[Tensor, ...], block: int = block, mask: Tensor = mask) -> Any:
                z = args[0]
                return (torch.where(mask.to(z.device), fill[block].to(z), z), *args[1:])

            stack.callback(mlps[block].matrices[0].register_forward_pre_hook(before).remove)
        expected = model(input_ids=tokens, use_cache=False).logits.float()
        try:
            found = pruned(input_ids=tokens, use_cache=False).logits.float()
        except Exception as error:  # whatever a foreign model raises that relies on its width elsewhere
            raise ModelError(
                f"{type(pruned).__name__} does not run with its neurons taken out ({first_line(error)}); "
                "form='zeroed' keeps its shapes"
            ) from error
    error_found = relative_error(found, expected)
    if not error_found <= _TOLERANCE.get(embedding.dtype, 1e-4):
        raise ModelError(
            f"the pruned {type(pruned).__name__} misses the logits of the ablated one by {error_found:.1e} of their "
            "size: something between its up and down projection mixes neurons, or the weights are NaN; "
            "ablate(model, neurons) measures it without touching the weights"
        )


def _n_neuron(up: Any) -> int:
    return int(up.weight.shape[1 if _is_conv1d(up) else 0])


def _is_conv1d(matrix: nn.Module) -> bool:
    return type(matrix).__name__ == "Conv1D"  # of transformers: [in, out], nn.Linear has [out, in]


def _count(mlp: MLP) -> int:
    return sum(parameter.numel() for matrix in mlp.matrices for parameter in matrix.parameters())


def _keep(matrix: Any, index: Int[Tensor, " kept"], zero: Int[Tensor, " zeroed"], *, reads: bool) -> int:
    """Keep some of the neurons a matrix reads or writes, and set some of these to zero: return how many numbers."""
    dim = int(reads != _is_conv1d(matrix))
    parameters = {"weight": dim} if reads or matrix.bias is None else {"weight": dim, "bias": 0}
    n_zeroed = 0
    for name, axis in parameters.items():
        old = getattr(matrix, name)
        values = old.detach().index_select(axis, index.to(old.device)).index_fill_(axis, zero.to(old.device), 0)
        n_zeroed += len(zero) * (values.numel() // max(values.shape[axis], 1))
        setattr(matrix, name, nn.Parameter(values, requires_grad=old.requires_grad))
    size = len(index)
    for attribute in ("in_features", "nx") if reads else ("out_features", "nf"):
        if hasattr(matrix, attribute):
            setattr(matrix, attribute, size)
    return n_zeroed
