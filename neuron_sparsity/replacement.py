"""What takes a removed neuron's place, and `ablate`, which puts it there while a context is open.

A removed neuron's post-activation is replaced on every token:

- `zero`: by 0.
- `mean`: by its mean over a corpus.
- `resample`: by its value at a random other token of a corpus. One token is drawn for each position and shared by all
  removed neurons of all layers: what stands in is then something the model really computed together. Drawn neuron by
  neuron, what they do in common would average out, and the damage would look smaller than it is.

How resample draws: a *bank* holds the values of the removed neurons (and of no others) at up to 2,048 tokens of the
corpus, evenly spread, each context once. A position's token and all tokens before it in its window are hashed with
the seed, and the hash picks the bank's row. So the same seed gives the same numbers whatever the batch size, the order
of windows, or which of them are run; and the row whose own hash it is, the token itself, is passed over for the next.
Where a model runs on with a cache, the tokens before are those of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from neuron_sparsity import placement
from neuron_sparsity.adapter import MLPAdapter, PostHook, attach
from neuron_sparsity.blueprint import mlp_outputs
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import check_windows, finite, shape_of

__all__ = ["BANK_TOKENS", "REPLACEMENTS", "Neurons", "Replacer", "ablate", "default_replacement", "neuron_mask"]

REPLACEMENTS = ("mean", "zero", "resample")
BANK_TOKENS = 2048
_BANK_BYTES = 1 << 28  # of a bank that is made before it is known how many neurons go

Neurons = Iterable[tuple[int, int]]
"""(layer, neuron) pairs; layer is the block's index."""


class _Model(Protocol):
    """What a replacement needs of a model."""

    @property
    def blocks(self) -> Sequence[int]:
        """Block index of each layer that has an MLP."""

    @property
    def d_mlp(self) -> int:
        """Neurons a layer."""

    @property
    def embedding(self) -> nn.Module:
        """The module that reads the tokens."""

    def hooked(self, on_post: PostHook | None) -> AbstractContextManager[None]:
        """Call `on_post` at every layer's post-activations while the context is open."""

    def run(self, tokens: Int[Tensor, "batch pos"], on_post: PostHook) -> None:
        """Run tokens, without logits."""


