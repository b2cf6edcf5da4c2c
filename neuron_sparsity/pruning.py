"""Remove neurons from the weights: a Hugging Face model without them, in memory and as a checkpoint.

Of a neuron that goes, the row of the down projection and the columns of gate and up projection (with their biases) go.
Its mean, where that replaces it, becomes part of the down projection's bias: `b_out + sum_i mean_i W_out[i]`. The loss
is that of `ablate`, which replaces post-activations while the model runs:

    cut      every layer as wide as what it keeps; saved where all keep as many, or the configuration takes a list
    padded   every layer as wide as the one that keeps most; where one keeps less, it is filled up with zeros
    zeroed   every layer as wide as it was, with zeros in the place of what goes

A layer that keeps none is left with one neuron of zeros. A neuron whose row of the down projection is zero adds zero,
whatever its post-activation. Before a pruned model is returned, its logits are compared with those of the ablated one
on a few tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from neuron_sparsity.ablation import AblationResult
from neuron_sparsity.adapter import MLPAdapter, attach
from neuron_sparsity.blueprint import MLP, measured_mlps, moved
from neuron_sparsity.checkpoint import check_vacant, fitting_settings, shapes_of, write_checkpoint
from neuron_sparsity.entry import finite, own_means
from neuron_sparsity.errors import ModelError
from neuron_sparsity.model_card import model_card
from neuron_sparsity.placement import hook_of
from neuron_sparsity.plain import fingerprint as fingerprint_of
from neuron_sparsity.plain import output_rows, unwrapped
from neuron_sparsity.pruning_forms import FORMS, no_bias, no_width, plans_of
from neuron_sparsity.replacement import default_replacement
from neuron_sparsity.store import provenance
from neuron_sparsity.surgery import add_zero_biases, check_same_logits, fold, is_quantised, shared_copy, take_out

__all__ = ["FORMS", "PrunedModel", "prune"]

_FOLDABLE = ("zero", "mean")


@dataclass(frozen=True, eq=False)
class PrunedModel:
    """A Hugging Face model without some of its neurons.

    Attributes:
        model: The model, in eval mode. What was not pruned shares its memory with the model it was made of: to train
            it, take `copy.deepcopy(model)` or load the checkpoint.
        form: `"cut"`, `"padded"` or `"zeroed"`.
        reason: Why this form.
        replacement: `"zero"` or `"mean"`.
        neurons: What went, as (layer, neuron).
        widths: Neurons left in each layer, by the block's index; those that are only zeros included.
        n_neurons: Neurons before.
        n_parameters_before: Parameters before; tied ones count once.
        n_parameters_removed: Those that are gone.
        n_parameters_zeroed: Those that are zero in the place of what went.
        n_parameters_added: Those of new biases.
        unsaveable: Why no checkpoint can be written that plain `from_pretrained` loads, and what could be; None if one
            can.
        source: `name`, `architecture` and `fingerprint` of the model before.
        measured: What the removal costs and on what, where the neurons are those of an `AblationResult`; else None.
        tokenizer: Saved beside the weights, or None.
        provenance: Versions and command.
    """

    model: Any
    form: str
    reason: str
    replacement: str
    neurons: tuple[tuple[int, int], ...]
    widths: dict[int, int]
    n_neurons: int
    n_parameters_before: int
    n_parameters_removed: int
    n_parameters_zeroed: int
    n_parameters_added: int
    unsaveable: str | None
    source: dict[str, str]
    measured: dict[str, Any] | None
    tokenizer: Any
    provenance: dict[str, Any]

    @property
    def n_parameters(self) -> int:
        """Parameters that are left, zeros and new biases included."""
        return self.n_parameters_before - self.n_parameters_removed + self.n_parameters_added

    def to_json(self) -> dict[str, Any]:
        """Return the content of `pruning.json`: all but the weights and the tokenizer."""
        left_out = ("model", "tokenizer", "unsaveable", "neurons", "widths")
        kept = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in left_out}
        return kept | {
            "n_parameters": self.n_parameters,
            "widths": {str(block): width for block, width in self.widths.items()},
            "neurons": [list(pair) for pair in self.neurons],
        }

    def save(self, out: str | Path) -> Path:
        """Write a checkpoint that `from_pretrained` of transformers loads, with `pruning.json` and a model card.

        Args:
            out: Folder that is empty or not there.

        Returns:
            The folder.

        Raises:
            ModelError: If no checkpoint can hold this model, with what could be saved instead.
            RunFolderError: If the folder is not empty or cannot be written; then nothing is there.
        """
        if self.unsaveable is not None:
            raise ModelError(self.unsaveable)
        record = self.to_json()
        write_checkpoint(Path(out), self.model, self.tokenizer, record, model_card(record))
        return Path(out)


def prune(
    model: Any,
    neurons: AblationResult | Iterable[tuple[int, int]],
    *,
    replacement: str | None = None,
    means: Float[Tensor, "layer neuron"] | None = None,
    form: str = "auto",
    out: str | Path | None = None,
    tokenizer: Any = None,
) -> PrunedModel:
    """Return a Hugging Face model without these neurons, and write it as a checkpoint if `out` is given.

    Args:
        model: Causal language model of transformers, or a TransformerBridge or adapter, whose Hugging Face model is
            taken. It is not changed.
        neurons: What `removable_neurons` returned for this model, or (layer, neuron) pairs; layer is the block's index.
        replacement: `"zero"`, or `"mean"` for each neuron's mean. Default: the result's own; for pairs mean
            where `means` are given, else zero.
        means: Mean post-activations (`NeuronStatistics.mean_activation`); needed for `"mean"`.
        form: `"cut"`, `"padded"` or `"zeroed"`; `"auto"` takes the first of them that a checkpoint can hold.
        out: Folder to write to, empty or not there.
        tokenizer: Saved beside the weights. Default: the bridge's own, or none for a Hugging Face model.

    Returns:
        The pruned model, with its form and the reason for it, and parameters counted exactly.

    Raises:
        TypeError: If `model` is none of these, or `neurons` holds anything but pairs of integers.
        ValueError: If there are no neurons, one does not exist or comes twice, `means` is missing or of another shape,
            or the result is of another model or was measured with other means.
        ModelError: If the model has no dense MLPs, is quantised, dispatched or in compatibility mode, does not give the
            ablated one's logits, or, with `out`, cannot be saved in this form.
        RunFolderError: If `out` is not empty or cannot be written.

    Example:
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
        >>> config = OPTConfig(vocab_size=50, ffn_dim=16, word_embed_proj_dim=8, pad_token_id=1, **sizes)
        >>> pruned = prune(OPTForCausalLM(config), [(0, 3), (1, 15)])
        >>> pruned.form, pruned.model.config.ffn_dim, pruned.n_parameters_removed
        ('cut', 15, 34)
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    result = neurons if isinstance(neurons, AblationResult) else None
    pairs = neurons.removable if isinstance(neurons, AblationResult) else neurons
    replacement = _checked_replacement(replacement, result, means)
    if out is not None:
        check_vacant(Path(out))
    source, name, own_tokenizer = _plain_model(model)
    mlps = _checked_mlps(source)
    fingerprint = fingerprint_of(source, [mlp.matrices[0] for mlp in mlps.values()])
    if result is not None and result.model.fingerprint != fingerprint:
        raise ValueError(
            f"the neurons were found on {result.model.name} with other weights ({result.model.weights}); "
            "prune the model that was measured, or give them as pairs"
        )
    gone = _gone(pairs, mlps)
    fill = _fill(replacement, means, mlps)
    made = _made(source, gone, fill, form, replacement)
    pruned = PrunedModel(
        **made,
        replacement=replacement,
        neurons=tuple((block, neuron) for block, mask in gone.items() for neuron in mask.nonzero()[:, 0].tolist()),
        n_neurons=sum(mlp.d_mlp for mlp in mlps.values()),
        source={
            "name": name if result is None else result.model.name,
            "architecture": type(source).__name__,
            "fingerprint": fingerprint,
        },
        measured=None if result is None else _measured(result),
        tokenizer=own_tokenizer if tokenizer is None else tokenizer,
        provenance=provenance(),
    )
    if out is not None:
        pruned.save(out)
    return pruned


