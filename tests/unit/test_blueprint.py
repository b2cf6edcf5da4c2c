"""Sizes of a model from its configuration: counted by hand, and equal to those of the model that is really built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from neuron_sparsity.blueprint import _measured_stack, _on_meta, draw
from neuron_sparsity.errors import ModelError
from neuron_sparsity.plain import down_projections

V, D, M, L = 100, 16, 48, 3
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 4}


def llama(**more: Any) -> Any:
    own = {"intermediate_size": M, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return hf.LlamaConfig(**SIZES | own | more)


def opt(**more: Any) -> Any:
    return hf.OPTConfig(**SIZES | {"ffn_dim": M, "max_position_embeddings": 32, "word_embed_proj_dim": D} | more)


def gpt2() -> Any:
    return hf.GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=4, n_positions=32)


# Attention, MLP and norms of a block; then what is outside the blocks.
BY_HAND = [
    # q and o: D x D; k and v: half as wide. Gate, up, down. Two norms. Embedding, last norm, unembedding.
    (llama(), L * (3 * D * D + 3 * D * M + 2 * D) + V * D + D + V * D, L * 3 * D * M, M, True),
    (llama(tie_word_embeddings=True), L * (3 * D * D + 3 * D * M + 2 * D) + V * D + D, L * 3 * D * M, M, True),
    # Everything has a bias; norms have two vectors. Positions: two more than the context.
    (
        opt(),
        L * (4 * (D * D + D) + D * M + M + M * D + D + 4 * D) + V * D + (32 + 2) * D + 2 * D,
        L * (2 * D * M + M + D),
        M,
        False,
    ),
    # Query, key and value in one matrix; the MLP is four times as wide as the residual stream.
    (
        gpt2(),
        L * (D * 3 * D + 3 * D + D * D + D + 2 * D * 4 * D + 4 * D + D + 4 * D) + V * D + 32 * D + 2 * D,
        L * (2 * D * 4 * D + 4 * D + D),
        4 * D,
        False,
    ),
]


@pytest.mark.parametrize(("config", "total", "mlp", "d_mlp", "gated"), BY_HAND, ids=["llama", "tied", "opt", "gpt2"])
def test_counts_by_hand(config: Any, total: int, mlp: int, d_mlp: int, gated: bool) -> None:
    sizes = draw(config, name="tiny")
    assert (sizes.n_parameters, sizes.n_mlp_parameters) == (total, mlp)
    assert (sizes.layers, sizes.d_model, sizes.d_mlp, sizes.gated) == ((0, 1, 2), D, d_mlp, gated)
    assert (sizes.n_vocab, sizes.n_embedding_parameters, sizes.n_blocks) == (V, V * D, L)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox"])
def test_sizes_are_those_of_the_model_that_is_built(family: str, tiny_hf_models: Callable[..., Any]) -> None:
    real = tiny_hf_models(family)
    sizes = draw(real.config, name=family)
    assert sizes.architecture == type(real).__name__
    assert sizes.n_parameters == sum(parameter.numel() for parameter in real.parameters())
    assert (sizes.n_layers, sizes.d_model, sizes.d_mlp, sizes.max_ctx) == (2, 32, 64, 64)


FAMILIES = {
    "fused gate and up": hf.Phi3Config(**SIZES, intermediate_size=M, pad_token_id=0),
    "one matrix for query, key and value": hf.FalconConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=4
    ),
    "attention wider than the residual stream": hf.GemmaConfig(
        **SIZES, intermediate_size=M, num_key_value_heads=4, head_dim=10
    ),
    "embedding narrower than the residual stream": opt(word_embed_proj_dim=8),
    "MLP in the block itself": opt(),
}


@pytest.mark.parametrize("what", FAMILIES)
def test_down_projections_are_those_that_are_measured(what: str) -> None:
    model = _on_meta(FAMILIES[what], what, False)
    _, mlps = _measured_stack(model)
    first = mlps[0]
    assert first.d_model == D
    expected = down_projections(model, first.d_mlp, first.d_model, L)
    assert [mlp.matrices[0] for mlp in mlps.values()] == expected


def test_nothing_is_allocated() -> None:
    model = _on_meta(llama(), "tiny", False)
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}


def test_low_rank_paths_are_no_mlp() -> None:
    """Gemma 3n has two narrow paths beside each MLP."""
    small = {"vocab_size": V, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    gemma = hf.Gemma3nTextConfig(
        **small,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        laurel_rank=8,
        vocab_size_per_layer_input=V,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
    )
    sizes = draw(gemma, name="gemma")
    assert (sizes.n_layers, sizes.d_mlp, sizes.d_model, sizes.gated) == (4, 192, 64, True)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            hf.MixtralConfig(**SIZES, intermediate_size=M, num_key_value_heads=2),
            "layer 0 is a mixture of experts (Mixtral",
        ),
        (
            hf.MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2),
            "the model has no MLP neurons (attention-only?)",
        ),
        (hf.T5Config(), "cannot be built from its configuration (ValueError: Unrecognized configuration class"),
        (opt(num_attention_heads=5), "cannot be built from its configuration (ValueError: "),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(config: Any, complaint: str) -> None:
    with pytest.raises(ModelError) as error:
        draw(config, name="wrong")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
