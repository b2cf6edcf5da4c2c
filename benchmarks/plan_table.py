"""The memory table of docs/scale.md, computed by `plan` from published shapes. Needs no network and no weights.

python -m benchmarks.plan_table            prints the table
python -m benchmarks.plan_table --write    puts it into docs/scale.md
"""

from __future__ import annotations

from typing import Any

from benchmarks.pages import DOCS, command
from neuron_sparsity.blueprint import draw
from neuron_sparsity.commands import size_text
from neuron_sparsity.plan import Plan, plan_for

PAGE, NAME = DOCS / "scale.md", "plan table"
SETTING = {"n_tokens": 1 << 20, "n_ctx": 512, "batch_size": 4, "dtype": "bfloat16", "device": "cuda"}

LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072, "num_key_value_heads": 8}
LLAMA_2 = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    # The model's config.json on the Hugging Face hub, meta-llama/Llama-3.2-1B.
    "Llama 3.2 1B": LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"tie_word_embeddings": True},
    # arXiv:2307.09288; config.json of meta-llama/Llama-2-7b-hf.
    "Llama 2 7B": LLAMA_2
    | {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
    # arXiv:2407.21783, Table 3.
    "Llama 3.1 8B": LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    # arXiv:2307.09288; config.json of meta-llama/Llama-2-13b-hf.
    "Llama 2 13B": LLAMA_2
    | {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40},
    # arXiv:2205.01068, Table 1; config.json of facebook/opt-30b.
    "OPT 30B": {"model_type": "opt", "vocab_size": 50_272, "max_position_embeddings": 2048}
    | {"hidden_size": 7168, "word_embed_proj_dim": 7168, "ffn_dim": 28_672}
    | {"num_hidden_layers": 48, "num_attention_heads": 56},
    # arXiv:2407.21783, Table 3.
    "Llama 3.1 70B": LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def plans() -> list[Plan]:
    from transformers import AutoConfig

    return [
        plan_for(draw(AutoConfig.for_model(**shape), name=name), **SETTING)  # type: ignore[arg-type]
        for name, shape in SHAPES.items()
    ]


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| Shape | Parameters | Neurons | Weights, bf16 | Statistics | Run folder | Peak, one device | 80 GB devices |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for made in plans():
        model = made.model
        cells = [
            model.name,
            f"{model.n_parameters / 1e9:.2f} B",
            f"{model.n_layers} x {model.d_mlp:,}",
            *map(size_text, (made.weights_bytes, made.statistics_bytes, made.run_folder_bytes, made.peak_bytes)),
            str(made.n_devices()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, PAGE, lambda: {NAME: table()})