def _checked_replacement(replacement: str | None, result: AblationResult | None, means: object) -> str:
    if result is not None and replacement not in (None, result.replacement):
        raise ValueError(
            f"the neurons were found with {result.replacement} replacement, not {replacement!r}; leave out replacement="
        )
    own_means(result, means)
    chosen = default_replacement(replacement, means) if result is None else result.replacement
    if chosen not in _FOLDABLE:
        raise ValueError(
            f"replacement must be one of {', '.join(_FOLDABLE)}, got {chosen!r}: weights hold constants, and nothing "
            "that changes from token to token"
        )
    return chosen


def _plain_model(model: Any) -> tuple[Any, str, Any]:
    """Return the Hugging Face model that is given or inside, its name, and its tokenizer if it is known."""
    if isinstance(model, MLPAdapter):
        return _inside(model if model.plain is not None else attach(model.model, name=model.info.name))
    if all(hasattr(model, name) for name in ("blocks", "hooks", "cfg")):
        return _inside(attach(model))
    if not (isinstance(model, nn.Module) and hasattr(model, "save_pretrained") and hasattr(model, "config")):
        raise TypeError(
            f"model must be a Hugging Face model, a TransformerBridge or an adapter, got {type(model).__name__}"
        )
    if any(hasattr(module, "original_component") for module in model.modules()):
        raise ValueError(f"a TransformerBridge has wrapped this {type(model).__name__}; give the bridge")
    _refuse_dispatched(model)
    return model, str(getattr(model.config, "name_or_path", "") or type(model).__name__), None


