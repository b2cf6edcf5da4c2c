"""The state of a recording between two batches: on the devices, on disk, and added up over ranks.

1. Each layer's state lies on the layer's own device: nothing is copied between devices until the end.
2. It is written to a folder as one file a rank, and taken up from there by a recording of the same model, text and
   thresholds.
3. At the end the states of all ranks are added up, and become `NeuronStatistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuron_sparsity import kernels, parallel
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.errors import MeasurementError, RunFolderError
from neuron_sparsity.kernels import Backend, StatisticsState
from neuron_sparsity.statistics import CONTEXT_BEFORE, CONTEXT_LENGTH, NeuronStatistics, check_tensor
from neuron_sparsity.store import decode, make_folder, provenance, read_tensors, write_tensors
from neuron_sparsity.typed import said

__all__ = ["PARTIAL", "Recording", "drop_finished", "partial_path"]

PARTIAL = "record.partial.safetensors"
"""The state of an interrupted recording. The second of three ranks has `record.partial.1-of-3.safetensors`."""

_PEAK_VALUES = 1 << 22  # activations copied at once to look for the largest
_ROWS = 1 << 12  # contexts of examples gathered at once
_OWN = ("maximum", "example_value", "example_position")
_STATE = tuple(field.name for field in fields(StatisticsState) if field.name not in ("n_tokens", "thresholds"))


def partial_path(folder: Path) -> Path:
    """Return where this rank keeps its state, once it is sure that no other number of ranks has left theirs.

    Raises:
        RunFolderError: If the folder cannot be written, or holds a recording begun with another number of ranks.
    """
    make_folder(folder)
    stem, suffix = PARTIAL.removesuffix(".safetensors"), ".safetensors"
    n_ranks = (position := parallel.position()).rpartition("-")[2] or "1"
    for found in (*sorted(folder.glob(f"{stem}.*-of-*{suffix}")), *folder.glob(PARTIAL)):
        begun = "1" if found.name == PARTIAL else found.name.removesuffix(suffix).rpartition("-of-")[2]
        if begun != n_ranks:
            processes = "one process" if begun == "1" else f"{begun} processes"
            raise RunFolderError(
                f"{found} was begun with {processes}: go on with as many, or delete {stem}.* there to start afresh"
            )
    return folder / (f"{stem}.{position}{suffix}" if position else PARTIAL)


class Recording:
    """The state of a recording between two batches.

    Args:
        adapter: The model.
        windows: The corpus.
        thresholds: As for `record`.
        n_examples: As for `record`.
        backend: As for `record`.

    Raises:
        TypeError: If thresholds are no sets by name.
        ValueError: If a set of thresholds does not have one number >= 0 a layer, or the backend cannot run here.
    """

    def __init__(
        self,
        adapter: MLPAdapter,
        windows: Windows,
        thresholds: Mapping[str, Sequence[float]],
        n_examples: int,
        backend: Backend = "auto",
    ) -> None:
        info = adapter.info
        self.adapter, self.windows, self.next_window = adapter, windows, 0
        self.share = range(windows.n_windows)
        self.backend = backend
        devices = [norm.device for norm in adapter.w_norms]
        self.backends = sorted({kernels.choose(device, backend).name for device in devices})
        if not isinstance(thresholds, Mapping):
            raise TypeError(
                f"thresholds must be sets by name, {{result.name: result.thresholds}}, got {said(thresholds)}"
            )
        self.names = tuple(thresholds)
        self.thresholds = torch.empty(info.n_layers, len(self.names))
        for k, (name, cuts) in enumerate(thresholds.items()):
            if not hasattr(cuts, "__len__"):
                raise TypeError(f"thresholds {name!r} must be {info.n_layers} numbers, one a layer, got {said(cuts)}")
            if len(cuts) != info.n_layers:
                raise ValueError(f"thresholds {name!r} must have {info.n_layers} numbers, one a layer, got {len(cuts)}")
            self.thresholds[:, k] = torch.tensor([float(cut) for cut in cuts])
            if not bool((self.thresholds[:, k] >= 0).all()):
                raise ValueError(f"thresholds {name!r} must be >= 0, got {list(cuts)}")
        # Each layer's state lies where the layer is: nothing is copied between devices until the end.
        one = StatisticsState.zeros(1, torch.empty(len(self.names)))  # type and trailing axes of each tensor
        sizes = {name: (getattr(one, name).dtype, getattr(one, name).shape[1:]) for name in _STATE}
        sizes |= {"maximum": (torch.float32, ()), "example_value": (torch.float32, (n_examples,))}
        sizes |= {"example_position": (torch.int64, (n_examples,))}
        self._tensors = {name: _PerLayer(devices, (info.d_mlp, *axes), dtype) for name, (dtype, axes) in sizes.items()}
        self.maximum, self.example_value, self.example_position = (self._tensors[name].layers for name in _OWN)
        for position in self.example_position:
            position.fill_(-1)
        self.states = [
            StatisticsState(
                n_tokens=0,
                thresholds=self.thresholds[layer].to(device),
                **{name: self._tensors[name].layers[layer] for name in _STATE},
            )
            for layer, device in enumerate(devices)
        ]

    def add(self, start: int, tokens: Tensor) -> None:
        """Add one batch; `start` is the index of its first window."""

        def on_post(layer: int, z: Tensor) -> None:
            w_norm, state = self.adapter.w_norms[layer], self.states[layer]
            sinks = kernels.neuron_statistics(z[:, 0], w_norm, state, backend=self.backend)
            best = kernels.neuron_statistics(z[:, 1:], w_norm, state, backend=self.backend)
            largest = self.maximum[layer]
            torch.maximum(largest, torch.maximum(sinks, best.amax(dim=0)), out=largest)
            self._examples(layer, start, z, best)

        self.adapter.final_residual(tokens, on_post)
        self.next_window = start + len(tokens)
        for layer, state in enumerate(self.states):
            if not torch.isfinite(state.activation_sum.sum()):
                block = self.adapter.info.layers[layer]
                raise MeasurementError(
                    f"layer {block}: post-activations are NaN or infinite in windows {start} to "
                    f"{self.next_window - 1}; check the weights, or use --dtype float32"
                )

    def _examples(
        self, layer: int, start: int, z: Float[Tensor, "window pos neuron"], best: Float[Tensor, "window neuron"]
    ) -> None:
        """Keep each window's largest contribution of a neuron where it is among the neuron's top K so far."""
        values, positions = self.example_value[layer], self.example_position[layer]
        if values.shape[1] == 0 or z.shape[1] < 2:
            return
        better = (best > values[:, -1]).any(dim=0).nonzero()[:, 0]
        if len(better) == 0:
            return
        first = torch.arange(start, start + len(z), device=z.device) * self.windows.window + 1
        some = better.split(max(1, _PEAK_VALUES // z.shape[1]))
        peak = torch.stack(
            [torch.cat([w[1:].index_select(1, part).float().abs_().max(dim=0).indices for part in some]) for w in z]
        )
        # Ties go to the earlier window: the old ones stand first, and the sort is stable.
        candidates = torch.cat((values[better], best[:, better].T), dim=1)
        places = torch.cat((positions[better], (peak + first[:, None]).T), dim=1)
        places[candidates == 0] = -1  # a neuron that was silent in a window has no example there
        order = candidates.argsort(dim=1, descending=True, stable=True)[:, : values.shape[1]]
        values[better], positions[better] = candidates.gather(1, order), places.gather(1, order)

    def take_share(self, batch_size: int) -> None:
        """Begin with this rank's windows, unless a state was taken up that is in the middle of them."""
        self.share = parallel.share(self.windows.n_windows, batch_size)
        self.next_window = self.next_window or self.share.start

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.adapter.info.fingerprint,
            "dtype": self.adapter.info.dtype,
            "corpus": self.windows.sha256,
            "threshold_names": list(self.names),
            "n_examples": self.example_value[0].shape[1],
            "forward": self.adapter.forward,  # these two: a resumed recording ends with the same bits
            "backends": self.backends,
        }

    def write(self, path: Path, batch_size: int) -> None:
        """Write the state, so that a later call goes on from here."""
        header = {"identity": self._identity(), "next_window": self.next_window, "batch_size": batch_size}
        write_tensors(path, self._stacked() | {"thresholds": self.thresholds}, header)

    def _stacked(self) -> dict[str, Tensor]:
        """The state of all layers on the CPU; where it is there already, no copy of it."""
        return {name: tensor.cpu() for name, tensor in self._tensors.items()}

    def resume(self, path: Path, batch_size: int | None) -> int | None:
        """Take up a state that was written; return its batch size, or None if there is none.

        Raises:
            RunFolderError: If it is damaged, or of another recording.
        """
        if not path.is_file():
            return None
        tensors, header = read_tensors(path)
        same = header.get("identity") == self._identity() and torch.equal(
            tensors.get("thresholds", torch.empty(0)), self.thresholds
        )
        if not same and not parallel.position() and drop_finished(path.parent):
            return None
        if not same:
            raise RunFolderError(f"{path} is of another recording; delete it to start afresh")
        if batch_size is not None and batch_size != header.get("batch_size"):
            raise RunFolderError(
                f"{path} was begun with batch size {header.get('batch_size')}, not {batch_size}; "
                "leave the batch size out, or delete the file to start afresh"
            )
        return int(decode(path, lambda: self._restore(tensors, header)))

    def _restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
        next_window, batch_size = int(header["next_window"]), int(header["batch_size"])
        share = parallel.share(self.windows.n_windows, max(1, batch_size))
        if not share.start <= next_window <= share.stop or batch_size < 1:
            raise ValueError(f"next_window is {next_window} of {share.stop}, batch_size {batch_size}")
        n_tokens = (next_window - share.start) * self.windows.window
        for name, tensor in tensors.items():
            check_tensor(name, tensor, n_tokens)
        position, end = tensors["example_position"], next_window * self.windows.window
        if ((position < -1) | (position >= end) | ((position >= 0) & (position < end - n_tokens))).any():
            raise ValueError(f"example_position is outside the {n_tokens} tokens that were seen")
        for layer, state in enumerate(self.states):
            state.n_tokens = n_tokens
            for name in _OWN:
                _fill(name, getattr(self, name)[layer], tensors[name][layer])
            for name in _STATE:
                _fill(name, getattr(state, name), tensors[name][layer])
        self.next_window = next_window
        return batch_size

    def finish(self) -> NeuronStatistics:
        """Return the statistics of all ranks, with the text around each example."""
        stacked = _pooled(self._stacked())
        n_tokens = self.windows.n_tokens
        context = _contexts(self.windows.tokens, stacked["example_position"])
        pieces = context.view(-1, CONTEXT_LENGTH).split(_ROWS)
        ids = sorted({token for piece in pieces for token in piece.unique().tolist() if token >= 0})
        tokenizer = self.adapter.model.tokenizer
        return NeuronStatistics(
            model=self.adapter.info,
            corpus=self.windows.describe(),
            n_tokens=n_tokens,
            zero_count=n_tokens - stacked.pop("nonzero_count"),
            contribution_max=stacked.pop("maximum"),
            thresholds=self.thresholds,
            threshold_names=self.names,
            example_context=context,
            w_norm=torch.stack([norm.cpu() for norm in self.adapter.w_norms]),
            token_strings={token: tokenizer.decode([token]) for token in ids} if tokenizer else {},
            provenance=provenance()
            | parallel.described()
            | {"forward": self.adapter.forward, "backends": {"neuron_statistics": " + ".join(self.backends)}},
            **stacked,
        )


