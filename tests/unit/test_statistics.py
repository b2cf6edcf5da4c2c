"""NeuronStatistics without a model: what is read off the counts, what merging keeps, and what a folder gives back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.kernels import histogram_edges
from neuron_sparsity.statistics import CONTEXT_BEFORE, CONTEXT_LENGTH, NeuronStatistics
from neuron_sparsity.store import read_tensors, write_tensors

N_LAYERS, D_MLP, WINDOW = 2, 3, 8
MODEL = ModelInfo("tiny", N_LAYERS, 4, D_MLP, "relu", False, "float32", "as loaded", "test", (0, 1), "f" * 16)
CUTS = torch.tensor([[0.5], [2.0]])
COUNTS = ("zero_count", "histogram", "above_count")
SUMS = ("contribution_sum", "contribution_sq_sum", "activation_sum")


def make_activations(seed: int, n_windows: int) -> Tensor:
    """z [layer, window, pos, neuron] on a coarse grid, so that there are zeros, ties and values on bin edges."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 7, (N_LAYERS, n_windows, WINDOW, D_MLP), generator=generator) / 2


def make_statistics(z: Tensor, name: str = "text", n_examples: int = 2) -> NeuronStatistics:
    """Statistics of z with all output norms 1, counted by numpy."""
    c = z.abs().double().flatten(1, 2)  # [layer, token, neuron]
    n_windows = z.shape[1]
    edges = np.append(histogram_edges().numpy(), np.inf)
    bins = [[np.histogram(c[layer, :, neuron], edges)[0] for neuron in range(D_MLP)] for layer in range(N_LAYERS)]
    value = torch.zeros(N_LAYERS, D_MLP, n_examples)
    position = torch.full((N_LAYERS, D_MLP, n_examples), -1)
    for layer in range(N_LAYERS):
        for neuron in range(D_MLP):
            best = [z[layer, w, 1:, neuron].abs().max(dim=0) for w in range(n_windows)]
            found = [(-float(b.values), w * WINDOW + int(b.indices) + 1) for w, b in enumerate(best) if b.values > 0]
            for rank, (negative, where) in enumerate(sorted(found)[:n_examples]):
                value[layer, neuron, rank], position[layer, neuron, rank] = -negative, where
    context = torch.full((*position.shape, CONTEXT_LENGTH), -1, dtype=torch.int32)
    context[..., CONTEXT_BEFORE] = torch.where(position >= 0, position % 50, -1)
    n_tokens = n_windows * WINDOW
    corpus = {"name": name, "sha256": name, "n_tokens": n_tokens, "scored_tokens": n_tokens - n_windows}
    return NeuronStatistics(
        model=MODEL,
        corpus=corpus | {"n_windows": n_windows, "window": WINDOW},
        n_tokens=n_tokens,
        zero_count=(c == 0).sum(1),
        contribution_sum=c.sum(1),
        contribution_sq_sum=(c**2).sum(1),
        activation_sum=z.double().sum((1, 2)),
        contribution_max=c.amax(1).float(),
        histogram=torch.tensor(np.array(bins), dtype=torch.int64),
        thresholds=CUTS,
        above_count=(c >= CUTS[:, :, None]).sum(1)[..., None],
        threshold_names=("CETT-PPL-1%",),
        example_value=value,
        example_position=position,
        example_context=context,
        token_strings={token: f"<{token}>" for token in context.unique().tolist() if token >= 0},
        w_norm=torch.ones(N_LAYERS, D_MLP),
    )


def assert_same(a: NeuronStatistics, b: NeuronStatistics, *, exact_sums: bool = True) -> None:
    for field in fields(NeuronStatistics):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name in SUMS and not exact_sums:
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
        elif isinstance(left, Tensor):
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


# --- what is read off ---


def test_means_by_hand() -> None:
    z = torch.zeros(N_LAYERS, 1, WINDOW, D_MLP)
    z[0, 0, :2, 0] = torch.tensor([3.0, -4.0])
    stats = make_statistics(z)
    assert (stats.n_layers, stats.d_mlp, stats.n_tokens) == (2, 3, 8)
    assert float(stats.mean_contribution[0, 0]) == 7 / 8
    assert float(stats.mean_activation[0, 0]) == -1 / 8
    assert float(stats.rms_contribution[0, 0]) == pytest.approx((25 / 8) ** 0.5)
    assert stats.zero_count.tolist() == [[6, 8, 8], [8, 8, 8]]
    assert stats.mean_contribution.dtype == torch.float64


def test_frequency_of_recorded_thresholds() -> None:
    z = make_activations(0, 5)
    stats = make_statistics(z)
    expected = (z.abs() >= CUTS[:, :, None, None]).double().mean((1, 2))
    for which in (0, "CETT-PPL-1%"):
        assert torch.equal(stats.activation_frequency(which), expected)
    with pytest.raises(ValueError, match=r"^no thresholds named 'x' were recorded, only \['CETT-PPL-1%'\]$"):
        stats.activation_frequency("x")
    for which in (1, -1):
        with pytest.raises(ValueError, match=rf"^1 sets of thresholds were recorded, got number {which}$"):
            stats.activation_frequency(which)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), edges=st.lists(st.integers(1, 63), min_size=N_LAYERS, max_size=N_LAYERS))
