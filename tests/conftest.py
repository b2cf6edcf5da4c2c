"""What all tests share: tiny random models of several families, both TransformerLens classes, and no network.

`tiny_hf_models`, `tiny_bridge`, `tiny_hooked` and `sample_tokens` are factories: each call makes a fresh object,
because a bridge rebuilds the Hugging Face model it is given in place.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
# Before torch is imported: two pytest-xdist workers with two threads each would fight for two cores, at a tenth of the
# speed. Workers inherit what their parent has set here, so that a default alone would never be theirs.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("OMP_NUM_THREADS", "2")

import importlib.metadata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# Before the kernels are imported: without a GPU they are interpreted where a test asks for them, and nowhere else.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

N_CTX = 64
N_VOCAB = 300
FAMILIES = ("llama", "gpt2", "opt", "neox")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.register_profile("soak", parent=hypothesis.settings.get_profile("repeatable"), max_examples=800)
hypothesis.settings.load_profile("repeatable")  # `make soak` asks for the other one


def transformer_lens_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("transformer_lens").split(".")[:2])


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """A page of English with repetitions, so that a byte-pair vocabulary of 300 has something to merge."""
    lines = [
        "The neuron that fires for every token says little, and the one that never fires says nothing.",
        "A threshold cuts the tail of every token: what is cut is small, and what is left is nearly all.",
        "Six hundred people stood at the harbour, and the harbour was quiet when the ships came in.",
        "If the ratio falls with the data, then the model learns which of its neurons it can leave alone.",
    ]
    return "\n\n".join(" ".join(lines[i:] + lines[:i]) for i in range(len(lines)))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Any:
    """A byte-level BPE tokenizer with 300 entries: any text is tokenised without loss. `<s>` 0, `</s>` 1, `<unk>` 2.

    It is loaded from a folder, because TransformerLens loads a tokenizer once more by its `name_or_path`.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text], trainer)
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _tiny_config(family: str) -> tuple[Any, Any]:
    """Return the configuration and the class of a two-layer model: d_model 32, d_mlp 64, 4 heads."""
    import transformers as hf

    common = {"vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    common |= {"tie_word_embeddings": False}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": N_CTX}
    if family == "llama":
        return hf.LlamaConfig(intermediate_size=64, num_key_value_heads=2, **sizes, **common), hf.LlamaForCausalLM
    if family == "gpt2":
        gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": N_CTX, "n_inner": 64}
        return hf.GPT2Config(activation_function="gelu_new", **gpt2, **common), hf.GPT2LMHeadModel
    if family == "opt":
        opt = {"ffn_dim": 64, "word_embed_proj_dim": 32, "activation_function": "relu"}
        return hf.OPTConfig(**opt, **sizes, **common), hf.OPTForCausalLM
    if family == "neox":
        return hf.GPTNeoXConfig(intermediate_size=64, hidden_act="gelu", **sizes, **common), hf.GPTNeoXForCausalLM
    if family == "mixtral":
        mixtral = {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
        return hf.MixtralConfig(**mixtral, **sizes, **common), hf.MixtralForCausalLM
    raise ValueError(f"no tiny {family!r}: choose llama, gpt2, opt, neox or mixtral")


@pytest.fixture(scope="session")
def tiny_hf_models() -> Callable[..., Any]:
    """`tiny_hf_models(family, seed=0)`: a random float32 model in eval mode, in Hugging Face format.

    Families: llama (SwiGLU), gpt2 (gelu_new), opt (relu), neox (gelu), mixtral (experts). The initial weights of these
    classes are so small that every token gets the same logits; here they are eight times as large and biases are
    not zero, so that a forgotten bias or a wrong neuron shows in the loss.
    """

    def make(family: str, *, seed: int = 0) -> Any:
        import torch

        config, model_class = _tiny_config(family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config).float().eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim >= 2:
                        parameter.mul_(8.0)
                    elif name.endswith("bias"):
                        parameter.normal_(0.0, 0.1)
        return model.requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def tiny_bridge(tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Any]:
    """`tiny_bridge(family, compat=False, seed=0)`: a TransformerBridge of a tiny model, booted offline."""
    if transformer_lens_version() < (3, 0):
        pytest.skip("TransformerBridge came with TransformerLens 3")

    def make(family: str, *, compat: bool = False, seed: int = 0) -> Any:
        from transformer_lens.model_bridge import TransformerBridge

        model = tiny_hf_models(family, seed=seed)
        bridge = TransformerBridge.boot_transformers(f"tiny-{family}-test", hf_model=model, tokenizer=tiny_tokenizer)
        if compat:
            bridge.enable_compatibility_mode()
        return bridge

    return make


@pytest.fixture(scope="session")
def tiny_hooked(tiny_tokenizer: Any) -> Callable[..., Any]:
    """`tiny_hooked(act_fn="relu", gated=False, seed=0)`: a random HookedTransformer of the same sizes."""
    if transformer_lens_version() >= (4, 0):
        pytest.skip("HookedTransformer left with TransformerLens 4")

    def make(*, act_fn: str = "relu", gated: bool = False, seed: int = 0) -> Any:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from transformer_lens import HookedTransformer, HookedTransformerConfig

            sizes = {"n_layers": 2, "d_model": 32, "d_mlp": 64, "n_heads": 4, "d_head": 8, "n_ctx": N_CTX}
            config = HookedTransformerConfig(
                act_fn=act_fn, gated_mlp=gated, d_vocab=N_VOCAB, device="cpu", model_name="tiny-hooked-test", **sizes
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = HookedTransformer(config, tokenizer=tiny_tokenizer).eval()
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if ".W_" in name:
                            parameter.normal_(0.0, 0.16)
                        elif ".b_" in name:
                            parameter.normal_(0.0, 0.1)
        return model.requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def sample_tokens() -> Callable[..., Any]:
    """`sample_tokens(model, n_windows, window=32, seed=0)`: int32 [window, pos] of text the model itself wrote.

    A random model predicts no text better than its damaged self does, except its own: on these tokens the dense model
    is the best predictor there is, so truncating or removing neurons raises perplexity. Every window starts with BOS.
    """

    def sample(model: Any, n_windows: int, *, window: int = 32, seed: int = 0) -> Any:
        import torch

        generator = torch.Generator().manual_seed(seed)
        tokens = torch.zeros(n_windows, 1, dtype=torch.long)
        with torch.inference_mode():
            for _ in range(window - 1):
                out = model(tokens)
                logits = getattr(out, "logits", out)[:, -1].float()
                following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                tokens = torch.cat([tokens, following], dim=1)
        return tokens.int()

    return sample