@contextmanager
def ablate(
    model: Any,
    neurons: Neurons,
    *,
    replacement: str | None = None,
    means: Float[Tensor, "layer neuron"] | None = None,
    corpus: Windows | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """Remove neurons while the context is open: their post-activation is replaced on every token.

    Args:
        model: TransformerLens model or adapter, or a plain Hugging Face causal language model: there the layer is the
            block's index too, and a neuron a row of the down projection as it is loaded.
        neurons: (layer, neuron) pairs.
        replacement: `"zero"`; `"mean"` for each neuron's mean; `"resample"` for its value at a random other token
            (the module's docstring says how it is drawn). Default: mean where `means` are given, else zero.
        means: Mean post-activations (`NeuronStatistics.mean_activation`), for `"mean"`.
        corpus: Text that `"resample"` draws from, or that means are taken over where none are given: the model runs
            on it, with whatever hooks it has, when the context opens.
        seed: Of `"resample"`.

    Raises:
        TypeError: If the model is neither, or pairs are no integers.
        ValueError: If a neuron does not exist or is named twice, or what the replacement needs is missing or of
            another shape.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_layer=2, n_embd=16, n_inner=32, n_head=2, vocab_size=50)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> tokens = torch.arange(8)[None]
        >>> with torch.no_grad():
        ...     before = model(tokens).logits
        ...     with ablate(model, [(0, 5), (1, 30)]):
        ...         inside = model(tokens).logits
        ...     after = model(tokens).logits
        >>> torch.equal(before, inside), torch.equal(before, after)
        (False, True)
    """
    if replacement is None and means is None and corpus is not None:
        raise ValueError("corpus is for replacement='mean' or 'resample': name one of them, or leave corpus out")
    chosen = default_replacement(replacement, means)
    replacer = Replacer(model, chosen, means=finite(means), corpus=corpus, seed=seed)
    with replacer.on_post(neuron_mask(replacer.blocks, replacer.d_mlp, neurons)) as on_post, replacer.hooked(on_post):
        yield


def default_replacement(replacement: str | None, means: object) -> str:
    """Return the replacement that was named, or the one that goes with what was given."""
    return replacement or ("zero" if means is None else "mean")


def neuron_mask(blocks: Sequence[int], d_mlp: int, neurons: Neurons) -> Bool[Tensor, "layer neuron"]:
    """Return which neurons are named, one row for each block that has an MLP.

    Raises:
        TypeError: If something is no pair of integers.
        ValueError: If a neuron does not exist or is named twice.

    Example:
        >>> neuron_mask([3, 4], 2, [(4, 1)]).tolist()
        [[False, False], [False, True]]
    """
    rows = {block: row for row, block in enumerate(blocks)}
    mask = torch.zeros(len(blocks), d_mlp, dtype=torch.bool)
    for pair in neurons:
        try:
            layer, neuron = (int(number.__index__()) for number in pair)
        except (TypeError, ValueError, AttributeError):
            raise TypeError(f"neurons are pairs (layer, neuron) of integers, got {pair!r}") from None
        if layer not in rows or not 0 <= neuron < d_mlp:
            raise ValueError(
                f"no neuron ({layer}, {neuron}): layers are {blocks[0]} to {blocks[-1]}, neurons 0 to {d_mlp - 1}"
            )
        if mask[rows[layer], neuron]:
            raise ValueError(f"neuron ({layer}, {neuron}) is named twice")
        mask[rows[layer], neuron] = True
    return mask


class Replacer:
    """Replaces sets of neurons of one model in one way.

    Args:
        model: TransformerLens model or adapter, or a plain Hugging Face model.
        replacement: `"zero"`, `"mean"` or `"resample"`.
        means: For `"mean"`.
        corpus: For `"resample"`, or for `"mean"` without means.
        seed: Of `"resample"`.

    Raises:
        TypeError, ValueError: As `ablate` does.

    Attributes:
        blocks: Block index of each layer that has an MLP.
        d_mlp: Neurons a layer.
        tokens_run: Tokens that were run to fill banks and to take means.
    """

    def __init__(
        self,
        model: Any,
        replacement: str,
        *,
        means: Float[Tensor, "layer neuron"] | None = None,
        corpus: Windows | None = None,
        seed: int = 0,
    ) -> None:
        if replacement not in REPLACEMENTS:
            raise ValueError(f"replacement must be one of {', '.join(REPLACEMENTS)}, got {replacement!r}")
        self._model = _held(model)
        if corpus is not None:
            check_windows("corpus", corpus, self._model.adapter if isinstance(self._model, _Wrapped) else None)
        self.replacement, self.corpus, self.seed = replacement, corpus, seed
        self.blocks, self.d_mlp = tuple(self._model.blocks), self._model.d_mlp
        self.tokens_run = 0
        self._bank: _Bank | None = None
        shape = (len(self.blocks), self.d_mlp)
        if replacement == "mean" and (means is not None or corpus is None) and tuple(shape_of(means)) != shape:
            raise ValueError(
                f"replacement 'mean' needs means of shape {list(shape)}, got {shape_of(means) or 'none'}; "
                "record the model first, or give a corpus"
            )
        if replacement == "resample" and corpus is None:
            raise ValueError("replacement 'resample' needs a corpus to draw from; give corpus=load_corpus(...)")
        self._means = means if replacement == "mean" else None

    def hooked(self, on_post: PostHook | None) -> AbstractContextManager[None]:
        """Call `on_post` at every layer's post-activations while the context is open."""
        return self._model.hooked(on_post)

    def prepare(self, mask: Bool[Tensor, "layer neuron"]) -> None:
        """Fill the bank of `"resample"` for all these neurons at once, so that it serves any of them later."""
        if self.replacement == "resample" and (self._bank is None or not self._bank.covers(mask)):
            assert self.corpus is not None
            self._bank = _Bank(self._model, self.corpus, mask, self.seed)
            self.tokens_run += self._bank.tokens_run

    def spare(self) -> int:
        """Return of how many neurons a bank may be made before it is known whether they go."""
        return _BANK_BYTES // (4 * BANK_TOKENS)

    @contextmanager
    def on_post(self, mask: Bool[Tensor, "layer neuron"]) -> Iterator[PostHook | None]:
        """Yield the hook that replaces the neurons of a mask, or None if there are none.

        It works while the context is open: `"resample"` reads the tokens that enter the model.
        """
        touched = mask.any(dim=1).tolist()
        if not any(touched):
            yield None
        elif self.replacement == "resample":
            self.prepare(mask)
            assert self._bank is not None
            with self._bank.reading(self._model.embedding):
                yield self._bank.hook(mask, touched)
        else:
            yield _filling(mask, touched, self._fill(mask))

    def _fill(self, mask: Tensor) -> Tensor:
        if self.replacement == "mean" and self._means is None:
            assert self.corpus is not None
            self._means = _mean_over(self._model, self.corpus)
            self.tokens_run += self.corpus.n_tokens
        return torch.zeros(mask.shape) if self._means is None else torch.where(mask, self._means.float().cpu(), 0.0)


def _filling(mask: Tensor, touched: list[bool], fill: Tensor) -> PostHook:
    factor = (~mask).float()

    def on_post(layer: int, z: Tensor) -> Tensor | None:
        if not touched[layer]:
            return None
        # Exactly z where the factor is 1, the filling where it is 0; on a CPU in half the time of torch.where.
        return torch.addcmul(fill[layer].to(z), z, factor[layer].to(z))

    return on_post


def _mean_over(model: _Model, corpus: Windows) -> Float[Tensor, "layer neuron"]:
    sums = torch.zeros(len(model.blocks), model.d_mlp, dtype=torch.float64)

    def on_post(layer: int, z: Tensor) -> None:
        sums[layer] += z.reshape(-1, z.shape[-1]).sum(dim=0, dtype=torch.float64).cpu()

    for window in corpus.tokens:
        model.run(window[None].long(), on_post)
    return sums / corpus.n_tokens


class _Bank:
    """Values of some neurons at some tokens of a corpus, and which of them stands in for the token that runs.

    Attributes:
        tokens_run: Tokens that were run to fill it.
    """

    def __init__(self, model: _Model, corpus: Windows, mask: Bool[Tensor, "layer neuron"], seed: int) -> None:
        windows = corpus.take(min(corpus.n_windows, -(-BANK_TOKENS // corpus.window)))
        keys, first = np.unique(_context_keys(windows.tokens.numpy()), return_index=True)
        if len(first) > BANK_TOKENS:
            chosen = np.sort(np.random.default_rng(0).permutation(len(first))[:BANK_TOKENS])
            keys, first = keys[chosen], first[chosen]
        if len(first) < 2:
            raise ValueError("replacement 'resample' needs a corpus with at least two different tokens to draw from")
        self._keys, self._salt, self.tokens_run = keys, _mixed(np.array([seed], dtype=np.int64).view(np.uint64)), 0
        self._columns = [row.nonzero()[:, 0] for row in mask]
        self._place = torch.where(mask, mask.cumsum(dim=1) - 1, -1)
        self._values: list[Tensor] = [torch.empty(0)] * len(mask)
        self._donors: Tensor | None = None
        for index, window in enumerate(windows.tokens):
            wanted = np.flatnonzero(first // windows.window == index)
            if len(wanted):
                self._collect(model, window, torch.from_numpy(wanted), torch.from_numpy(first[wanted] % windows.window))

    def _collect(self, model: _Model, window: Tensor, rows: Tensor, positions: Tensor) -> None:
        def on_post(layer: int, z: Tensor) -> None:
            columns = self._columns[layer]
            if not len(columns):
                return
            if not len(self._values[layer]):
                self._values[layer] = torch.zeros(len(self._keys), len(columns), dtype=z.dtype, device=z.device)
            found = z.detach().reshape(len(window), -1)[positions.to(z.device)]
            self._values[layer][rows.to(z.device)] = found[:, columns.to(z.device)]

        model.run(window[None].long(), on_post)
        self.tokens_run += len(window)

    def covers(self, mask: Bool[Tensor, "layer neuron"]) -> bool:
        """Return whether it holds the values of all these neurons."""
        return not bool((mask & (self._place < 0)).any())

    @contextmanager
    def reading(self, embedding: nn.Module) -> Iterator[None]:
        """Draw a row for every position that enters the model while the context is open."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = args[0] if args else kwargs["input"]
            self._donors = self._drawn(tokens.detach().cpu().numpy().reshape(-1, tokens.shape[-1]))

        handle = embedding.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._donors = None

    def _drawn(self, tokens: Int[np.ndarray, "batch pos"]) -> Int[Tensor, " row"]:
        keys = _context_keys(tokens)
        rows = (_mixed(keys ^ self._salt) % np.uint64(len(self._keys))).astype(np.int64)
        own = self._keys[rows] == keys
        return torch.from_numpy(np.where(own, (rows + 1) % len(self._keys), rows))

    def hook(self, mask: Bool[Tensor, "layer neuron"], touched: list[bool]) -> PostHook:
        columns = [row.nonzero()[:, 0] for row in mask]
        places = [self._place[layer, column] for layer, column in enumerate(columns)]

        def on_post(layer: int, z: Tensor) -> Tensor | None:
            if not touched[layer]:
                return None
            flat = z.reshape(-1, z.shape[-1])
            if self._donors is None or len(self._donors) != len(flat):
                raise ValueError("replacement 'resample' needs the tokens: run the model on tokens, not on embeddings")
            values, rows = self._values[layer], self._donors.to(z.device)
            drawn = values[rows[:, None], places[layer].to(z.device)[None]]
            return flat.index_copy(1, columns[layer].to(z.device), drawn.to(z.dtype)).reshape(z.shape)

        return on_post


def _context_keys(tokens: Int[np.ndarray, "batch pos"]) -> np.ndarray:
    """Return a hash of each token together with all before it in its row, flattened."""
    keys = np.zeros(tokens.shape, dtype=np.uint64)
    key = np.zeros(len(tokens), dtype=np.uint64)
    for pos in range(tokens.shape[1]):
        key = _mixed(key * np.uint64(0x9E3779B97F4A7C15) + tokens[:, pos].astype(np.uint64) + np.uint64(1))
        keys[:, pos] = key
    return keys.reshape(-1)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Return 64 bits that depend on all 64 given (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _held(model: Any) -> _Model:
    if isinstance(model, MLPAdapter) or (hasattr(model, "blocks") and hasattr(model, "hooks")):
        return _Wrapped(attach(model))
    if isinstance(model, nn.Module) and hasattr(model, "get_input_embeddings"):
        return _Plain(model)
    raise TypeError(
        f"model must be a TransformerLens model or a causal language model of transformers, got {type(model).__name__}"
    )


class _Wrapped:
    """A TransformerLens model."""

    def __init__(self, adapter: MLPAdapter) -> None:
        self.adapter = adapter
        self.blocks, self.d_mlp = adapter.info.layers, adapter.info.d_mlp
        self.hooked: Callable[[PostHook | None], AbstractContextManager[None]] = adapter.hooked
        embedding = adapter.model.embed
        while isinstance(getattr(embedding, "original_component", None), nn.Module):
            embedding = embedding.original_component
        self.embedding: nn.Module = embedding  # the same one whether the wrapper runs or the model inside it

    def run(self, tokens: Int[Tensor, "batch pos"], on_post: PostHook) -> None:
        with torch.no_grad():
            self.adapter.final_residual(tokens, on_post)


class _Plain:
    """A Hugging Face model as it is."""

    def __init__(self, model: Any) -> None:
        self.model, self.projections = model, mlp_outputs(model)
        self.blocks = tuple(self.projections)
        widths = {_n_neurons(module) for module in self.projections.values()}
        if len(widths) > 1:
            raise ValueError(
                f"layers differ in width ({sorted(widths)}); prune with form='zeroed' to ablate what is left"
            )
        self.d_mlp = widths.pop()
        self.embedding: nn.Module = model.get_input_embeddings()

    @contextmanager
    def hooked(self, on_post: PostHook | None) -> Iterator[None]:
        with ExitStack() as stack:
            if on_post is not None:
                for row, module in enumerate(self.projections.values()):

                    def before(module: nn.Module, args: tuple[Tensor, ...], row: int = row) -> Any:
                        changed = on_post(row, args[0])
                        return None if changed is None else (changed, *args[1:])

                    stack.callback(module.register_forward_pre_hook(before).remove)
            yield

    def run(self, tokens: Int[Tensor, "batch pos"], on_post: PostHook) -> None:
        base = getattr(self.model, "base_model", self.model)  # without the unembedding
        with torch.no_grad(), self.hooked(on_post):
            base(input_ids=tokens.to(placement.device_of(self.embedding)), use_cache=False)


def _n_neurons(module: nn.Module) -> int:
    shape: tuple[int, ...] = tuple(module.weight.shape)  # type: ignore[union-attr, arg-type]
    return int(shape[0] if type(module).__name__ == "Conv1D" else shape[1])
