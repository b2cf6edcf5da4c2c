"""What chosen neurons do over a passage, against the model's own hooks; and a passage that knows its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import neuron_sparsity as ns
from neuron_sparsity.truncation import TokenActivity
from neuron_sparsity.typed import checked

NEURONS = [(1, 5), (0, 63), (1, 0)]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2-compat", "hooked-silu"])
def test_activations_are_those_of_the_hooks(
    name: str, tiny_model: Callable[..., Any], own_windows: Callable[..., Any], hooks_on: Callable[..., int]
) -> None:
    model = tiny_model(name)
    windows = own_windows(model, 3)
    before = hooks_on(model)
    found = ns.neuron_activations(model, windows, NEURONS, window=2, n_tokens=20)
    assert hooks_on(model) == before
    names = [f"blocks.{layer}.mlp.hook_post" for layer in (0, 1)]
    _, cache = model.run_with_cache(windows.tokens[2:3, :20].long(), names_filter=names)
    adapter = ns.attach(model)
    for column, (layer, neuron) in enumerate(NEURONS):
        z = cache[names[layer]][0, :, neuron]
        torch.testing.assert_close(found.activation[:, column], z, rtol=1e-4, atol=1e-5)
        norm = adapter.w_out(layer)[neuron].norm()
        torch.testing.assert_close(found.contribution[:, column], z.abs() * norm, rtol=1e-4, atol=1e-5)
    assert found.neurons == tuple(NEURONS)
    assert found.token_ids == windows.tokens[2, :20].tolist()
    assert found.corpus["window_index"] == 2
    view = ns.viz.text(found, first=1)
    assert "20 tokens of window 2" in view.measured
    assert found.model.name in view.measured


def test_what_is_not_there_is_refused(tiny_model: Callable[..., Any], own_windows: Callable[..., Any]) -> None:
    model = tiny_model("opt")
    windows = own_windows(model, 2)
    for arguments, said in (
        ({"neurons": [(2, 0)]}, r"no neuron \(2, 0\) in .*: layers 0 to 1, neurons 0 to 63"),
        ({"neurons": [(0, 64)]}, r"no neuron \(0, 64\)"),
        ({"neurons": []}, "no neuron was chosen"),
        ({"neurons": NEURONS, "window": 2}, "window must be between 0 and 1, got 2"),
        ({"neurons": NEURONS, "n_tokens": 0}, "n_tokens must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            ns.neuron_activations(model, windows, **arguments)


def test_views_of_a_real_passage(tiny_model: Callable[..., Any], own_windows: Callable[..., Any]) -> None:
    model = tiny_model("opt")
    windows = own_windows(model, 4)
    activity = ns.token_activity(model, windows, [0.5, 0.5], n_tokens=10)
    again = checked(TokenActivity.from_json(activity.to_json()))
    assert again.model == activity.model == ns.attach(model).info
    old = {key: value for key, value in activity.to_json().items() if key != "model"}
    assert checked(TokenActivity.from_json(old)).model is None
    assert ns.viz.token_activity(again).measured.startswith(f"{again.model.name} on its own words, 128 tokens")
    ends = [ns.rank(model, windows, per_token=True, k=3, n_tokens=10, largest=largest) for largest in (True, False)]
    panels = ns.viz.topk(*ends, layer=1).figure().axes
    assert panels[0].images[0].get_array().tolist() == ends[0].contribution[1].T.tolist()
    stats = ns.record(model, windows, thresholds={"half": [0.5, 0.5]})
    bars = ns.viz.histogram(stats, (1, 5)).figure().axes[0].patches
    active = sum(bar.get_height() for bar in bars if bar.get_x() >= 0.5)
    assert active == pytest.approx(100 * float(stats.activation_frequency("half")[1, 5])), "0.5 is an edge of a bin"
    assert ns.viz.layer_map(stats).figure().axes[0].images[0].get_array().shape == (2, 64)