def test_frequency_at_a_bins_edge_is_exact(seed: int, edges: list[int]) -> None:
    z = make_activations(seed, 3)
    cuts = histogram_edges()[edges]
    frequency = make_statistics(z).activation_frequency_at(cuts.tolist())
    expected = (z.abs().double() >= cuts[:, None, None, None]).double().mean((1, 2))
    torch.testing.assert_close(frequency, expected, rtol=1e-12, atol=1e-12)


def test_frequency_inside_a_bin_is_interpolated() -> None:
    z = torch.full((N_LAYERS, 1, WINDOW, D_MLP), 1.25)  # in the bin [1, 1.5)
    stats = make_statistics(z)
    at = [float(stats.activation_frequency_at(cut)[0, 0]) for cut in (1.0, 1.125, 1.25, 1.5)]
    assert at == pytest.approx([1.0, 0.75, 0.5, 0.0])


@given(st.lists(st.floats(1e-9, 1e5), min_size=2, max_size=6))
def test_frequency_is_a_share_and_falls(cuts: list[float]) -> None:
    stats = make_statistics(make_activations(3, 4))
    frequencies = torch.stack([stats.activation_frequency_at(cut) for cut in sorted(cuts)])
    assert bool((frequencies >= 0).all())
    assert bool((frequencies <= 1 + 1e-12).all())
    assert bool((frequencies.diff(dim=0) <= 1e-12).all())


@pytest.mark.parametrize("cut", [0.0, -1.0, float("nan"), [1.0, 2.0, 3.0], []])
def test_frequency_at_refuses(cut: Any) -> None:
    expected = re.escape(f"threshold must be one or 2 positive numbers, got {cut}")
    with pytest.raises(ValueError, match=f"^{expected}$"):
        make_statistics(make_activations(0, 1)).activation_frequency_at(cut)


# --- merging ---


def test_merged_parts_are_the_whole() -> None:
    z = make_activations(1, 6)
    a, b = make_statistics(z[:, :4], "a"), make_statistics(z[:, 4:], "b")
    merged, whole = a.merge(b), make_statistics(z)
    for name in (*COUNTS, "contribution_max", "example_value", "thresholds", "w_norm", "n_tokens"):
        assert torch.equal(torch.as_tensor(getattr(merged, name)), torch.as_tensor(getattr(whole, name))), name
    for name in SUMS:
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert merged.corpus["n_windows"] == 6
    assert merged.corpus["scored_tokens"] == whole.corpus["scored_tokens"]
    assert merged.corpus["name"] == "a + b"
    assert merged.token_strings == a.token_strings | b.token_strings


@settings(max_examples=20)
@given(seeds=st.tuples(*[st.integers(0, 1000)] * 3), sizes=st.tuples(*[st.integers(1, 4)] * 3))
def test_merging_is_associative(seeds: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    parts = zip(seeds, sizes, "abc", strict=True)
    a, b, c = (make_statistics(make_activations(seed, size), name) for seed, size, name in parts)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)), exact_sums=False)