def _inside(adapter: MLPAdapter) -> tuple[Any, str, Any]:
    """Return the Hugging Face model inside a bridge, without what TransformerLens put into it."""
    inner, mend = getattr(adapter.model, "original_model", None), "give the plain Hugging Face model"
    if inner is None:
        raise TypeError(f"{type(adapter.model).__name__} keeps no Hugging Face model; {mend}")
    if getattr(adapter.model, "compatibility_mode", False):
        raise ModelError(f"the bridge is in compatibility mode, which rewrote the weights; {mend}")
    if adapter.plain is None:
        raise ModelError(f"the model inside cannot be pruned: {adapter.forward}; {mend}")
    _refuse_dispatched(inner)
    plain = shared_copy(unwrapped(inner))
    for name in set(plain.state_dict()) - set(shapes_of(type(plain), plain.config)):
        module = plain.get_submodule(name.rpartition(".")[0])
        if name.endswith(".bias") and not bool(module.bias.any()):  # TransformerLens gives each unembedding one
            del module.bias  # type: ignore[union-attr]
            module.register_parameter("bias", None)
    return plain, adapter.info.name, getattr(adapter.model, "tokenizer", None)


def _refuse_dispatched(model: nn.Module) -> None:
    if any(hook_of(module) is not None for module in model.modules()):
        raise ModelError("the model's layers are on several devices or away; load it on one device to prune it")


def _checked_mlps(model: Any) -> dict[int, MLP]:
    mlps = measured_mlps(model)
    matrices: list[Any] = [matrix for mlp in mlps.values() for matrix in mlp.matrices]
    if is_quantised(model) or any(matrix.weight.is_meta for matrix in matrices):
        raise ModelError("the weights are quantised or not loaded; load them in float32, bfloat16 or float16")
    if len({id(matrix.weight) for matrix in matrices}) < len(matrices):
        raise ModelError("layers share the weights of one MLP, so that no neuron of a single layer can go")
    return mlps


def _gone(pairs: Iterable[tuple[int, int]], mlps: Mapping[int, MLP]) -> dict[int, Bool[Tensor, " neuron"]]:
    """Which neurons go, by block, for the blocks that lose some."""
    masks = {block: torch.zeros(mlp.d_mlp, dtype=torch.bool) for block, mlp in mlps.items()}
    for pair in pairs:
        try:
            layer, neuron = map(operator.index, pair)
        except (TypeError, ValueError):
            raise TypeError(f"neurons are pairs (layer, neuron) of integers, got {pair!r}") from None
        if layer not in masks or not 0 <= neuron < len(masks[layer]):
            blocks, width = list(masks), len(masks.get(layer, masks[min(masks)]))
            raise ValueError(
                f"no neuron ({layer}, {neuron}): layers are {blocks[0]} to {blocks[-1]}, neurons 0 to {width - 1}"
            )
        if masks[layer][neuron]:
            raise ValueError(f"neuron ({layer}, {neuron}) is named twice")
        masks[layer][neuron] = True
    found = {block: mask for block, mask in masks.items() if mask.any()}
    if not found:
        raise ValueError("there are no neurons to prune: the list is empty, or nothing is removable at this p")
    return found