class _PerLayer:
    """A tensor of zeros for every layer, on the layer's device; those of one device are rows of one tensor."""

    def __init__(self, devices: Sequence[torch.device], shape: Sequence[int], dtype: torch.dtype) -> None:
        self._rows = {
            device: torch.zeros(devices.count(device), *shape, dtype=dtype, device=device)
            for device in dict.fromkeys(devices)
        }
        rows = {device: iter(tensor) for device, tensor in self._rows.items()}
        self.layers = [next(rows[device]) for device in devices]

    def cpu(self) -> Tensor:
        """All layers on the CPU: the tensor itself where it is there."""
        if len(self._rows) == 1:
            return next(iter(self._rows.values())).cpu()
        return torch.stack([layer.cpu() for layer in self.layers])


def _pooled(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what all ranks have recorded together; examples in the order, and ties to the window, of one process."""
    if not parallel.position():
        return own
    summed = parallel.total({name: own[name] for name in (*_STATE, "maximum")}, maxima=("maximum",))
    values, positions = own["example_value"].clone(), own["example_position"].clone()
    for layer in range(len(values)):  # a layer at a time: memory does not grow with the number of ranks
        value = torch.cat(parallel.gather(values[layer]), dim=1)
        position = torch.cat(parallel.gather(positions[layer]), dim=1)
        # Earlier ranks hold earlier windows, and the sort is stable.
        order = value.argsort(dim=1, descending=True, stable=True)[:, : values.shape[2]]
        values[layer], positions[layer] = value.gather(1, order), position.gather(1, order)
    return summed | {"example_value": values, "example_position": positions}


def drop_finished(folder: Path) -> bool:
    """Remove the state of a recording whose result is in the folder; return whether there was one.

    A kill between writing the result and removing the state leaves both.

    Raises:
        RunFolderError: If one of them is damaged.
    """
    path, result = folder / PARTIAL, folder / "statistics.safetensors"
    if not (path.is_file() and result.is_file()):
        return False
    (state, header), (found, own) = read_tensors(path), read_tensors(result)
    of_state = decode(path, lambda: (header["identity"]["corpus"], header["identity"]["threshold_names"]))
    of_result = decode(result, lambda: (own["corpus"]["sha256"], own["threshold_names"]))
    cuts = [tensors.get("thresholds", torch.empty(0)) for tensors in (state, found)]
    finished = of_state == of_result and torch.equal(*cuts)
    if finished:
        path.unlink()
    return finished


def _fill(name: str, target: Tensor, source: Tensor) -> None:
    if source.shape != target.shape or source.dtype != target.dtype:
        raise ValueError(f"{name} is {source.dtype} {list(source.shape)}, not {target.dtype} {list(target.shape)}")
    target.copy_(source)


def _contexts(tokens: Tensor, position: Tensor) -> Tensor:
    """Gather the tokens around each example; -1 outside its window and where there is no example."""
    n_pos, flat = tokens.shape[1], tokens.reshape(-1)
    offset = torch.arange(CONTEXT_LENGTH) - CONTEXT_BEFORE
    context = torch.empty(*position.shape, CONTEXT_LENGTH, dtype=torch.int32)
    # A few at a time: their indices take many times the memory of what they fetch.
    pieces = zip(position.reshape(-1).split(_ROWS), context.view(-1, CONTEXT_LENGTH).split(_ROWS), strict=True)
    for where, found in pieces:
        pos = where.remainder(n_pos)[:, None] + offset
        inside = (pos >= 0) & (pos < n_pos) & (where >= 0)[:, None]
        found.copy_(flat.take((where[:, None] + offset).clamp_(0, len(flat) - 1)).masked_fill_(~inside, -1))
    return context
