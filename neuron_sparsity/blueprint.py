"""What a model is made of, without its weights: its configuration, built by transformers on torch's meta device.

1. transformers builds the model class that the configuration names, whatever its architecture. On the meta device a
   tensor has a shape and no storage, so that a model of 70 billion parameters takes a second and no memory.
2. The MLPs are found in it by shape, as `plain.down_projections` finds them: the residual width is what most matrices
   of a layer read; a down projection writes it, from a width that one or two matrices write (the up projection, and
   the gate, apart or in one). Attention (told by its class) and what holds a convolution are left out.
3. Where the shapes do not tell, the model is refused: a plan for the wrong layers is worse than none.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from neuron_sparsity.errors import ModelError
from neuron_sparsity.placement import device_of
from neuron_sparsity.weights import first_line, load_config

__all__ = ["MLP", "Blueprint", "blueprint", "draw", "measured_mlps", "mlp_outputs", "moved"]


@dataclass(frozen=True)
class Blueprint:
    """Sizes of a model, all counted on the model that transformers builds.

    Attributes:
        name: Name it was asked for by.
        architecture: Class of the model.
        layers: Block index of each layer with an MLP.
        d_model: Width of the residual stream.
        d_mlp: Neurons a layer.
        gated: Whether the MLP has a gate beside its up projection.
        n_vocab: Rows of the unembedding.
        max_ctx: Longest context, or None where the configuration sets no limit.
        n_blocks: Blocks, with an MLP or without.
        n_parameters: Parameters of the whole model; tied ones count once.
        n_mlp_parameters: Those of the MLPs' projections, with biases.
        n_stack_parameters: Those of all blocks together.
        n_embedding_parameters: Those of the input embedding, which a forward pass looks up and does not multiply.
        tied: Whether the unembedding is the input embedding.
    """

    name: str
    architecture: str
    layers: tuple[int, ...]
    d_model: int
    d_mlp: int
    gated: bool
    n_vocab: int
    max_ctx: int | None
    n_blocks: int
    n_parameters: int
    n_mlp_parameters: int
    n_stack_parameters: int
    n_embedding_parameters: int
    tied: bool

    @property
    def n_layers(self) -> int:
        """Layers with an MLP, the ones that are measured."""
        return len(self.layers)


def blueprint(model: str, *, trust_remote_code: bool = False) -> Blueprint:
    """Return the sizes of a model by its name; no weights are read.

    Args:
        model: A built-in name, a Hugging Face name, a local folder (only its `config.json` is read) or a `.gguf` file
            (only its metadata).
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ModelError: If the configuration cannot be found or is that of no causal language model, or the model has no
            MLP neurons that could be measured.
    """
    return draw(
        load_config(model, trust_remote_code=trust_remote_code), name=model, trust_remote_code=trust_remote_code
    )


def draw(config: Any, *, name: str, trust_remote_code: bool = False) -> Blueprint:
    """Return the sizes of the model that a Hugging Face configuration describes.

    Args:
        config: A configuration of transformers.
        name: Name to record.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ModelError: As `blueprint`.

    Example:
        >>> from transformers import GPT2Config
        >>> gpt2 = draw(GPT2Config(), name="gpt2")
        >>> gpt2.n_parameters, gpt2.n_layers, gpt2.d_model, gpt2.d_mlp, gpt2.gated
        (124439808, 12, 768, 3072, False)
    """
    model = _on_meta(config, name, trust_remote_code)
    # Nothing runs here, and sizes are the same whichever of several equal matrices is taken for the down projection.
    stack, mlps = _measured_stack(model, lambda: list(_matrices(model)))
    widths = {(mlp.d_mlp, mlp.d_model) for mlp in mlps.values()}
    if len(widths) > 1:
        raise ModelError(f"layers differ in width ({sorted(widths)}); only models of one d_mlp can be measured")
    first = next(iter(mlps.values()))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Blueprint(
        name=name,
        architecture=type(model).__name__,
        layers=tuple(mlps),
        d_model=first.d_model,
        d_mlp=first.d_mlp,
        gated=first.gated,
        n_vocab=int(embedding.weight.shape[0] if head is None else head.weight.shape[0]),
        max_ctx=limit if limit is not None and limit > 0 else None,  # XLNet says -1
        n_blocks=len(stack),
        n_parameters=_count([model]),
        n_mlp_parameters=_count([matrix for mlp in mlps.values() for matrix in mlp.matrices]),
        n_stack_parameters=_count(stack),
        n_embedding_parameters=_count([embedding]),
        tied=head is not None and head.weight is embedding.weight,
    )


def mlp_outputs(model: nn.Module) -> dict[int, nn.Module]:
    """Return the down projection of every block of a Hugging Face model that has an MLP, by the block's index.

    Raises:
        ModelError: If there is none, or they cannot be told apart.
    """
    return {index: mlp.matrices[0] for index, mlp in _measured_stack(model)[1].items()}


@dataclass(frozen=True)
class MLP:
    """The matrices of one block's MLP.

    Attributes:
        d_model: Width of the residual stream.
        d_mlp: Neurons.
        gated: Whether there is a gate beside the up projection, apart or in one matrix with it.
        matrices: The down projection, then what writes its input.
    """

    d_model: int
    d_mlp: int
    gated: bool
    matrices: tuple[nn.Module, ...]


def measured_mlps(model: nn.Module) -> dict[int, MLP]:
    """Return the MLP of each block of a Hugging Face model that has one, by the block's index.

    Raises:
        ModelError: If there is none, or shapes do not tell which one is measured, or a block is a mixture of experts.
    """
    return _measured_stack(model)[1]


def moved(mlps: Mapping[int, MLP], source: nn.Module, copied: nn.Module) -> dict[int, MLP]:
    """Return the MLPs of a copy of a model, module by module those that are known of the model itself."""
    places = {id(old): new for old, new in zip(source.modules(), copied.modules(), strict=True)}
    return {
        block: replace(mlp, matrices=tuple(places[id(matrix)] for matrix in mlp.matrices))
        for block, mlp in mlps.items()
    }


def _on_meta(config: Any, name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a configuration makes a foreign class raise
        raise ModelError(
            f"model {name!r} cannot be built from its configuration ({type(error).__name__}: {first_line(error)}); "
            "name a causal language model that this version of transformers knows"
        ) from error


def _measured_stack(
    model: nn.Module, ran: Callable[[], list[nn.Module]] | None = None
) -> tuple[Sequence[nn.Module], dict[int, MLP]]:
    """Return the decoder's blocks, and the MLP of each block that has one.

    Args:
        model: A Hugging Face model.
        ran: Tells in which order matrices run; by default, two tokens are run where it must be known.

    Raises:
        ModelError: If there is none, several stacks have some, or a block holds a mixture of experts.
    """
    found = []
    inside: set[int] = set()
    ran = cache(partial(_run_order, model)) if ran is None else ran
    for stack in model.modules():  # outer lists come before those inside them
        if not isinstance(stack, nn.ModuleList) or id(stack) in inside:
            continue
        d_model = _residual_width(stack)
        mlps = {index: mlp for index, block in enumerate(stack) if (mlp := _mlp_of(index, block, d_model, ran))}
        if mlps:
            found.append((stack, mlps))
            inside |= {id(module) for module in stack.modules()}
    if len(found) > 1:  # a model that sees or hears has stacks for that beside the one that writes text
        read = [entry for entry in found if next(iter(entry[1].values())).d_model == _head_width(model)]
        found = read if len(read) == 1 else found
    if not found:
        raise ModelError("the model has no MLP neurons (attention-only?); measure a model with MLP layers")
    if len(found) > 1:
        sizes = ", ".join(f"{len(mlps)} of width {next(iter(mlps.values())).d_mlp}" for _, mlps in found)
        raise ModelError(
            f"the model has several stacks of MLPs ({sizes}), and their shapes do not tell which one writes the text; "
            "plan its text model alone"
        )
    return list(found[0][0]), found[0][1]


def _mlp_of(index: int, block: nn.Module, d_model: int, ran: Callable[[], list[nn.Module]]) -> MLP | None:
    """Return the MLP of a block, or None if it has none; `ran` tells in which order matrices run."""
    for module in block.modules():
        kind = type(module).__name__
        if hasattr(module, "experts") or "expert" in kind.lower() or kind.endswith("MoE"):
            raise ModelError(
                f"layer {index} is a mixture of experts ({kind}), whose neurons share no one W_out; "
                "measure a model with dense MLPs"
            )
    matrices = [(module, *_sizes(module)) for module in _matrices(block, skip_mixers=True)]
    found = []
    for down, d_mlp, d_out in matrices:
        if d_out != d_model or d_mlp == d_model:
            continue
        ups = [up for up, d_in, d_up in matrices if d_in == d_model and d_up == d_mlp]
        fused = [up for up, d_in, d_up in matrices if d_in == d_model and d_up == 2 * d_mlp]
        if (len(ups), len(fused)) in ((1, 0), (2, 0), (0, 1)):
            found.append(MLP(d_model, d_mlp, len(ups) != 1, (down, *ups, *fused)))
    # Beside its MLP a block may have paths of low rank (Gemma 3n, Gemma 4), narrower than the residual stream.
    found = [mlp for mlp in found if mlp.d_mlp > d_model] if len(found) > 1 else found
    if len(found) > 1:
        widths = sorted(mlp.d_mlp for mlp in found)
        raise ModelError(
            f"layer {index} has several MLPs, of widths {widths}, and their shapes do not tell which is the one that "
            "is measured; load the model and measure a few tokens instead"
        )
    return found[0] if found else _square_mlp(matrices, d_model, ran)


def _square_mlp(
    matrices: Sequence[tuple[nn.Module, int, int]], d_model: int, ran: Callable[[], list[nn.Module]]
) -> MLP | None:
    """Return the MLP of a block that is as wide as the residual stream, or None if there is none.

    Shapes do not tell its matrices apart. The down projection is the one that runs last: it needs what the others give.
    """
    square = [matrix for matrix, d_in, d_out in matrices if d_in == d_out == d_model]
    fused = [matrix for matrix, d_in, d_out in matrices if (d_in, d_out) == (d_model, 2 * d_model)]
    if (len(square), len(fused)) not in ((2, 0), (3, 0), (1, 1)):
        return None
    if not fused and not set(square) <= set(ran()):  # of a tower that text does not pass
        return None
    order = square if fused else sorted(square, key=ran().index)
    return MLP(d_model, d_model, len(square) != 2, (order[-1], *(m for m in square if m is not order[-1]), *fused))


def _run_order(model: Any) -> list[nn.Module]:
    """Run two tokens through a model, and return its matrices in the order in which they run.

    Raises:
        ModelError: If it does not run.
    """
    order: list[nn.Module] = []
    with ExitStack() as stack:
        for matrix in _matrices(model):
            stack.callback(matrix.register_forward_pre_hook(lambda module, args: order.append(module)).remove)
        tokens = torch.zeros(1, 2, dtype=torch.long, device=device_of(model.get_input_embeddings()))
        try:
            with torch.no_grad():
                model(input_ids=tokens, use_cache=False)
        except Exception as error:  # whatever a foreign model raises
            raise ModelError(
                "the MLPs are as wide as the residual stream, which their matrices' shapes do not tell apart, and the "
                f"model does not run ({first_line(error)}); measure it with TransformerLens instead"
            ) from error
    return order


def _residual_width(stack: nn.Module) -> int:
    """What most matrices of the blocks read."""
    reads = Counter(_sizes(module)[0] for module in _matrices(stack))
    return reads.most_common(1)[0][0] if reads else 0


def _head_width(model: Any) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.shape[1])


def _matrices(module: nn.Module, *, skip_mixers: bool = False) -> Iterator[nn.Module]:
    """Yield the modules that are one matrix; without those that mix tokens, if asked."""
    weight = getattr(module, "weight", None)
    children = list(module.children())
    if not children and isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
        yield module
    for child in children:
        kind = type(child).__name__.lower()
        mixes = "attention" in kind or "attn" in kind or any(isinstance(m, nn.Conv1d) for m in child.children())
        if not (skip_mixers and mixes):
            yield from _matrices(child, skip_mixers=skip_mixers)


def _sizes(matrix: nn.Module) -> tuple[int, int]:
    """What a matrix reads and what it writes."""
    n_out, n_in = matrix.weight.shape  # type: ignore[union-attr, misc]
    return (n_out, n_in) if type(matrix).__name__ == "Conv1D" else (n_in, n_out)


def _count(modules: Sequence[nn.Module]) -> int:
    unique = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(unique.values())