def _fill(replacement: str, means: Tensor | None, mlps: Mapping[int, MLP]) -> dict[int, Float[Tensor, " neuron"]]:
    """What takes the place of each neuron that goes."""
    if replacement == "zero":
        return {block: torch.zeros(mlp.d_mlp) for block, mlp in mlps.items()}
    widths = [mlp.d_mlp for mlp in mlps.values()]
    shape = [len(widths), max(widths)]
    if means is None or list(means.shape) != shape or min(widths) < max(widths):
        found = "none" if means is None else list(means.shape)
        raise ValueError(f"replacement 'mean' needs means of shape {shape}, got {found}; record the model first")
    return dict(zip(mlps, finite(means).detach().float().cpu(), strict=True))  # as `ablate` takes them


def _made(
    source: Any, gone: Mapping[int, Tensor], fill: Mapping[int, Tensor], form: str, replacement: str
) -> dict[str, Any]:
    """Prune a copy, in the first form that a checkpoint can hold or else the last; return what is known of it."""
    kind, before = type(source).__name__, measured_mlps(source)
    plans = plans_of(form, gone, before, kind)
    while True:
        plan = plans.pop(0)
        tried = shared_copy(source, meta=True)
        _take_out(moved(before, source, tried), gone, plan.widths)
        fit = _fit(source, tried, before, plan.widths)
        if fit is not None or not plans:
            break
    unsaveable = None if fit is not None else no_width(kind, plan)
    pruned = shared_copy(source)
    mlps = moved(before, source, pruned)
    n_removed, n_zeroed = _take_out(mlps, gone, plan.widths)
    n_added = 0
    if replacement == "mean":
        for block, mask in gone.items():
            rows = output_rows(before[block].matrices[0])
            n_added += fold(mlps[block].matrices[0], rows[mask.to(rows.device)], fill[block][mask])
    if n_added and fit is not None:
        fit = _fit(source, pruned, before, plan.widths)
        unsaveable = None if fit is not None else no_bias(kind)
    if fit is not None:
        settings, biases = fit
        for setting, value in settings.items():
            setattr(pruned.config.get_text_config(), setting, value)
        n_added += add_zero_biases(pruned, biases)
    check_same_logits(shared_copy(source), pruned, gone, fill)
    return {
        "model": pruned,
        "form": plan.form,
        "reason": plan.reason,
        "widths": plan.widths,
        "n_parameters_before": sum(parameter.numel() for parameter in source.parameters()),
        "n_parameters_removed": n_removed,
        "n_parameters_zeroed": n_zeroed,
        "n_parameters_added": n_added,
        "unsaveable": unsaveable,
    }


def _take_out(mlps: Mapping[int, MLP], gone: Mapping[int, Tensor], widths: Mapping[int, int]) -> tuple[int, int]:
    """Take the neurons out of a copy's MLPs; return how many numbers are gone and how many are zero."""
    counts = [take_out(mlps[block], mask, widths[block]) for block, mask in gone.items()]
    return sum(removed for removed, _ in counts), sum(zeroed for _, zeroed in counts)


def _fit(source: Any, pruned: Any, before: Mapping[int, MLP], widths: Mapping[int, int]) -> Any:
    """Return the settings under which the class of `source` has the tensors of `pruned`, or None."""
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    d_mlp = max(mlp.d_mlp for mlp in before.values())
    return fitting_settings(type(source), source.config, shapes, d_mlp, list(widths.values()))


def _measured(result: AblationResult) -> dict[str, Any]:
    """What a removal costs and on what it was measured: all of a result but the neurons, which stand beside it."""
    return {name: value for name, value in result.to_json().items() if name != "removable"}
