"""A run of SmolLM2's shape without a model: stand-ins with the attributes the report reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neuron_sparsity.damage import DamageResult
from neuron_sparsity.damage_tables import Interval, LayerDamage, TokenDamage
from neuron_sparsity.interval import Estimate
from neuron_sparsity.model_info import ModelInfo
from tests.report.browser import CHROMIUM, Tab, chromium

HOSTILE = "</script><img src=x onerror=alert(1)>"
EXAMPLES, CONTEXT, CENTRE = 5, 24, 16
WORDS = [
    " the",
    " of",
    " and",
    ",",
    ".",
    " America",
    " government",
    " peace",
    "\n",
    " to",
    " we",
    " Congress",
    " shall",
    " people",
    " a",
    " in",
    " year",
    " —",
    "ing",
    "’s",
]


def model(n_layers: int, d_mlp: int, name: str) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        n_layers=n_layers,
        d_model=576,
        d_mlp=d_mlp,
        activation="silu",
        gated=True,
        dtype="float32",
        weights="as loaded",
        fingerprint="c0ffee",
        layers=tuple(range(n_layers)),
    )


def corpus(name: str, n_tokens: int, window: int) -> dict[str, Any]:
    n_windows = max(n_tokens // window, 1)
    return {
        "name": name,
        "sha256": "9f2c" * 16,
        "n_tokens": n_tokens,
        "window": window,
        "n_windows": n_windows,
        "scored_tokens": n_tokens - n_windows,
        "bos": True,
        "packing": "apart",
        "stride": window,
    }


@dataclass
class Run:
    """The arguments of `report`."""

    stats: SimpleNamespace
    result: SimpleNamespace
    removed: SimpleNamespace
    passage: SimpleNamespace
    kwargs: dict[str, Any] = field(default_factory=dict)


def make_run(
    n_layers: int = 4,
    d_mlp: int = 48,
    n_tokens: int = 16_384,
    *,
    name: str = "smollm2-135m",
    words: list[str] | None = None,
    n_passage: int = 24,
) -> Run:
    random = np.random.default_rng(0)
    words = words or WORDS
    info, text = model(n_layers, d_mlp, name), corpus("sotu", n_tokens, 512)
    shift = random.normal(0.0, 1.1, (n_layers, d_mlp)) + np.linspace(-0.5, 0.8, n_layers)[:, None]
    frequency = 1 / (1 + np.exp(-1.6 * (shift + 0.5)))
    above = random.binomial(n_tokens, frequency)
    above[:, : max(d_mlp // 200, 2)] = 0
    above[:, -2:] = n_tokens
    edges = (0.0009, 0.0011, 0.0019, 0.0098, 0.0102, 0.0195, 0.9898, 0.9902)  # just beside where classes begin
    above[0, 2:13] = [3, int(0.005 * n_tokens), int(0.9999 * n_tokens), *(int(edge * n_tokens) for edge in edges)]
    zero = np.where(above == 0, random.binomial(n_tokens, 0.9, above.shape), 0)
    zero[0, :2] = n_tokens
    total = np.exp(shift - 2.5 + 0.4 * random.normal(size=shift.shape)) * n_tokens * (zero < n_tokens)
    value = -np.sort(-np.exp(shift[:, :, None] + 0.4 * random.normal(size=(*shift.shape, EXAMPLES))), axis=2)
    value[zero == n_tokens] = 0
    position = random.integers(0, n_tokens, value.shape)
    position[zero == n_tokens] = -1
    context = random.integers(0, len(words), (*value.shape, CONTEXT))
    context[:, :, 1, :9] = -1
    context[zero == n_tokens] = -1
    thresholds = np.linspace(0.05, 0.4, n_layers, dtype=np.float32)[:, None]
    stats = SimpleNamespace(
        model=info,
        corpus=text,
        n_tokens=n_tokens,
        zero_count=torch.from_numpy(zero.astype(np.int64)),
        contribution_sum=torch.from_numpy(total),
        contribution_sq_sum=torch.from_numpy(total**2 / n_tokens),
        histogram=torch.from_numpy(histograms(zero, n_tokens, random)),
        contribution_max=torch.from_numpy(value[:, :, 0].astype(np.float32)),
        thresholds=torch.from_numpy(thresholds),
        above_count=torch.from_numpy(above.astype(np.int64))[:, :, None],
        threshold_names=("CETT-PPL-1%",),
        example_value=torch.from_numpy(value.astype(np.float32)),
        example_position=torch.from_numpy(position.astype(np.int64)),
        example_context=torch.from_numpy(context.astype(np.int32)),
        token_strings=dict(enumerate(words)),
        activation_frequency_at=lambda threshold: torch.from_numpy(above / n_tokens),
    )
    ratio = above.mean(axis=1) / n_tokens
    result = make_result(info, text, thresholds[:, 0], ratio)
    removed = make_removed(info, text, stats)
    activity = np.clip(
        0.3 + 0.4 * random.random((n_layers, n_passage)) * np.linspace(0.6, 1.3, n_layers)[:, None], 0, 1
    )
    strings = ["<|endoftext|>", *(words[i % len(words)] for i in range(n_passage - 1))]
    passage = SimpleNamespace(
        token_ids=list(range(n_passage)),
        token_strings=strings,
        activation_ratio=torch.from_numpy(activity.astype(np.float32)),
        definition="contribution at or above the layer's CETT-PPL-1% threshold",
        corpus=text,
    )
    return Run(stats, result, removed, passage)


def histograms(zero: np.ndarray, n_tokens: int, random: np.random.Generator) -> np.ndarray:
    """Counts [layer, neuron, 64]: exact zeros in bin 0, the rest as a hump of its own place for every neuron."""
    centre = random.uniform(25, 45, zero.shape)[..., None]
    hump = np.exp(-0.5 * ((np.arange(64) - centre) / 4.0) ** 2)
    counts = np.floor(hump / hump.sum(axis=2, keepdims=True) * (n_tokens - zero)[..., None]).astype(np.int64)
    counts[..., 0] += n_tokens - counts.sum(axis=2)
    return counts


def make_result(info: Any, text: dict[str, Any], thresholds: np.ndarray, ratio: np.ndarray) -> SimpleNamespace:
    mean, dense, cett = float(ratio.mean()), 14.237, 0.2034
    layers = tuple(
        SimpleNamespace(layer=i, threshold=float(t), cett=cett - 1e-4 * i, activation_ratio=float(r))
        for i, (t, r) in enumerate(zip(thresholds, ratio, strict=True))
    )
    rises = [
        (0.0, -0.01, 1.0),
        (0.1, 0.12, 0.83),
        (0.19, 0.81, mean + 0.02),
        (cett, 1.02, mean),
        (0.25, 2.1, mean - 0.05),
        (0.5, 38.0, mean * 0.5),
        (1.0, 91_000.0, 0.001),
    ]
    evaluations = tuple(
        {
            "cett": c,
            "ppl": dense * (1 + rise / 100),
            "ppl_increase_percent": rise,
            "kl": 0.25 * c**2,
            "activation_ratio": a,
        }
        for c, rise, a in rises
    )
    grid = np.linspace(0, 1, 200)
    curves = tuple(
        {
            "layer": i,
            "threshold": grid.tolist(),
            "cett": (grid ** (1.5 + i / len(ratio))).tolist(),
            "activation_ratio": ((1 - grid) ** (1.4 + 0.6 * i / len(ratio))).tolist(),
        }
        for i in range(len(ratio))
    )
    return SimpleNamespace(
        p_percent=1.0,
        reached=True,
        ppl_dense=dense,
        ppl_sparse=dense * 1.0102,
        ppl_increase_percent=1.02,
        cett=cett,
        activation_ratio=mean,
        sparsity_ratio=1 - mean,
        layers=layers,
        model=info,
        corpus=text,
        metric="cett_ppl",
        kl=0.0098,
        estimates=(
            Estimate("cett_ppl", cett, mean + 0.001, mean - 0.021, mean + 0.024, 32, 3, 65_536),
            Estimate("cett_kl", cett * 1.08, mean - 0.012, mean - 0.018, mean - 0.005, 32, 3, 65_536),
        ),
        calibration=None,
        cost={"forward_passes": 9.5, "seconds": 214.7},
        provenance={
            "versions": {"torch": "2.13.0", "transformer_lens": "4.3.0"},
            "seed": 0,
            "command": "neuron-sparsity report smollm2-135m --p 1 --out run",
        },
        evaluations=evaluations,
        curves=curves,
        converged=True,
        tolerance_percent=0.05,
    )


def make_removed(info: Any, text: dict[str, Any], stats: Any) -> SimpleNamespace:
    mean = (stats.contribution_sum / stats.n_tokens).numpy()
    n_neurons = mean.size
    n_removable = n_neurons // 35
    chosen = np.argsort(mean.ravel(), kind="stable")[:n_removable]
    steps = sorted({0, n_removable // 2, n_removable, 2 * n_removable, n_neurons // 8, n_neurons // 3, n_neurons})
    curve = [{"n_removed": n, "ppl_increase_percent": 0.97 * (n / n_removable) ** 1.6, "ppl": 14.237} for n in steps]
    return SimpleNamespace(
        p_percent=1.0,
        ranking="contribution",
        replacement="mean",
        n_neurons=n_neurons,
        n_removable=n_removable,
        reached=True,
        resolved=True,
        removable=[[int(i // mean.shape[1]), int(i % mean.shape[1])] for i in chosen],
        ppl_dense=14.237,
        ppl_ablated=14.375,
        heldout={
            "ppl_dense": 14.9,
            "ppl_ablated": 15.03,
            "ppl_increase_percent": 0.88,
            "holds": True,
            "corpus": corpus("sotu [held-out]", stats.n_tokens // 2, 512),
        },
        control={"kind": "random, same number per layer", "seed": 0, "ppl": 18.4, "ppl_increase_percent": 29.3},
        curve=curve,
        ranking_corpus=corpus("sotu", stats.n_tokens // 4, 512) | {"unseen_in_search": True},
        model=info,
        corpus=corpus("sotu [calibration]", stats.n_tokens // 2, 512),
        cost={"forward_passes": 14, "seconds": 388.0},
        provenance={
            "versions": {"torch": "2.13.0"},
            "seed": 0,
            "command": "neuron-sparsity report smollm2-135m --p 1 --out run",
        },
    )


def make_damage(**changes: Any) -> DamageResult:
    token = TokenDamage(" peace", (" of",), (" and",), 3, 17, "speech", 1.0, 2.345, 0.5)
    found = DamageResult(
        change="truncated at CETT-PPL-1%",
        ppl_dense=20.0,
        ppl_changed=20.2,
        ppl_increase_percent=1.0,
        rise=Interval(0.01, 0.005, 0.015),
        kl=Interval(0.012, 0.01, 0.014),
        percentiles={"50": 0.0},
        hurt_ratio=0.523,
        top_percent_share=0.61,
        hurt=(token,),
        helped=(token,),
        by_token=(),
        min_count=8,
        by_decile=(),
        layer_passes="alone",
        layers=(LayerDamage(0, 0.004, 0.001, 0.007, 0.4), LayerDamage(1, 0.002, None, None, 0.2)),
        layer_sum=Interval(0.002, None, None),
        interaction=Interval(0.008, None, None),
        model=ModelInfo("m", 2, 4, 8, "silu", True, "float32", "as loaded", "host", (0, 1), "f"),
        corpus={"name": "sotu", "n_tokens": 2048, "scored_tokens": 2044, "sha256": "0", "window": 512},
        cost={"forward_passes": 4.0, "seconds": 1.0},
        provenance={},
    )
    return replace(found, **changes)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine; Debian, Ubuntu: apt-get install chromium")
    with chromium() as started:
        yield started


@pytest.fixture
def tab(browser: Any, tmp_path: Path) -> Iterator[Tab]:
    """A page in the browser. A test that leaves a word on the console, or a request, fails."""
    tab = Tab(browser, tmp_path)
    yield tab
    tab.page.close()
    tab.require_silence()


@pytest.fixture
def run() -> Run:
    return make_run()


@pytest.fixture(scope="session")
def full_run() -> Run:
    """SmolLM2-135M's shape: 30 layers of 1,536 neurons."""
    return make_run(30, 1536, n_passage=256)


def make_atlas(stats: Any, n_texts: int | None = None) -> Any:
    """A table of one row a neuron with the columns of an Atlas; with `n_texts`, neurons share that many lists."""
    import pandas as pd

    n_layers, width = stats.zero_count.shape
    n, random = n_layers * width, np.random.default_rng(1)
    texts = n_texts or n

    def lists(word: str, length: int) -> list[list[str]]:
        made = [[f" {word}{i}.{k}" for k in range(length)] for i in range(texts)]
        return [made[i % texts] for i in range(n)]

    roles = np.array(["none", "prediction", "suppression", "partition"])
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(n_layers), width),
            "neuron": np.tile(np.arange(width), n_layers),
            "n_triggers": random.integers(0, 6, n),
            "triggers": lists("trigger ", 2),
            "is_token_detector": random.random(n) < 0.1,
            "ngram": random.integers(0, 4, n),
            "position_information_bits": random.random(n) / 5,
            "is_positional": random.random(n) < 0.2,
            "top_logit_tokens": lists("up", 10),
            "bottom_logit_tokens": lists("down", 10),
            "logit_skew": random.normal(0, 2, n),
            "logit_kurtosis": random.normal(3, 5, n),
            "logit_role": roles[random.integers(0, 4, n)],
        }
    )
