"""What the commands share: their options, and the checks that come before any work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_RANKING_TOKENS",
    "DEFAULT_TOKENS",
    "RANKINGS",
    "AsJson",
    "BatchSize",
    "Bos",
    "By",
    "Calibration",
    "Compare",
    "Controls",
    "Device",
    "Dtype",
    "Kernels",
    "Metric",
    "Model",
    "NCtx",
    "Neurons",
    "Out",
    "P",
    "Packed",
    "Points",
    "Ps",
    "Quiet",
    "RankingTokens",
    "RemoteCode",
    "Refine",
    "Replacement",
    "Rules",
    "Scope",
    "Seed",
    "Text",
    "Tokens",
    "WithAtlas",
    "check_device",
    "check_question",
    "check_refine",
    "check_rules",
    "check_sizes",
]

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_TOKENS = 12_288
DEFAULT_RANKING_TOKENS = 8192
RANKINGS = (
    "contribution",
    "rms",
    "fluctuation",
    "maximum",
    "activation_frequency",
    "weight_norm",
    "random",
    "wanda",
    "residual",
    "residual_rms",
    "taylor",
    "taylor_mean",
    "fisher",
    "fisher_mean",
    "fisher_shrunk",
    "fisher_mean_shrunk",
)
REPLACEMENTS = ("mean", "zero", "resample")

Model = Annotated[
    str,
    typer.Argument(
        help="Hugging Face name or NAME@REVISION, local folder, .gguf file, or a built-in (smollm2-135m, demo-relu, "
        "demo-silu)."
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text", help="Text file (repeat for several), built-in corpus (sotu), or hf:DATASET[:CONFIG[:SPLIT]]."
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens to measure on; cut down to whole windows.")]
NCtx = Annotated[int | None, typer.Option("--n-ctx", help="Tokens a window. Default: the model's, at most 512.")]
Bos = Annotated[
    bool | None, typer.Option("--bos/--no-bos", help="Begin windows with BOS. Default: as the tokenizer does.")
]
Packed = Annotated[
    bool | None,
    typer.Option("--packed/--apart", help="Join documents or keep them apart. Default: apart; hf: packed."),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Windows a forward pass. Default: from free memory.")
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Such as cuda or cpu; auto: GPUs, memory and disk as they suffice. Default: first GPU, else CPU.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Kernels = Annotated[
    str, typer.Option("--backend", help="Of the kernels: auto (triton on CUDA, else torch), torch or triton.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder. Default: runs/MODEL-CORPUS.")]
Compare = Annotated[
    list[Path] | None,
    typer.Option("--compare", help="Run folders, two or more: one page with them side by side, without a model."),
]
WithAtlas = Annotated[
    bool, typer.Option("--atlas/--no-atlas", help="Find what kind of neuron each one is, for the table of neurons.")
]
Neurons = Annotated[
    list[str] | None,
    typer.Option("--neurons", help="Of a run folder: LAYER:NEURON whose examples must be on the page."),
]
P = Annotated[float, typer.Option("--p", help="Rise of perplexity in percent.")]
Ps = Annotated[
    list[float] | None,
    typer.Option(
        "--p", help="Rise of perplexity in percent; repeat it for several at once. Default: 1; of pareto 1, 5, 10."
    ),
]
Metric = Annotated[
    str,
    typer.Option("--metric", help="ppl: rise of perplexity. kl: KL divergence from the dense model. Both are told."),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration", help="Other text to take the thresholds from, as for --text. Default: the same text."
    ),
]
By = Annotated[
    str | None,
    typer.Option(
        "--ranking", help=f"{', '.join(RANKINGS)}. Default: fisher_mean_shrunk; with zero replacement, fisher_shrunk."
    ),
]
Refine = Annotated[
    int,
    typer.Option(
        "--refine",
        help="Choose this many neurons a quarter at a time and score the rest anew after each, for rankings by "
        "gradients. Default: 0, score once.",
    ),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rules", help="cett, fat, quantile, topk, topp or zeros; fat:s or fat:c for one score. Default: all on both."
    ),
]
Points = Annotated[int, typer.Option("--points", help="Passes of each rule, evenly apart in activation ratio.")]
Replacement = Annotated[
    str, typer.Option("--replacement", help="mean, zero or resample (the value at a random other token).")
]
Controls = Annotated[int, typer.Option("--controls", help="Random sets to compare with, as many of every layer.")]
RankingTokens = Annotated[
    int,
    typer.Option(
        "--ranking-tokens",
        help="Further tokens, for rankings by gradients. 0, or too little text: ranked on what is searched.",
    ),
]
Scope = Annotated[str, typer.Option("--scope", help="Rank over the whole model, or within each layer: model or layer.")]
Seed = Annotated[int, typer.Option("--seed", help="Of random rankings and controls.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the weights run.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


def check_question(
    p: float, ranking: str | None = None, replacement: str = "mean", scope: str = "model", metric: str = "ppl"
) -> None:
    """Refuse what no later step would take, before the first step has taken an hour."""
    if not (math.isfinite(p) and p > 0):
        raise ValueError(f"--p must be a positive number of percent, got {p:g}")
    for option, value, allowed in (
        ("--ranking", ranking, RANKINGS),
        ("--replacement", replacement, REPLACEMENTS),
        ("--scope", scope, ("model", "layer")),
        ("--metric", metric, ("ppl", "kl")),
    ):
        if value not in allowed and value is not None:
            raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def check_refine(refine: int, ranking: str | None, replacement: str) -> None:
    """Refuse a refinement that cannot be made, before a model is loaded; the default ranking is one by gradients."""
    if refine < 0:
        raise ValueError(f"--refine must be at least 0, got {refine}")
    if refine == 0:
        return
    from neuron_sparsity import scores

    known = [name for name, score in scores.RANKINGS.items() if score.needs == "saliency"]
    if ranking is not None and ranking not in known:
        raise ValueError(f"--refine takes a ranking by gradients ({', '.join(known)}), got --ranking {ranking}")
    if replacement == "resample":
        raise ValueError("--refine takes --replacement mean or zero, got resample")


def check_rules(rules: list[str] | None, points: int) -> None:
    """Refuse rules that there are not, before a model is loaded."""
    from neuron_sparsity.rules import parse_rules

    parse_rules(rules or [])
    if points < 1:
        raise ValueError(f"--points must be at least 1, got {points}")


def check_sizes(options: dict[str, Any]) -> None:
    """Refuse sizes that no text could fill."""
    for option, value, least in (
        ("--tokens", options["tokens"], 1),
        ("--n-ctx", options["n_ctx"], 2),
        ("--batch-size", options["batch_size"], 1),
        ("--ranking-tokens", options.get("ranking_tokens"), 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")


def check_device(device: str | None, backend: str) -> None:
    """Refuse a device that does not work here, and a backend that cannot run on it."""
    import torch

    from neuron_sparsity.kernels import choose
    from neuron_sparsity.placement import require_accelerate

    if device == "auto":
        require_accelerate(device)
        device = None  # kernels run on the first GPU, else on the CPU
    try:
        where = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {device} does not work here ({reason}); see `neuron-sparsity doctor`") from error
    choose(where, backend)
