"""The atlas of tiny models: against counts made the long way, effects multiplied out from the weights, and its file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neuron_sparsity.adapter import attach
from neuron_sparsity.errors import MeasurementError, ModelError, RunFolderError
from neuron_sparsity.recorder import record
from neuron_sparsity.taxonomy import (
    ATLAS_FILE,
    Atlas,
    ClassRule,
    TriggerRule,
    atlas,
    classify,
    logit_effects,
)
from neuron_sparsity.taxonomy import active as active_module
from neuron_sparsity.taxonomy import columns as columns_module
from neuron_sparsity.taxonomy import logits as logits_module
from neuron_sparsity.taxonomy import table as table_module
from neuron_sparsity.taxonomy.active import ActiveBits
from neuron_sparsity.taxonomy.files import COLUMNS, LOGIT_COLUMNS, PASS_COLUMNS, STATISTICS_COLUMNS
from tests.brute import class_of, kind_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LOOSE = TriggerRule(covered=0.6, fires=0.5, most=5, min_activations=2)
N_WINDOWS, WINDOW = 12, 18


@pytest.fixture(scope="module")
def make_case(tiny_model: Callable[..., Any], own_windows: Callable[..., Any]) -> Callable[..., SimpleNamespace]:
    """`make_case("opt")`: a model, windows, statistics under thresholds of its own, and what was active, kept whole."""
    made: dict[str, SimpleNamespace] = {}

    def make(name: str) -> SimpleNamespace:
        if name not in made:
            model = tiny_model(name)
            adapter, windows = attach(model), own_windows(model, N_WINDOWS, window=WINDOW)
            posts: dict[int, Tensor] = {}
            with torch.no_grad():
                adapter.final_residual(windows.tokens.long(), lambda layer, z: posts.update({layer: z.clone()}))
            z = torch.stack([posts[layer] for layer in range(adapter.info.n_layers)])
            c = z.abs() * torch.stack(list(adapter.w_norms))[:, None, None]
            cuts = [float(np.quantile(layer.numpy(), 0.9)) for layer in c]
            above = c >= torch.tensor(cuts)[:, None, None, None]
            stats = record(adapter, windows, thresholds={"loud": cuts})
            made[name] = SimpleNamespace(
                model=model, adapter=adapter, windows=windows, stats=stats, z=z, c=c, nonzero=z != 0, loud=above
            )
        return made[name]

    return make


@pytest.fixture(scope="module", params=["opt", "llama", "hooked-relu"])
def case(request: pytest.FixtureRequest, make_case: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    return make_case(request.param)


def words(model: Any, ids: tuple[tuple[int, ...], ...]) -> list[str]:
    return [model.tokenizer.decode(list(gram)) for gram in ids]


@pytest.mark.parametrize(("active", "rule"), [("nonzero", TriggerRule()), ("loud", LOOSE)])
def test_every_neuron_is_what_a_count_says(case: SimpleNamespace, active: str, rule: TriggerRule) -> None:
    made = atlas(case.stats, case.model, case.windows, active=active, triggers=rule, logits=False)
    assert list(made.table.columns) == [*STATISTICS_COLUMNS, *PASS_COLUMNS]
    seen, tokens = getattr(case, active).numpy(), case.windows.tokens.numpy()
    n_tokens = N_WINDOWS * WINDOW
    assert len(made.table) == 2 * 64
    small = 0
    for row in made.table.to_dict("records"):
        own = seen[row["layer"], :, :, row["neuron"]]
        count = int(own.sum())
        assert (row["activation_count"], row["class"]) == (count, class_of(count, n_tokens))
        assert row["activation_frequency"] == count / n_tokens
        assert row["frequency_bound_95"] == 3 / n_tokens if count == 0 else math.isnan(row["frequency_bound_95"])
        kind = kind_of(own, tokens, rule)
        assert row["n_covering_tokens"] == kind.n_covering_tokens
        assert (row["n_triggers"], row["ngram"]) == (kind.n_triggers, kind.ngram)
        assert row["triggers"] == words(case.model, kind.triggers)
        assert row["is_token_detector"] == (kind.ngram == 1)
        assert row["position_information_bits"] == pytest.approx(kind.information_bits, abs=1e-12)
        excess = row["position_information_bits"] - row["position_information_by_chance_bits"]
        assert row["is_positional"] == (excess >= 0.05)
        small += kind.n_triggers > 0
    found = made.counts()
    assert found["triggers"]["covered_by_few"] == small
    assert sum(found["classes"][name] for name in ("dead", "rare", "alive", "always_on")) == 128
    if rule is LOOSE and active == "loud":
        assert small > 0


def test_contributions_are_those_of_the_model(case: SimpleNamespace) -> None:
    made = atlas(case.stats)
    c = case.c.double().flatten(1, 2)
    for column, expected in (
        ("mean_contribution", c.mean(dim=1)),
        ("rms_contribution", c.pow(2).mean(dim=1).sqrt()),
        ("max_contribution", c.amax(dim=1)),
        ("contribution_share_of_layer", c.sum(dim=1) / c.sum(dim=(1, 2))[:, None]),
    ):
        assert made.table[column].to_numpy() == pytest.approx(expected.numpy().ravel(), rel=1e-5), column
    assert made.table.groupby("layer")["contribution_share_of_layer"].sum().tolist() == pytest.approx([1, 1])
    assert list(made.table.columns) == list(STATISTICS_COLUMNS)
    assert made.watched is None
    assert made.definitions["active"] == "contribution >= the layer's loud threshold"


def test_curve_counts_the_windows_so_far_and_ends_with_the_classes(case: SimpleNamespace) -> None:
    made = atlas(case.stats, case.model, case.windows, logits=False, seed=3)
    order = np.random.default_rng(3).permutation(N_WINDOWS)
    assert [point.n_tokens for point in made.curve] == [n * WINDOW for n in (1, 3, 6, 12)]
    for point in made.curve:
        n_windows = point.n_tokens // WINDOW
        counts = case.loud.numpy()[:, order[:n_windows]].sum(axis=(1, 2)).ravel()
        names = [class_of(int(count), point.n_tokens) for count in counts]
        assert [getattr(point, name) for name in ("dead", "rare", "alive", "always_on")] == [
            names.count(name) for name in ("dead", "rare", "alive", "always_on")
        ]
        assert point.never == (counts == 0).sum()
    assert made.curve[-1] == classify(case.stats).total
    other = atlas(case.stats, case.model, case.windows, logits=False, seed=4)
    assert other.curve[:-1] != made.curve[:-1]
    assert other.curve[-1] == made.curve[-1]


def test_memory_is_bounded_and_changes_nothing(
    make_case: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits in a file, few neurons at a time, few rows of effects at a time: the same atlas."""
    case = make_case("llama")
    whole = atlas(case.stats, case.model, case.windows, triggers=LOOSE)
    widths = []
    get = ActiveBits.get

    def watched(self: ActiveBits, layer: int, start: int, stop: int) -> Any:
        assert self._file is not None
        widths.append(stop - start)
        return get(self, layer, start, stop)

    monkeypatch.setattr(active_module, "IN_MEMORY", 0)
    monkeypatch.setattr(columns_module, "_WORK_BYTES", 3 * (4 * 216 + 2 * 216 + 24 * 192))
    monkeypatch.setattr(logits_module, "_EFFECT_FLOATS", 2100)
    monkeypatch.setattr(ActiveBits, "get", watched)
    small = atlas(case.stats, case.model, case.windows, triggers=LOOSE, batch_size=5)
    assert 3 <= max(widths) < 10
    assert sum(widths) == 128
    exact = [name for name in COLUMNS if not name.startswith(("logit_", "top_", "bottom_"))]
    pd.testing.assert_frame_equal(small.table[exact], whole.table[exact])
    floats = ["logit_mean", "logit_std", "logit_skew", "logit_kurtosis"]
    pd.testing.assert_frame_equal(small.table[floats], whole.table[floats], rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Watches how many numbers the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            self.numel = max(self.numel, one.numel()) if isinstance(one, Tensor) else self.numel
        return made


def test_no_table_of_neurons_by_vocabulary_is_made(
    make_case: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("llama")
    with Largest() as largest:
        logit_effects(case.adapter)
    assert largest.numel == 64 * 300  # a tiny layer is one block
    monkeypatch.setattr(logits_module, "_EFFECT_FLOATS", 4 * 300)
    with Largest() as largest:
        logit_effects(case.adapter)
    assert largest.numel <= 32 * 300  # W_U itself
    assert largest.numel < 64 * 300


# --- effects on logits


def folded_weights(hf_model: Any, family: str) -> tuple[list[Tensor], Tensor]:
    """Output rows as they enter the unembedding, layer by layer, and W_U: from the Hugging Face weights."""
    if family == "llama":
        rows = [layer.mlp.down_proj.weight.T for layer in hf_model.model.layers]
        gain, centred = hf_model.model.norm.weight, False
    elif family == "gpt2":
        rows = [layer.mlp.c_proj.weight for layer in hf_model.transformer.h]
        gain, centred = hf_model.transformer.ln_f.weight, True
    elif family == "opt":
        rows = [layer.fc2.weight.T for layer in hf_model.model.decoder.layers]
        gain, centred = hf_model.model.decoder.final_layer_norm.weight, True
    else:
        rows = [layer.mlp.dense_4h_to_h.weight.T for layer in hf_model.gpt_neox.layers]
        gain, centred = hf_model.gpt_neox.final_layer_norm.weight, True
    head = hf_model.get_output_embeddings()
    rows = [row.double() for row in rows]
    rows = [row - row.mean(dim=1, keepdim=True) if centred else row for row in rows]
    return [row * gain.double() for row in rows], head.weight.T.double()


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox"])
def test_effects_are_the_product_of_the_weights(
    tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any, family: str, compat: bool
) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    models = [tiny_hf_models(family) for _ in range(2)]
    for model in models:  # the initial gain is 1 everywhere: nothing would show that it was folded
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                values = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.data.copy_(values + 0.5 if name.endswith("weight") else values - 0.5)
    booted = bridge.boot_transformers(f"tiny-{family}", hf_model=models[0], tokenizer=tiny_tokenizer)
    if compat:
        booted.enable_compatibility_mode()
    found = logit_effects(booted, k=300)
    assert found.norm == ("RMSNorm" if family == "llama" else "LayerNorm")
    rows, w_u = folded_weights(models[1], family)
    for layer, own in enumerate(rows):
        expected = (own @ w_u).numpy()
        if compat:  # the unembedding is centred over the vocabulary: what all tokens share is gone
            expected = expected - expected.mean(axis=1, keepdims=True)
        tolerance = 2e-4 * np.abs(expected).max()
        effect = np.empty_like(expected)
        np.put_along_axis(effect, found.top_ids[layer].astype(np.int64), found.top_values[layer].astype(float), axis=1)
        assert np.abs(effect - expected).max() <= tolerance
        np.put_along_axis(effect, found.bottom_ids[layer].astype(np.int64), found.bottom_values[layer].astype(float), 1)
        assert np.abs(effect - expected).max() <= tolerance
        assert (np.diff(found.top_values[layer], axis=1) <= 0).all()
        assert (np.diff(found.bottom_values[layer], axis=1) >= 0).all()
        mean, std = expected.mean(axis=1), expected.std(axis=1)
        z = (expected - mean[:, None]) / std[:, None]
        assert found.mean[layer] == pytest.approx(mean, abs=tolerance)
        assert found.std[layer] == pytest.approx(std, rel=1e-3)
        assert found.skew[layer] == pytest.approx((z**3).mean(axis=1), abs=5e-3)
        assert found.kurtosis[layer] == pytest.approx((z**4).mean(axis=1) - 3, abs=5e-3)


@pytest.mark.parametrize("name", ["llama", "opt", "hooked-relu"])
def test_effects_predict_what_the_model_does(make_case: Callable[..., SimpleNamespace], name: str) -> None:
    """A little more of a last-layer neuron moves the logits along its effect, by the norm's scale of that token."""
    case = make_case(name)
    found, layer, neuron = logit_effects(case.adapter, k=300), 1, 7
    effect = np.empty(300)
    effect[found.top_ids[layer, neuron]] = found.top_values[layer, neuron]
    tokens = case.windows.tokens[:1].long()

    def logits(more: float) -> Tensor:
        def push(at: int, z: Tensor) -> Tensor | None:
            if at != layer:
                return None
            z = z.clone()
            z[0, -1, neuron] += more
            return z

        with torch.no_grad():
            return case.adapter.logits(case.adapter.final_residual(tokens, push)[0, -1:])[0].double()

    moved = (logits(0.05) - logits(-0.05)).numpy()
    moved, centred = moved - moved.mean(), effect - effect.mean()
    # The norm's scale shrinks too: what is left of the change, beside that along the logits themselves, is the effect.
    own = logits(0.0).numpy()
    with torch.no_grad():
        bias = case.adapter.logits(case.model.ln_final(torch.zeros(1, 1, 32))[0])[0].double().numpy()
    basis = np.stack([centred, own - bias, np.ones(300)], axis=1)
    solution, *_ = np.linalg.lstsq(basis, moved, rcond=None)
    assert solution[0] > 0
    assert np.linalg.norm(moved - basis @ solution) <= 0.05 * np.linalg.norm(moved)
    assert np.linalg.norm(solution[0] * centred) > 0.2 * np.linalg.norm(moved)


def test_a_final_norm_of_another_kind_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    adapter = attach(model)
    model.ln_final.register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(ModelError, match=r"final norm of .* is neither LayerNorm nor RMSNorm .*logits=False"):
        logit_effects(adapter)


def test_an_unembedding_that_is_not_linear_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    adapter = attach(model)
    model.unembed.register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(ModelError, match=r"unembedding of .* is not linear"):
        logit_effects(adapter)


def test_no_hook_is_left(make_case: Callable[..., SimpleNamespace], hooks_on: Callable[[Any], int]) -> None:
    case = make_case("llama")
    before = hooks_on(case.model)
    atlas(case.stats, case.model, case.windows)
    assert hooks_on(case.model) == before


# --- arguments


def test_atlas_refuses(make_case: Callable[..., SimpleNamespace], tiny_model: Callable[..., Any]) -> None:
    case = make_case("llama")
    with pytest.raises(ValueError, match="windows need a model to run on them"):
        atlas(case.stats, windows=case.windows)
    with pytest.raises(ValueError, match=r"statistics are of .* with other weights"):
        atlas(case.stats, tiny_model("llama", seed=1), case.windows)
    with pytest.raises(ValueError, match="no thresholds named 'other'"):
        atlas(case.stats, active="other")
    with pytest.raises(ValueError, match="positional_bits must be > 0, got 0"):
        atlas(case.stats, positional_bits=0)
    with pytest.raises(ValueError, match="k must be between 1 and 300, the size of the vocabulary, got 301"):
        logit_effects(case.adapter, k=301)


def test_numbers_that_are_not_finite_are_refused(tiny_model: Callable[..., Any], own_windows: Any) -> None:
    model = tiny_model("opt")
    adapter, windows = attach(model, plain=False), own_windows(model, 4)
    stats = record(adapter, windows)

    def spoil(z: Tensor, hook: Any) -> Tensor:
        z[1, 5, 3] = float("nan")
        return z

    model.add_hook("blocks.1.mlp.hook_post", spoil)
    with pytest.raises(MeasurementError, match="layer 1: post-activations are NaN or infinite in windows 0 to 3"):
        atlas(stats, adapter, windows)


# --- the file


@pytest.fixture
def saved(make_case: Callable[..., SimpleNamespace], tmp_path: Path) -> SimpleNamespace:
    case = make_case("llama")
    made = atlas(case.stats, case.model, case.windows, folder=tmp_path, triggers=LOOSE)
    return SimpleNamespace(case=case, made=made, folder=tmp_path, path=tmp_path / ATLAS_FILE)


def test_it_comes_back_as_it_was(saved: SimpleNamespace) -> None:
    read = Atlas.load(saved.folder)
    pd.testing.assert_frame_equal(read.table, saved.made.table)
    for field in dataclasses.fields(Atlas):
        if field.name != "table":
            assert getattr(read, field.name) == getattr(saved.made, field.name), field.name
    assert read.to_json() == saved.made.to_json()
    assert list(read.table.columns) == list(COLUMNS)
    assert all(isinstance(tokens, list) for tokens in read.table["top_logit_tokens"])
    assert {len(tokens) for tokens in read.table["top_logit_tokens"]} == {10}
    assert [path.name for path in saved.folder.iterdir()] == [ATLAS_FILE]


def test_parts_of_an_atlas_come_back_too(make_case: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    case = make_case("opt")
    for name, made in {
        "recorded": atlas(case.stats, folder=tmp_path / "recorded"),
        "no logits": atlas(case.stats, case.model, case.windows, logits=False, folder=tmp_path / "no logits"),
        "only logits": atlas(case.stats, case.model, folder=tmp_path / "only logits"),
    }.items():
        pd.testing.assert_frame_equal(Atlas.load(tmp_path / name).table, made.table)
    assert list(Atlas.load(tmp_path / "only logits").table.columns) == [*STATISTICS_COLUMNS, *LOGIT_COLUMNS]


def test_the_same_question_is_not_asked_again(saved: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = saved.case

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass was made")

    with monkeypatch.context() as patched:
        patched.setattr(table_module, "watch", forbidden)
        patched.setattr(columns_module, "logit_effects", forbidden)
        again = atlas(case.stats, case.model, case.windows, folder=saved.folder, triggers=LOOSE)
    pd.testing.assert_frame_equal(again.table, saved.made.table)
    other = atlas(case.stats, case.model, case.windows, folder=saved.folder, classes=ClassRule(dead=0.005))
    assert other.question != saved.made.question
    assert Atlas.load(saved.folder).question == other.question


def rewritten(saved: SimpleNamespace, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(saved.path)), saved.path)


def replaced(name: str, values: Callable[[list[Any]], list[Any]], kind: Any = None) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at, field = table.column_names.index(name), table.schema.field(name)
        column = pa.array(values(table.column(name).to_pylist()), type=kind or field.type)
        return table.set_column(at, pa.field(name, column.type), column)

    return change


def headed(change: Callable[[bytes], bytes]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata(
        {b"neuron_sparsity": change(table.schema.metadata[b"neuron_sparsity"])}
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.slice(1), "127 rows are not those of 2 layers of 64 neurons"),
        (lambda table: pa.concat_tables([table, table]), "rows are not those of"),
        (lambda table: table.drop_columns(["class"]), "there is no column class"),
        (lambda table: table.append_column("more", pa.array([1] * 128)), "are not those of an atlas"),
        (lambda table: table.select(table.column_names[::-1]), "are not those of an atlas"),
        (lambda table: table.replace_schema_metadata(None), "Expecting value"),
        (
            replaced("neuron", lambda values: values[::-1]),
            "64 neurons, in their order",
        ),
        (replaced("class", lambda values: ["undead", *values[1:]]), "class is 'undead', not one of dead, rare"),
        (replaced("class", lambda values: [None, *values[1:]]), "class has 1 values that are missing"),
        (replaced("logit_role", lambda values: ["<script>", *values[1:]]), "logit_role is '<script>'"),
        (replaced("activation_count", lambda values: [-1, *values[1:]]), "activation_count is outside 0 to 216"),
        (replaced("activation_count", lambda values: [217, *values[1:]]), "activation_count is outside 0 to 216"),
        (replaced("ngram", lambda values: [4, *values[1:]]), "ngram is outside 0 to 3"),
        (replaced("activation_frequency", lambda values: [1.5, *values[1:]]), "activation_frequency is outside 0 to 1"),
        (replaced("mean_contribution", lambda values: [math.nan, *values[1:]]), "mean_contribution is NaN or infinite"),
        (replaced("logit_skew", lambda values: [math.inf, *values[1:]]), "logit_skew is NaN or infinite"),
        (replaced("triggers", lambda values: [[None], *values[1:]]), "triggers has a token that is missing"),
        (replaced("layer", lambda values: values, pa.int64()), "are not those of an atlas"),
        (headed(lambda text: text.replace(b'"n_tokens": 216', b'"n_tokens": "many"')), "invalid literal for int"),
        (headed(lambda text: text.replace(b'"curve": [{', b'"curve": [{"dead": 3}, {')), "KeyError"),
        (headed(lambda text: text.replace(b'"watched": {', b'"watched": {"title": 3}, "other": {')), "KeyError"),
        (headed(lambda text: text.replace(b'"question": {', b'"question": [], "other": {')), "question must be"),
    ],
)
def test_what_is_no_atlas_is_told_in_one_line(
    saved: SimpleNamespace, change: Callable[[pa.Table], pa.Table], said: str
) -> None:
    rewritten(saved, change)
    with pytest.raises(RunFolderError) as caught:
        Atlas.load(saved.folder)
    message = str(caught.value)
    assert message.startswith(f"{saved.path} is damaged (")
    assert said in message
    assert "\n" not in message
    assert message.endswith("; delete it and run the step that writes it again")


def test_a_newer_or_missing_atlas_is_told(saved: SimpleNamespace) -> None:
    rewritten(saved, headed(lambda text: text.replace(b'"schema": 1', b'"schema": 2', 1)))
    with pytest.raises(RunFolderError, match="has schema 2, this version reads up to 1"):
        Atlas.load(saved.folder)
    saved.path.unlink()
    with pytest.raises(RunFolderError, match="does not exist; the step that writes it has not run"):
        Atlas.load(saved.folder)


def test_bytes_that_are_damaged_anywhere_give_one_line_or_the_same_kind_of_atlas(saved: SimpleNamespace) -> None:
    whole, generator = saved.path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data, at = bytearray(whole), int(generator.integers(len(whole)))
        if generator.random() < 0.3:
            del data[at:]
        elif generator.random() < 0.5:
            data[at : at + 8] = generator.bytes(8)
        else:
            data[at] ^= 1 << int(generator.integers(8))
        saved.path.write_bytes(bytes(data))
        message = ""
        try:
            assert len(Atlas.load(saved.folder).table) == 128
        except RunFolderError as error:
            message = str(error)
            refused += 1
        assert "\n" not in message
        assert not message or str(saved.path) in message
    assert refused > 30