def test_order_matters_for_no_number() -> None:
    a, b = make_statistics(make_activations(0, 2), "a"), make_statistics(make_activations(1, 3), "b")
    one, other = a.merge(b), b.merge(a)
    for name in (*COUNTS, "contribution_max", "example_value"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.corpus == other.corpus


def test_merging_changes_neither_part() -> None:
    a, b = make_statistics(make_activations(0, 2), "a"), make_statistics(make_activations(1, 3), "b")
    a.merge(b)
    assert_same(a, make_statistics(make_activations(0, 2), "a"))
    assert_same(b, make_statistics(make_activations(1, 3), "b"))


def test_merging_keeps_the_smaller_number_of_examples() -> None:
    a = make_statistics(make_activations(0, 4), "a", n_examples=3)
    b = make_statistics(make_activations(1, 4), "b", n_examples=1)
    assert a.merge(b).example_value.shape == b.merge(a).example_value.shape == (N_LAYERS, D_MLP, 1)
    none = make_statistics(make_activations(2, 4), "c", n_examples=0)
    assert a.merge(none).example_context.shape == (N_LAYERS, D_MLP, 0, CONTEXT_LENGTH)


def test_context_goes_with_its_example() -> None:
    merged = make_statistics(make_activations(0, 4), "a").merge(make_statistics(make_activations(1, 4), "b"))
    expected = torch.where(merged.example_position >= 0, merged.example_position % 50, -1)
    assert torch.equal(merged.example_context[..., CONTEXT_BEFORE].long(), expected)


def test_what_cannot_be_merged() -> None:
    a, b = make_statistics(make_activations(0, 2), "a"), make_statistics(make_activations(1, 2), "b")
    with pytest.raises(ValueError, match=r"^both statistics contain the same windows, which would count twice$"):
        a.merge(a)
    with pytest.raises(ValueError, match=r"^both statistics contain the same windows"):
        a.merge(b).merge(b)
    other = replace(b, model=replace(MODEL, name="large", fingerprint="0" * 16))
    with pytest.raises(ValueError, match=r"^statistics of different models: tiny and large$"):
        a.merge(other)
    message = r"^statistics under different thresholds; record both with the same ones$"
    for changes in ({"threshold_names": ("x",)}, {"thresholds": CUTS * 2}):
        with pytest.raises(ValueError, match=message):
            a.merge(replace(b, **changes))


# --- on disk ---


def test_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    stats = make_statistics(make_activations(5, 3)).merge(make_statistics(make_activations(6, 2), "b"))
    stats.save(tmp_path)
    assert_same(NeuronStatistics.load(tmp_path), stats)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_round_trip_without_thresholds_or_examples(tmp_path: Path) -> None:
    stats = make_statistics(make_activations(5, 3), n_examples=0)
    none = {"threshold_names": (), "thresholds": CUTS[:, :0], "above_count": stats.above_count[..., :0]}
    replace(stats, **none).save(tmp_path)
    assert_same(NeuronStatistics.load(str(tmp_path)), replace(stats, **none))


def test_infinite_values_are_no_damage(tmp_path: Path) -> None:
    """A threshold that cuts everything is infinite, and squares of large contributions overflow float32."""
    stats = make_statistics(make_activations(5, 3))
    stats = replace(stats, thresholds=torch.full_like(CUTS, math.inf))
    stats.contribution_sq_sum[0, 0] = math.inf
    stats.save(tmp_path)
    assert_same(NeuronStatistics.load(tmp_path), stats)


def edited(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors, header = read_tensors(path)
        change(tensors, header)
        write_tensors(path, tensors, header)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "does not exist; the step that writes it has not run"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read (SafetensorError: "),
        (edited(lambda tensors, header: tensors.pop("histogram")), "is damaged (KeyError: 'histogram')"),
        (edited(lambda tensors, header: header.pop("n_tokens")), "is damaged (KeyError: 'n_tokens')"),
        (edited(lambda tensors, header: header.update(corpus=3)), "is damaged (TypeError: "),
        (edited(lambda tensors, header: header.update(token_strings={"x": "y"})), "is damaged (ValueError: "),
        (edited(lambda tensors, header: header["model"].pop("d_mlp")), "is damaged (KeyError: "),
        (edited(lambda tensors, header: header["model"].update(d_mlp=4)), "is damaged (ValueError: zero_count is"),
        (edited(lambda tensors, header: header.update(threshold_names=[])), "is damaged (ValueError: thresholds is"),
        (
            edited(lambda tensors, header: tensors.update(above_count=tensors["above_count"].double())),
            "is damaged (ValueError: above_count is torch.float64 [2, 3, 1], not torch.int64 [2, 3, 1])",
        ),
        (
            edited(lambda tensors, header: tensors.update(example_position=tensors["example_position"][..., :1])),
            "is damaged (ValueError: example_position is torch.int64 [2, 3, 1], not torch.int64 [2, 3, 2])",
        ),
        (edited(lambda tensors, header: header.update(n_tokens=0)), "is damaged (ValueError: 0 tokens, 2 layers"),
        (
            edited(lambda tensors, header: header.update(n_tokens=2**63)),
            "is damaged (ValueError: 92233720368",
        ),
        (edited(lambda tensors, header: header.update(n_tokens=7)), "is damaged (ValueError: histogram has counts"),
        (edited(lambda tensors, header: tensors["histogram"].sub_(1)), "is damaged (ValueError: histogram has counts"),
        (edited(lambda tensors, header: tensors["w_norm"].fill_(math.nan)), "is damaged (ValueError: w_norm is NaN)"),
        (edited(lambda tensors, header: header["model"].update(layers=[0])), "is damaged (ValueError: 16 tokens, 2 la"),
        (edited(lambda tensors, header: header["model"].update(d_model="4")), "is damaged (TypeError: d_model must be"),
        (edited(lambda tensors, header: header["corpus"].pop("window")), "is damaged (KeyError: 'window')"),
        (edited(lambda tensors, header: header["corpus"].update(name=1)), "is damaged (ValueError: name of the corpus"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    make_statistics(make_activations(0, 2)).save(tmp_path)
    path = tmp_path / "statistics.safetensors"
    damage(path)
    with pytest.raises(RunFolderError) as caught:
        NeuronStatistics.load(tmp_path)
    assert str(caught.value).startswith(f"{path} {message}")
    assert "\n" not in str(caught.value)


def test_a_file_of_a_newer_version(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_statistics(make_activations(0, 2)).save(tmp_path)
    path = tmp_path / "statistics.safetensors"
    _, header = read_tensors(path)
    save_file(load_file(path), path, {"header": json.dumps(header | {"schema": 2})})
    with pytest.raises(RunFolderError, match=r"has schema 2, this version reads up to 1; `pip install -U neuron-spars"):
        NeuronStatistics.load(tmp_path)
