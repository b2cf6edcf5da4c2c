"""Activation sparsity over training: the same measurement at every checkpoint, by Appendix E of arXiv:2411.02335.

1. **Own.** CETT-PPL-p% of a checkpoint by itself (`sparsity`): the CETT at which its perplexity rises by p percent.
2. **Common.** One CETT for all: where the mean over the last five checkpoints of PPL truncated over PPL dense is
   1 + p/100. The search is that of `cett_search`; a pass of it is one truncated pass over each of the five.
3. **Applied.** Every checkpoint is truncated at the common CETT, with thresholds from its own CETT curves: activation
   ratio of each layer, rise of perplexity, dead neurons. These are the points of the laws.

One model is in memory at a time. What a visit to a checkpoint has measured is written before the next one is loaded,
and is not measured again: a run that was killed goes on, and ends with the points of one that was not. A checkpoint
that cannot be loaded or measured is a gap, named in the result and tried again by the next run.

`SparsityCallback` makes the same visits while a Hugging Face `Trainer` trains.
"""

from __future__ import annotations

from neuron_sparsity.trajectory.callback import SparsityCallback
from neuron_sparsity.trajectory.checkpoints import Checkpoint, checkpoint_schedule
from neuron_sparsity.trajectory.result import (
    CommonCett,
    DeadShare,
    Gap,
    SparsityAt,
    TrackedModel,
    TrajectoryPoint,
    TrajectoryResult,
)
from neuron_sparsity.trajectory.tracker import track

__all__ = [
    "Checkpoint",
    "CommonCett",
    "DeadShare",
    "Gap",
    "SparsityAt",
    "SparsityCallback",
    "TrackedModel",
    "TrajectoryPoint",
    "TrajectoryResult",
    "checkpoint_schedule",
    "track",
]
