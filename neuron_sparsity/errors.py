"""The errors of neuron_sparsity.

    NeuronSparsityError            anything a user can be told in one line
    ├── ModelError                 a model that cannot be loaded or measured
    ├── CorpusError                a text that cannot be read or cut into windows
    ├── RunFolderError             a run folder that cannot be read or written
    ├── MeasurementError           a measurement that cannot succeed (NaN activations, out of memory)
    └── RankError                  another process of the same measurement that is gone or has failed

Wrong arguments are Python's own `ValueError` and `TypeError`. Every message is one line: what is wrong, and what
mends it. The command line prints it in red and exits with code 1.
"""

from __future__ import annotations

__all__ = ["CorpusError", "MeasurementError", "ModelError", "NeuronSparsityError", "RankError", "RunFolderError"]


class NeuronSparsityError(Exception):
    """Base of every error this package raises on purpose."""


class ModelError(NeuronSparsityError):
    """A model that cannot be loaded, or whose MLPs cannot be measured."""


class CorpusError(NeuronSparsityError):
    """A text that cannot be read, or that is too short to be cut into windows."""


class RunFolderError(NeuronSparsityError):
    """A run folder that is missing, damaged, of a newer schema, or that holds another run."""


class MeasurementError(NeuronSparsityError):
    """A well-formed measurement that cannot succeed, such as one on NaN activations."""


class RankError(NeuronSparsityError):
    """Another process of the same measurement that is gone, has failed, or measures something else."""
