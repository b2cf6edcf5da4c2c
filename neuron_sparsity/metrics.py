"""Tensors to numbers and masks: contribution, CETT, and the rules by which a neuron counts as active.

No model in sight. `z` is a layer's post-activations [token, neuron], `s` the activation function's own output of the
same shape, `c` contributions. A mask is True where the neuron is active.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuron_sparsity import kernels
from neuron_sparsity.kernels.reference import contributions

__all__ = [
    "EXACT_ZERO_THRESHOLD",
    "activation_ratio",
    "cett",
    "contribution",
    "fat_mask",
    "threshold_for_cett",
    "threshold_mask",
    "topk_mask",
    "topp_mask",
]

EXACT_ZERO_THRESHOLD = 2.0**-149
"""The smallest positive float32: the threshold that cuts exact zeros and nothing else (CETT = 0)."""


def contribution(
    z: Float[Tensor, "token neuron"], w_out: Float[Tensor, "neuron d_model"]
) -> Float[Tensor, "token neuron"]:
    """Return each neuron's output magnitude `|z_i| * ||W_out[i]||`, in residual-stream norm.

    Args:
        z: Post-activations.
        w_out: Output weights of the same layer.

    Returns:
        Float32, same shape as `z`.

    Raises:
        ValueError: If shapes disagree.

    Example:
        >>> contribution(torch.tensor([[3.0, -4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([[3., 8.]])
    """
    _check_weights(z, w_out)
    return contributions(z, w_out.float().norm(dim=1))


def cett(
    z: Float[Tensor, "token neuron"], w_out: Float[Tensor, "neuron d_model"], threshold: float
) -> Float[Tensor, ""]:
    """Return the cumulative error of tail truncation (CETT) of one MLP at `threshold`.

    A neuron is in a token's tail if its contribution is below the threshold. CETT is the norm of the tail's output
    over the norm of the full output without bias, averaged over tokens (arXiv:2411.02335, Eq. 3). Tokens whose full
    output is zero are left out.

    Args:
        z: Post-activations, batch and pos flattened.
        w_out: Output weights of the same layer.
        threshold: Cut on the contribution, in residual-stream norm; >= 0.

    Returns:
        Float32 scalar: 0 if nothing is cut, 1 if everything is. NaN if no token has an output.

    Raises:
        ValueError: If `threshold` is negative or NaN, or shapes disagree.

    Example:
        >>> cett(torch.tensor([[3.0, 4.0]]), torch.eye(2), threshold=3.5)
        tensor(0.6000)
    """
    _check_weights(z, w_out)
    if not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, got {threshold}")
    error, _, full = kernels.tail_error(z, w_out.float().norm(dim=1), w_out, torch.tensor([threshold]))
    seen = full > 0
    return (error[0][seen] / full[seen]).mean()


def threshold_for_cett(
    z: Float[Tensor, "token neuron"], w_out: Float[Tensor, "neuron d_model"], target: float
) -> float:
    """Return the largest threshold whose CETT is at most `target`, exactly: every threshold there is, is looked at.

    CETT changes only at contributions that are present. Each token's neurons are cut in the order of their
    contributions, and the steps of all tokens are added up in float64, in one product with `w_out`. The mean CETT
    need not rise with the threshold (what is cut may cancel what was cut before), so this is no bisection.
    `sparsity` interpolates between a few thresholds instead, and is tested against this.

    Args:
        z: Post-activations.
        w_out: Output weights.
        target: CETT in [0, 1]; 0 gives the threshold that cuts only exact zeros.

    Returns:
        Threshold, exactly representable as a float32; just above the largest contribution where all may be cut.

    Raises:
        ValueError: If `target` is outside [0, 1] or shapes disagree.

    Example:
        >>> threshold_for_cett(torch.tensor([[3.0, 4.0]]), torch.eye(2), 0.61)
        4.0
    """
    if not 0 <= target <= 1:
        raise ValueError(f"target must be in [0, 1], got {target}")
    c = contribution(z, w_out)
    if target == 0 or not bool((c > 0).any()):
        return EXACT_ZERO_THRESHOLD
    ordered, order = c.sort(dim=1)
    steps = torch.zeros_like(c, dtype=torch.float64)
    for row, (token, neurons) in enumerate(zip(z.double(), order, strict=True)):
        tail = (token[neurons, None] * w_out[neurons].double()).cumsum(dim=0).norm(dim=1)
        if tail[-1] > 0:
            steps[row] = (tail / tail[-1]).diff(prepend=tail.new_zeros(1))
    n_seen = max(int((steps != 0).any(dim=1).sum()), 1)
    values, which = ordered.flatten().sort()
    cett_above = steps.flatten()[which].cumsum(dim=0) / n_seen  # CETT once this and everything below it is cut
    last = values.diff(append=values.new_full((1,), math.inf)) > 0  # of equal contributions only the last one counts
    fits = (last & (cett_above <= target + 1e-12)).nonzero()[:, 0]
    if len(fits) == 0:
        return float(values[values > 0][0])
    following = int(fits[-1]) + 1
    return float(
        values[following] if following < len(values) else torch.nextafter(values[-1], values.new_tensor(math.inf))
    )


def threshold_mask(c: Float[Tensor, "token neuron"], threshold: float) -> Bool[Tensor, "token neuron"]:
    """Return which neurons are active under a threshold on the contribution: `c >= threshold`.

    Example:
        >>> threshold_mask(torch.tensor([[1.0, 2.0]]), 2.0)
        tensor([[False,  True]])
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, got {threshold}")
    return c >= threshold


def fat_mask(s: Float[Tensor, "token neuron"], eps: float) -> Bool[Tensor, "token neuron"]:
    """Return which neurons are active under FAT-eps: `|s| >= eps`; FAT-0 is "exactly zero or not".

    Args:
        s: The activation function's own output, `act(gate)` or `act(in)`; or contributions.
        eps: One cut for all layers, >= 0.

    Raises:
        ValueError: If `eps` is negative or NaN.

    Example:
        >>> fat_mask(torch.tensor([[0.0, -0.1, 2.0]]), 0.0)
        tensor([[False,  True,  True]])
    """
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    return s != 0 if eps == 0 else s.abs() >= eps


def topk_mask(s: Float[Tensor, "token neuron"], k: int) -> Bool[Tensor, "token neuron"]:
    """Return the k neurons of largest `|s|` of each token; ties go to the smaller index.

    Raises:
        ValueError: If k is not between 1 and the number of neurons.

    Example:
        >>> topk_mask(torch.tensor([[1.0, -3.0, 1.0]]), 2)
        tensor([[ True,  True, False]])
    """
    _, indices = kernels.contribution_topk(s, torch.ones(s.shape[1], device=s.device), k, largest=True)
    return torch.zeros_like(s, dtype=torch.bool).scatter_(1, indices, True)


def topp_mask(c: Float[Tensor, "token neuron"], share: float) -> Bool[Tensor, "token neuron"]:
    """Return the smallest set of each token's neurons that holds a share of the sum of all contributions.

    Args:
        c: Contributions.
        share: In [0, 1].

    Raises:
        ValueError: If `share` is outside [0, 1].

    Example:
        >>> topp_mask(torch.tensor([[1.0, 6.0, 3.0]]), 0.9)
        tensor([[False,  True,  True]])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    ordered, order = torch.sort(c.double(), dim=1, descending=True, stable=True)
    before = ordered.cumsum(dim=1) - ordered
    needed = (before < share * ordered.sum(dim=1, keepdim=True)) & (ordered > 0)
    return torch.zeros_like(c, dtype=torch.bool).scatter_(1, order, needed)


def activation_ratio(active: Bool[Tensor, "*rows neuron"]) -> float:
    """Return active (token, neuron) pairs over all pairs; 0.0 for an empty mask.

    Example:
        >>> activation_ratio(torch.tensor([[True, False], [False, False]]))
        0.25
    """
    return float(active.double().mean()) if active.numel() else 0.0


def _check_weights(z: Tensor, w_out: Tensor) -> None:
    if z.dim() != 2 or w_out.dim() != 2 or z.shape[1] != w_out.shape[0]:
        raise ValueError(
            f"z must be [token, neuron] and w_out [neuron, d_model] of one width, got {list(z.shape)} and "
            f"{list(w_out.shape)}"
        )
