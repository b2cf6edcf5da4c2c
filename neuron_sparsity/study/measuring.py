"""What is measured of one trained model: its trajectory, and which neurons are active how often and on which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neuron_sparsity.adapter import MLPAdapter, attach, load_model
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.store import read_tensors, write_tensors
from neuron_sparsity.study.config import StudyConfig
from neuron_sparsity.study.training import checkpoint_path
from neuron_sparsity.trajectory import Checkpoint, TrajectoryResult, track

__all__ = ["Patterns", "follow", "patterns", "patterns_of"]

PATTERNS_FILE = "patterns.safetensors"
_BATCH_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Patterns:
    """Who is active when, under one threshold a layer.

    Attributes:
        frequency: Share of the tokens on which each neuron is active.
        token_ratio: Share of all neurons that are active, mean over the places of each entry of the vocabulary; 0 where
            it does not occur.
        token_count: How often each entry occurs.
        n_tokens: Tokens measured on.
        checkpoint: What was measured.
    """

    frequency: Float[Tensor, "layer neuron"]
    token_ratio: Float[Tensor, " vocab"]
    token_count: Int64[Tensor, " vocab"]
    n_tokens: int
    checkpoint: str


def follow(
    checkpoints: Path,
    folder: Path,
    config: StudyConfig,
    windows: Windows,
    *,
    device: str | None = None,
    progress: Progress | None = None,
) -> TrajectoryResult:
    """Return activation sparsity over the checkpoints of one training: `track`, resumed where it was interrupted.

    Args:
        checkpoints: Folder of the Trainer.
        folder: Where the trajectory goes.
        config: The study.
        windows: What is measured on.
        device: As for `track`.
        progress: As for `track`.
    """
    found = [
        Checkpoint(f"step-{step}", step * config.tokens_per_step, str(checkpoint_path(checkpoints, step)))
        for step in config.training.checkpoint_steps()
    ]
    return track(found, windows, p_percent=config.p_percent, folder=folder, device=device, progress=progress)


def patterns_of(
    checkpoints: Path,
    folder: Path,
    config: StudyConfig,
    windows: Windows,
    trajectory: TrajectoryResult,
    device: str | None,
) -> Patterns | None:
    """Return the patterns of the last checkpoint of the stable phase, at the common CETT; measured where not yet known.

    Returns None where that checkpoint is a gap, or nothing is active.
    """
    step = config.training.stable_until
    point = next((point for point in trajectory.points if point.checkpoint == f"step-{step}"), None)
    at = None if point is None else point.at(trajectory.cett)
    if point is None or at is None or at.cett >= 1:
        return None
    path = folder / PATTERNS_FILE
    key = {"checkpoint": point.checkpoint, "fingerprint": point.fingerprint, "cett": at.cett}
    if path.is_file():
        tensors, header = read_tensors(path)
        if all(header.get(name) == value for name, value in key.items()):
            return Patterns(**tensors, n_tokens=header["n_tokens"], checkpoint=header["checkpoint"])
    model = load_model(str(checkpoint_path(checkpoints, step)), device=device)
    found = patterns(attach(model), windows, [layer.threshold for layer in at.layers], checkpoint=point.checkpoint)
    tensors = {name: getattr(found, name) for name in ("frequency", "token_ratio", "token_count")}
    write_tensors(path, tensors, key | {"n_tokens": found.n_tokens})
    return found


def patterns(adapter: MLPAdapter, windows: Windows, thresholds: list[float], *, checkpoint: str = "") -> Patterns:
    """Return who is active when, in one dense pass; `|z| * ||W_out|| >= threshold` is active, as everywhere.

    Args:
        adapter: The model.
        windows: What is measured on.
        thresholds: One a layer.
        checkpoint: What the result calls the model.

    Raises:
        ValueError: If there is not one threshold a layer.
    """
    info = adapter.info
    if len(thresholds) != info.n_layers:
        raise ValueError(f"{len(thresholds)} thresholds for {info.n_layers} layers; give one a layer")
    counts = torch.zeros(info.n_layers, info.d_mlp, dtype=torch.int64)
    n_vocab = int(adapter.model.cfg.d_vocab)
    total, token_count = torch.zeros(n_vocab, dtype=torch.float64), torch.zeros(n_vocab, dtype=torch.int64)
    for tokens in windows.tokens.split(max(1, _BATCH_TOKENS // windows.window)):
        active = torch.zeros(tokens.numel(), dtype=torch.int64)

        def on_post(row: int, z: Tensor, active: Tensor = active) -> None:
            on = (z.abs() * adapter.w_norms[row] >= thresholds[row]).flatten(0, 1)
            counts[row] += on.sum(0).cpu()
            active += on.sum(1).cpu()

        with torch.no_grad():
            adapter.final_residual(tokens.long(), on_post)
        ids = tokens.flatten().long()
        total.index_add_(0, ids, active.double() / (info.n_layers * info.d_mlp))
        token_count.index_add_(0, ids, torch.ones_like(ids))
    return Patterns(
        frequency=(counts.double() / windows.n_tokens).float(),
        token_ratio=(total / token_count.clamp(min=1)).float(),
        token_count=token_count,
        n_tokens=windows.n_tokens,
        checkpoint=checkpoint,
    )
