"""How activation sparsity arises, measured by anyone: a grid of small models, trained, followed, fitted.

1. **Text.** Documents are held out; a tokenizer is trained on the others, which are packed into windows (`text`).
2. **Train.** Every model of the configuration with every activation function and seed, by the Hugging Face `Trainer`
   with a warm-up, a stable and a decay phase; checkpoints log-spaced at first (`training`). Only what the grid varies
   differs: the windows, their number and the schedule are the same.
3. **Follow.** `track` over the checkpoints of each, by Appendix E of arXiv:2411.02335, on the held-out text; and, at
   the end of the stable phase, which neurons are active how often and on which tokens (`measuring`).
4. **Fit.** Both laws to the stable phase of each; the limit over width-depth ratio and scale; the spread over seeds;
   agreement on tokens (`fitting`).

Killed at any moment and started again, a study ends with the points of one that was not: what is finished is on the
disk, training goes on from the last whole checkpoint, `track` from the last visit.
"""

from __future__ import annotations

from neuron_sparsity.study.config import ModelShape, RunPlan, StudyConfig, TextPlan, TrainingPlan, load_config, presets
from neuron_sparsity.study.grid import plan_rows, study
from neuron_sparsity.study.result import (
    Agreement,
    LawFound,
    Series,
    Spread,
    StudyPoint,
    StudyResult,
    StudyRun,
)

__all__ = [
    "Agreement",
    "LawFound",
    "ModelShape",
    "RunPlan",
    "Series",
    "Spread",
    "StudyConfig",
    "StudyPoint",
    "StudyResult",
    "StudyRun",
    "TextPlan",
    "TrainingPlan",
    "load_config",
    "plan_rows",
    "presets",
    "study",
]
