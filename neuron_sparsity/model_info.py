"""What a number was measured on, on the model's side: names, sizes, and a fingerprint of all weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from neuron_sparsity.fingerprint import sums_of

__all__ = ["ModelInfo", "WeightFacts", "computed", "otherwise"]


@dataclass(frozen=True)
class ModelInfo:
    """What a number was measured on, on the model's side.

    Attributes:
        name: Name the model was loaded by.
        n_layers: Layers with an MLP, the ones measured.
        d_model: Width of the residual stream.
        d_mlp: Neurons per layer.
        activation: Name of the activation function.
        gated: Whether the post-activation is `act(gate) * up`.
        dtype: Type the model computes in.
        weights: `"as loaded"`, or `"centred"` where the host centred the weights that write to the residual stream.
        host: Class and TransformerLens version that ran the model.
        layers: Block index of each measured layer.
        fingerprint: Hash of all parameters: same weights, same hash (`WeightFacts`).
    """

    name: str
    n_layers: int
    d_model: int
    d_mlp: int
    activation: str
    gated: bool
    dtype: str
    weights: str
    host: str
    layers: tuple[int, ...]
    fingerprint: str

    @classmethod
    def of(
        cls, model: Any, facts: WeightFacts, *, name: str | None, version: str, layers: Sequence[int], lowest: float
    ) -> ModelInfo:
        """Return what a model of TransformerLens `version` tells; `lowest` is the smallest of some post-activations."""
        cfg = model.cfg
        activation, gated = str(cfg.act_fn), bool(getattr(cfg, "gated_mlp", False))
        if "relu" in activation and not gated and lowest < 0:
            activation = "unknown"  # TransformerLens 4.3 says relu of BLOOM, which has GELU
        return cls(
            name=name or str(getattr(cfg, "model_name", type(model).__name__)),
            n_layers=len(layers),
            d_model=facts.shape[1],
            d_mlp=facts.shape[0],
            activation=activation,
            gated=gated,
            dtype=facts.dtype,
            weights="centred" if facts.centred else "as loaded",
            host=f"{type(model).__name__}, TransformerLens {version}",
            layers=tuple(layers),
            fingerprint=facts.fingerprint,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelInfo:
        """Return what `to_json` was made from."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__} | {"layers": tuple(data["layers"])})


def otherwise(found: ModelInfo, here: ModelInfo) -> str:
    """Return how a model that was measured differs from the one that is here, for an error: by its type, or weights.

    The fingerprint of weights in bfloat16 is another than that of the same in float32: they are rounded.
    """
    if found.dtype != here.dtype:
        return f"in {found.dtype}, and this model is in {here.dtype}"
    return "with other weights"


def computed(model: Any) -> bool:
    """Return whether TransformerLens folded norms into the weights, or centred them, when it loaded the model.

    Example:
        >>> from types import SimpleNamespace
        >>> [computed(SimpleNamespace(cfg=SimpleNamespace(normalization_type=kind))) for kind in ("LN", "LNPre")]
        [False, True]
    """
    folded = str(model.cfg.normalization_type).endswith("Pre")  # HookedTransformer; a bridge keeps the name
    return folded or bool(getattr(model, "_weights_processed", False))


class WeightFacts:
    """What is kept of a model's weights, gathered one layer at a time: an offloaded layer is read once.

    The fingerprint is a hash of, for each measured block in order, the norms of its output weight rows (to 3 digits)
    and sums over all its parameters, and of sums over all parameters outside of these blocks: embeddings, unembedding,
    norms (`fingerprint.sums_of`). A Hugging Face model, its TransformerBridge and a HookedTransformer of the same
    weights share it, tied or not, fused or split. Weights that were rounded to bfloat16, folded or centred have another
    one, and so has a HookedTransformer that stores something else (of Gemma: norms plus one, and a scaled embedding).
    What is no parameter is not in it: the configuration, buffers.

    Args:
        exact: Whether any one number that changes shows; else what changes the sum of squares of a block in 6 digits
            (for weights that are computed when they are loaded, and round otherwise on another machine).

    Attributes:
        norms: Norm of each row, a layer.
        shape: Of the first layer's weights.
        dtype: Of the first layer's weights.
        centred: Whether the rows of every layer so far have mean zero.

    Example:
        >>> import torch
        >>> facts = WeightFacts()
        >>> down = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = down.weight.copy_(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]))
        >>> facts.add(down.weight.detach().t(), down)
        >>> facts.norms[0].tolist(), facts.centred, facts.fingerprint
        ([4.242640495300293, 0.0], True, 'f9c0b1190e8a119e')
    """

    def __init__(self, *, exact: bool = True) -> None:
        self.exact = exact
        self._done: set[int] = set()
        self.norms: list[Float[Tensor, " neuron"]] = []
        self.shape: tuple[int, int] = (0, 0)
        self.dtype = ""
        self.centred = True
        self._digest = hashlib.sha256()

    def add(self, w_out: Float[Tensor, "neuron d_model"], block: nn.Module) -> None:
        """Take in the next layer's output weights, and all parameters of its block."""
        if not self.norms:
            self.shape = (int(w_out.shape[0]), int(w_out.shape[1]))
            self.dtype = str(w_out.dtype).removeprefix("torch.")
        rows = w_out.float()
        self.norms.append(rows.norm(dim=1))
        self.centred &= float(rows.mean(dim=1).abs().max()) < 1e-5 * max(float(rows.abs().max()), 1e-30)
        # In float64, where the order of the sum does not show in three digits.
        norms = w_out.double().norm(dim=1)
        self._digest.update(" ".join(f"{value:.3g}" for value in norms.tolist()).encode())
        self.add_rest(block)

    def add_rest(self, model: nn.Module) -> None:
        """Take in all parameters of a model that were not taken in with its blocks."""
        self._digest.update(f" {sums_of(model, self._done).told(exact=self.exact)} ".encode())

    @property
    def fingerprint(self) -> str:
        """Hash of all that was taken in."""
        return self._digest.hexdigest()[:16]
