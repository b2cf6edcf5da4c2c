"""How many bytes the tensors of a measurement take: from the sizes of a model, without running it.

Every number follows from the code that allocates: the state of `recorder`, the buffers of the kernels, the tensors that
`NeuronStatistics` writes, a transformer block's intermediates. `benchmarks/memory.py` holds it against real recordings.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

import torch
from torch import Tensor

from neuron_sparsity.divergence import _IN_MEMORY
from neuron_sparsity.kernels import N_BINS, StatisticsState
from neuron_sparsity.kernels.reference import BLOCK_TOKEN
from neuron_sparsity.perplexity import _LOGIT_FLOATS
from neuron_sparsity.recording import _PEAK_VALUES
from neuron_sparsity.statistics import _TENSORS, CONTEXT_LENGTH
from neuron_sparsity.windows import kept_bytes

__all__ = ["Footprint"]

_TRITON_SUMS = 1024 * 128 * 3 * 8  # sums that the programs of the CUDA kernel write side by side


@dataclass(frozen=True)
class Footprint:
    """Bytes of what a measurement holds.

    Attributes:
        n_layers: Layers with an MLP.
        d_mlp: Neurons a layer.
        d_model: Width of the residual stream; 0 where post-activations come from nowhere.
        n_ctx: Tokens a window.
        batch_size: Windows a forward pass.
        itemsize: Bytes of a weight and of an activation.
        device: `cpu` or `cuda`: which kernels run.
        n_cuts: Sets of thresholds that are counted.
        n_examples: Examples a neuron.

    Example:
        >>> stack = Footprint(n_layers=32, d_mlp=14_336, d_model=0, n_ctx=512, batch_size=2)
        >>> stack.state // (32 * 14_336), stack.activations
        (612, 58720256)
    """

    n_layers: int
    d_mlp: int
    d_model: int
    n_ctx: int
    batch_size: int
    itemsize: int = 4
    device: str = "cpu"
    n_cuts: int = 0
    n_examples: int = 5

    @property
    def n_tokens(self) -> int:
        """Tokens a forward pass."""
        return self.batch_size * self.n_ctx

    @property
    def state(self) -> int:
        """What a recording keeps while it runs, and the norms of the output weights. No token makes it larger."""
        one = StatisticsState.zeros(1, torch.empty(self.n_cuts))
        counters = sum(getattr(one, field.name).nbytes for field in fields(one) if _is_counter(one, field.name))
        examples = self.n_examples * (4 + 8)  # value and position
        return self.n_layers * self.d_mlp * (counters + 4 + examples + 4)  # the maximum; the norm

    @property
    def result(self) -> int:
        """The finished statistics: all tensors of `statistics.safetensors`."""
        sizes = {
            "layer": self.n_layers,
            "neuron": self.d_mlp,
            "bin": N_BINS,
            "k": self.n_cuts,
            "example": self.n_examples,
            "context": CONTEXT_LENGTH,
        }
        return sum(prod(sizes[axis] for axis in axes.split()) * dtype.itemsize for dtype, axes in _TENSORS.values())

    @property
    def finishing(self) -> int:
        """Beside the state, when it becomes the result: the contexts of the examples, and two numbers a neuron."""
        return self.n_layers * self.d_mlp * (4 * CONTEXT_LENGTH * self.n_examples + 8 + 4)

    @property
    def activations(self) -> int:
        """Post-activations of one layer for a batch: what every op reads."""
        return self.n_tokens * self.d_mlp * self.itemsize

    @property
    def held(self) -> int:
        """What a forward pass holds while a layer's post-activations are looked at: they and the residual stream."""
        return self.activations + 3 * self.n_tokens * self.d_model * self.itemsize

    @property
    def forward(self) -> int:
        """Largest intermediates of a block: gate, up and their product beside the residual stream and its norm."""
        return (3 * self.d_mlp + 4 * self.d_model) * self.n_tokens * self.itemsize

    @property
    def statistics(self) -> int:
        """Temporaries of `neuron_statistics`, and of the search for examples after it; whichever is larger."""
        if self.device == "cuda":
            kernel = _TRITON_SUMS + 2 * self.batch_size * self.d_mlp * 4
        else:
            block = min(BLOCK_TOKEN, self.n_ctx) * self.d_mlp * 4
            upcast = 0 if self.itemsize == 4 else block
            kernel = self.n_ctx * self.d_mlp * 4 + 2 * block + upcast + self.d_mlp * N_BINS * 8
        value = 4 if self.itemsize == 4 else self.itemsize + 4  # and in float32, where it is not
        copied = min(_PEAK_VALUES, self.n_ctx * self.d_mlp) * value
        ranked = self.d_mlp * (self.n_examples + self.batch_size) * (4 + 8 + 4 + 8)
        return max(kernel, self.batch_size * self.d_mlp * 4 + copied + ranked)

    @property
    def batch(self) -> int:
        """Beside weights and state, while a batch is recorded."""
        return max(self.forward if self.d_model else 0, self.held + self.statistics)

    @property
    def recording(self) -> int:
        """Largest memory of a recording beside the weights."""
        if self.device == "cuda":
            return self.state + self.batch  # the result is made in the machine's memory
        return self.state + max(self.batch, self.finishing)

    def search(self, n_vocab: int) -> int:
        """Largest memory of a pass with losses and CETT beside the weights, and what KL divergences are taken from."""
        logits = 3 * 4 * max(_LOGIT_FLOATS, 64 * n_vocab)  # with their exponentials
        w_out = 0 if self.itemsize == 4 or self.device == "cuda" else self.d_mlp * self.d_model * 4
        tail = w_out + 2 * min(BLOCK_TOKEN, self.n_tokens) * self.d_mlp * 4
        losses = self.n_tokens * self.d_model * self.itemsize + logits
        return _IN_MEMORY + max(self.forward, self.held + tail, losses)

    def removal(self, n_vocab: int) -> int:
        """Largest memory of what `ablate` does beside the weights: gradients for a ranking, or a pass without neurons.

        A pass with neurons removed holds what replaces them, and a changed copy of a layer's post-activations.
        """
        replaced = self.n_layers * self.d_mlp * (4 + 4 + 1)
        return max(self.gradients, replaced + max(self.search(n_vocab), self.held + self.activations))

    @property
    def gradients(self) -> int:
        """Largest memory of a pass forward and backward over one window: all layers keep what the way back needs."""
        kept = (
            4 * self.d_mlp + 16 * self.d_model
        ) * self.itemsize  # of a layer and token, as `default_batch_size` has it
        return self.n_layers * self.n_ctx * kept

    def windows(self, n_windows: int) -> int:
        """`windows.safetensors` of a run: an int32 and a bool a token, where that is not too much to keep."""
        return kept_bytes(n_windows * self.n_ctx)


def _is_counter(state: StatisticsState, name: str) -> bool:
    return isinstance(getattr(state, name), Tensor) and name != "thresholds"
