"""What kind of neuron is it? For any activation function, from the statistics and one more streaming pass.

- `classes`: dead, rare, alive, always on, and how these counts move with the number of tokens
- `active`: the pass, one bit a token and neuron
- `triggers`: the tokens and n-grams that a neuron fires on; detectors
- `positions`: what a neuron's activity says about the position
- `logits`: what a neuron's output row does to the logits
- `columns`: the columns that each of them gives
- `table`: all of it as one table, a row a neuron
- `files`: that table as Parquet
"""

from __future__ import annotations

from neuron_sparsity.taxonomy.classes import NONZERO, ClassPoint, ClassRule, NeuronClasses, class_curve, classify
from neuron_sparsity.taxonomy.files import ATLAS_FILE
from neuron_sparsity.taxonomy.logits import LogitEffects, RoleRule, logit_effects
from neuron_sparsity.taxonomy.table import Atlas, atlas
from neuron_sparsity.taxonomy.triggers import TriggerRule

__all__ = [
    "ATLAS_FILE",
    "NONZERO",
    "Atlas",
    "ClassPoint",
    "ClassRule",
    "LogitEffects",
    "NeuronClasses",
    "RoleRule",
    "TriggerRule",
    "atlas",
    "class_curve",
    "classify",
    "logit_effects",
]
