"""Adapters: merged weights against plain peft on the checkpoint's own module names, and adapters that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint_folders import (
    ADAPTERS,
    KINDS,
    PARITY,
    copy_adapter,
    edit_weights,
    module_tree,
    original_key,
    vectors,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from diffretriever.model import adapter_loading
from diffretriever.model.checked_files import read_json, read_tensors
from diffretriever.publishing import build as building

Load = Callable[..., Any]
Build = Callable[..., Path]
PREFIX = "base_model.model."
HEAD = PREFIX + "model.transformer.ff_out"
QUERY = PREFIX + "model.transformer.blocks.0.q_proj"


def load(folder: Path, **options: Any) -> Any:
    options.setdefault("torch_dtype", torch.float32)
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


def backbone_weights(kind: str) -> dict[str, torch.Tensor]:
    return load_file(PARITY / "backbones" / f"tiny-{kind}" / "model.safetensors")


def make_adapter(kind: str, folder: Path, **lora: Any) -> Path:
    """Write a random adapter of the given recipe, as peft saves it from a model with the checkpoint's names."""
    tree = module_tree(backbone_weights(kind))
    torch.manual_seed(7)
    config = peft.LoraConfig(init_lora_weights=False, inference_mode=True, **lora)
    peft.inject_adapter_in_model(config, tree)
    state = {}
    for name, tensor in peft.get_peft_model_state_dict(tree).items():
        scale = 1 + 0.1 * torch.rand(tensor.shape) if "magnitude" in name else torch.full(tensor.shape, 0.3)
        state[PREFIX + name] = (tensor * scale).to(torch.bfloat16)  # as the released ones are stored
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def merged_by_peft(kind: str, adapter: Path) -> dict[str, torch.Tensor]:
    """What peft itself makes of the adapter, in float32, under the checkpoint's own names."""
    tree = module_tree(backbone_weights(kind))
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(str(adapter)), tree)
    state = load_file(adapter / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(tree, {name.removeprefix(PREFIX): t.float() for name, t in state.items()})
    merged: dict[str, torch.Tensor] = {}
    layers: dict[str, Any] = {
        name: module for name, module in tree.named_modules() if hasattr(module, "get_base_layer")
    }
    for name, layer in layers.items():
        layer.merge()
        merged |= {f"{name}.{part}": tensor for part, tensor in layer.get_base_layer().named_parameters()}
    assert merged
    return merged


LLADA_RECIPES: dict[str, dict[str, Any]] = {
    "r-alpha": {"r": 4, "lora_alpha": 24, "target_modules": ["q_proj", "ff_out"]},
    "rank-pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "ff_out", "ff_proj"],
        "rank_pattern": {"q_proj": 8, "model.transformer.ff_out": 2, "^model.transformer.blocks.0.ff_out": 3},
    },
    "alpha-pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj", "ff_out", "attn_out"],
        "alpha_pattern": {r"blocks\.[01]\.up_proj": 32, "transformer.ff_out": 3, "attn_out": 1},
    },
    "regex-targets": {"r": 4, "lora_alpha": 8, "target_modules": r".*blocks\.[02]\.(q_proj|ff_out)"},
    "layers": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1, 3], "layers_pattern": "blocks"},
    "excluded": {"r": 4, "target_modules": ["ff_out"], "exclude_modules": ["model.transformer.ff_out"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "ff_out"], "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "ff_out", "ff_proj"], "use_dora": True},
    "dora-rslora-patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "ff_out"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"ff_out": 20},
    },
}
DREAM_RECIPES: dict[str, dict[str, Any]] = {
    "lora-bias": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rank-pattern": {"r": 4, "target_modules": ["q_proj", "lm_head"], "rank_pattern": {"layers.2.self_attn.q_proj": 9}},
}
RECIPES = [("llada", name) for name in LLADA_RECIPES] + [("dream", name) for name in DREAM_RECIPES]


def recipe(kind: str, name: str) -> dict[str, Any]:
    return {"llada": LLADA_RECIPES, "dream": DREAM_RECIPES}[kind][name]


@pytest.mark.parametrize(("kind", "name"), RECIPES)
def test_merged_weights_are_pefts(
    kind: str, name: str, tmp_path: Path, build_release: Build, load_release: Load
) -> None:
    adapter = make_adapter(kind, tmp_path / "adapter", **recipe(kind, name))
    expected = merged_by_peft(kind, adapter)
    zero_shot = load_release(f"tiny-{kind}").state_dict()
    changed = 0
    model = load(build_release(f"tiny-{kind}"), adapter_name_or_path=adapter)
    for parameter, weight in model.state_dict().items():
        original = original_key(kind, parameter)
        if original in expected:
            assert torch.allclose(weight, expected[original], rtol=0, atol=1e-6), original
            changed += not torch.equal(weight, zero_shot[parameter])
        else:
            assert torch.equal(weight, zero_shot[parameter]), original
    adapted = {key.rsplit(".", 1)[0] for key in expected}
    assert changed >= len(adapted)
    unmerged = load(build_release(f"tiny-{kind}"), adapter_name_or_path=adapter, merge_adapter=False)
    assert unmerged.num_parameters() > model.num_parameters()
    for got, want in zip(vectors(unmerged), vectors(model), strict=True):
        assert torch.allclose(got.float(), want.float(), rtol=0, atol=3e-5)
    for parameter, weight in adapter_loading.merged_state(unmerged).items():
        assert torch.allclose(weight, model.state_dict()[parameter], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "config_class", "model_class"),
    [("llada", LlamaConfig, LlamaForCausalLM), ("dream", Qwen2Config, Qwen2ForCausalLM)],
)
def test_against_peft_on_transformers_own_models(
    kind: str, config_class: Any, model_class: Any, load_release: Load
) -> None:
    """The released recipe, on LlamaForCausalLM and Qwen2ForCausalLM with the adapter's keys renamed."""
    raw = json.loads((PARITY / "backbones" / f"tiny-{kind}" / "config.json").read_text())
    sizes = {"vocab_size": raw["vocab_size"], "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": raw.get("n_kv_heads", 2)}
    model = model_class(config_class(**sizes, **heads, tie_word_embeddings=False))
    ours = load_release(f"tiny-{kind}", ADAPTERS[kind]).state_dict()
    names = {original_key(kind, name): name.replace("backbone.", "model.") for name in ours}
    stored = {names[name]: weight.float() for name, weight in backbone_weights(kind).items()}
    model.load_state_dict(stored, strict=True)
    modules = {original.rsplit(".", 1)[0]: name.rsplit(".", 1)[0] for original, name in names.items()}
    state = {}
    for key, tensor in load_file(PARITY / "adapters" / ADAPTERS[kind] / "adapter_model.safetensors").items():
        original, part, end = key.removeprefix(PREFIX).rsplit(".", 2)
        state[f"{modules[original]}.{part}.{end}"] = tensor.float()
    targets = sorted({key.rsplit(".", 2)[0] for key in state})
    assert len(targets) == 4 * 7 + (kind == "llada")
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=64, target_modules=targets), model)
    peft.set_peft_model_state_dict(model, state)
    for target in targets:
        layer: Any = model.get_submodule(target)
        layer.merge()
        merged = layer.get_base_layer().weight
        assert not torch.equal(merged, stored[target + ".weight"])
        assert torch.allclose(ours[target.replace("model.", "backbone.") + ".weight"], merged, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_in_float32_then_rounded_once(kind: str, load_release: Load) -> None:
    exact = load_release(f"tiny-{kind}", ADAPTERS[kind], torch_dtype=torch.float32).state_dict()
    rounded = load_release(f"tiny-{kind}", ADAPTERS[kind], torch_dtype=torch.bfloat16).state_dict()
    for name, weight in rounded.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact[name].to(torch.bfloat16)), name
    peft_weights = merged_by_peft(kind, PARITY / "adapters" / ADAPTERS[kind])
    ours = {original_key(kind, name): weight for name, weight in exact.items()}
    assert all(torch.allclose(ours[name], weight, rtol=0, atol=1e-6) for name, weight in peft_weights.items())


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "name", "elements"),
    [
        ("llada", "layers", 1),  # a row at a time
        ("llada", "r-alpha", 1000),
        ("llada", "rank-pattern", 12345),
        ("llada", "dora", 1000),
        ("llada", "dora", 12345),
        ("llada", "rslora", 7000),
        ("dream", "lora-bias", 1000),
    ],
)
def test_rows_merged_in_chunks_equal_the_whole(
    kind: str, name: str, elements: int, tmp_path: Path, build_release: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(kind, tmp_path / "adapter", **recipe(kind, name))
    whole = load(build_release(f"tiny-{kind}"), adapter_name_or_path=folder).state_dict()
    chunked = load(build_release(f"tiny-{kind}"))
    monkeypatch.setattr(adapter_loading, "CHUNK_ELEMENTS", elements)
    read_adapter(kind, folder, chunked).merge_into(chunked)
    assert all(torch.allclose(weight, whole[name], atol=1e-7) for name, weight in chunked.state_dict().items())


def read_adapter(kind: str, folder: Path, model: Any) -> adapter_loading.Adapter:
    modules = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in modules}
    ours = {original_key(kind, name + ".weight").removesuffix(".weight"): name for name in modules}
    theirs = {name: original for original, name in ours.items()}
    fields = read_json(folder / "adapter_config.json", adapter_loading.ADAPTER_FIELDS)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    return adapter_loading.Adapter(
        folder, fields, tensors, shapes, lambda name: ours.get(name, name), lambda name: theirs[name]
    )


def test_the_output_head_is_adapted(tmp_path: Path, build_release: Build, load_release: Load) -> None:
    """Released LLaDA adapters hold the head: without it the sparse values are others, the dense ones the same."""
    headless = copy_adapter("llada-single", tmp_path / "headless", exclude_modules=["model.transformer.ff_out"])
    edit_weights(headless / "adapter_model.safetensors", lambda t: [t.pop(key) for key in list(t) if HEAD in key])
    without = load(build_release("tiny-llada", "llada-single"), adapter_name_or_path=headless)
    dense, _, sparse = vectors(without)
    expected_dense, _, expected_sparse = vectors(load_release("tiny-llada", "llada-single"))
    assert torch.allclose(dense, expected_dense, atol=1e-6)
    assert (sparse - expected_sparse).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_unmerged_keeps_the_adapter_beside_the_weights(kind: str, load_release: Load) -> None:
    model = load_release(f"tiny-{kind}", ADAPTERS[kind], merge_adapter=False, torch_dtype=torch.bfloat16)
    layer = model.backbone.layers[0].self_attn.q_proj
    stored = backbone_weights(kind)
    name = original_key(kind, "backbone.layers.0.self_attn.q_proj.weight")
    assert torch.equal(layer.get_base_layer().weight, stored[name])
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert hasattr(model.lm_head, "lora_A") == (kind == "llada")
    assert model.get_output_embeddings() is model.lm_head


def test_lora_bias_without_a_bias_to_merge_into(tmp_path: Path, build_release: Build) -> None:
    adapter = make_adapter("dream", tmp_path / "adapter", r=4, target_modules=["o_proj"])

    def add_biases(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "lora_B" in key]:
            tensors[key.replace("lora_B.weight", "lora_B.bias")] = torch.ones(len(tensors[key]))

    edit_weights(adapter / "adapter_model.safetensors", add_biases)
    fields = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_bias": True}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj\.lora_B\.bias has no bias in the backbone"):
        load(build_release("tiny-dream"), adapter_name_or_path=adapter)


# ------------------------------------------------------------------------------------------ adapters that do not fit


def drop(key: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(key)


def put(key: str, *shape: int, value: float = 1.0) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({key: torch.full(shape, value)})


def spoil(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[key].view(-1)[5:6].fill_(value)


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    pass


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (drop(QUERY + ".lora_B.weight"), {}, r"blocks\.0\.q_proj\.lora_B\.weight is missing"),
        (
            lambda t: [t.pop(f"{HEAD}.lora_{part}.weight") for part in "AB"],
            {},
            r"targets model\.transformer\.ff_out, but adapter_model\.safetensors holds no weights",
        ),
        (put(QUERY + ".lora_C.weight", 2), {}, r"unexpected key .*q_proj\.lora_C\.weight; expected base_model\.model"),
        (put("model.other.lora_A.weight", 2), {}, r"unexpected key model\.other\.lora_A\.weight"),
        (put(PREFIX + "model.nowhere.lora_A.weight", 2), {}, r"model\.nowhere\.lora_A\.weight belongs to no linear"),
        (
            put(PREFIX + "model.transformer.blocks.9.q_proj.lora_A.weight", 16, 64),
            {},
            r"blocks\.9\.q_proj\.lora_A\.weight belongs to no linear layer",
        ),
        (put(QUERY + ".lora_magnitude_vector", 64), {}, r"q_proj\.lora_magnitude_vector is unexpected"),
        (nothing, {"use_dora": True}, r"lora_magnitude_vector is missing"),
        (nothing, {"r": 8}, r"has shape \[.*\]; rank 8 on a backbone layer"),
        (nothing, {"rank_pattern": {"q_proj": 4}}, r"q_proj\.lora_[AB]\.weight has shape .*; rank 4 on a .* 64 x 64"),
        (put(QUERY + ".lora_A.weight", 16, 65), {}, r"q_proj\.lora_A\.weight has shape \[16, 65\]; .*\[16, 64\]"),
        (put(QUERY + ".lora_B.weight", 64), {}, r"q_proj\.lora_B\.weight has shape \[64\]; .*needs \[64, 16\]"),
        (nothing, {"target_modules": ["q_proj"]}, r"does not target .*, but adapter_model\.safetensors holds weights"),
        (nothing, {"bias": "all"}, "adapter_config.json: `bias` is 'all'; only 'none' is supported"),
        (nothing, {"modules_to_save": ["wte"]}, r"`modules_to_save` is \['wte'\]"),
        (nothing, {"peft_type": "IA3"}, "`peft_type` is 'IA3'; only 'LORA' is supported"),
        (nothing, {"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'"),
        (nothing, {"fan_in_fan_out": True}, "`fan_in_fan_out` is True"),
        (nothing, {"layer_replication": [[0, 4], [2, 4]]}, "`layer_replication` is"),
        (
            nothing,
            {"trainable_token_indices": [3]},
            r"`trainable_token_indices` is not supported for this backbone: \[3\]",
        ),
        (spoil(QUERY + ".lora_A.weight", float("nan")), {}, r"q_proj\.lora_A\.weight holds NaN or infinite values"),
        (spoil(HEAD + ".lora_B.weight", float("-inf")), {}, r"ff_out\.lora_B\.weight holds NaN or infinite values"),
    ],
)
def test_misfits(
    change: Any, config: dict[str, Any], words: str, tmp_path: Path, build_release: Build, load_release: Load
) -> None:
    adapter = copy_adapter("llada-single", tmp_path / "adapter", **config)
    edit_weights(adapter / "adapter_model.safetensors", change)
    with pytest.raises(ValueError, match=words) as failure:
        load(build_release("tiny-llada"), adapter_name_or_path=adapter)
    assert str(adapter) in str(failure.value)
    with pytest.raises(ValueError, match=words):
        building.build(str(PARITY / "backbones" / "tiny-llada"), tmp_path / "release", str(adapter))
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recorded", [True, False])
def test_adapter_of_the_other_backbone(kind: str, recorded: bool, tmp_path: Path, build_release: Build) -> None:
    other = {"llada": "dream", "dream": "llada"}[kind]
    adapter = copy_adapter(ADAPTERS[other], tmp_path / "adapter")
    if not recorded:
        (adapter / "retriever_config.json").unlink()
    words = r"retriever_config\.json.*not" if recorded else "belongs to no linear layer|has shape"
    with pytest.raises(ValueError, match=words):
        load(build_release(f"tiny-{kind}"), adapter_name_or_path=adapter)


def test_pickled_adapter_is_not_loaded(tmp_path: Path, build_release: Build) -> None:
    adapter = copy_adapter("llada-single", tmp_path / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model\.safetensors is not there \(adapter_model\.bin is pick"
    ):
        load(build_release("tiny-llada"), adapter_name_or_path=adapter)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_model.safetensors", b"", r"adapter_model\.safetensors is no whole safetensors file"),
        (
            "adapter_model.safetensors",
            b"version https://git-lfs",
            r"adapter_model\.safetensors is no whole safetensors",
        ),
        ("adapter_config.json", b"{", r"adapter_config\.json is not valid JSON"),
        ("adapter_config.json", b"[1]", r"adapter_config\.json must hold a JSON object, got list"),
        ("retriever_config.json", b"{]", r"retriever_config\.json"),
        ("retriever_config.json", b"{}", r"retriever_config\.json lacks 'model_type'"),
    ],
)
def test_broken_adapter_files(file: str, content: bytes, words: str, tmp_path: Path, build_release: Build) -> None:
    adapter = copy_adapter("llada-single", tmp_path / "adapter")
    (adapter / file).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load(build_release("tiny-llada"), adapter_name_or_path=adapter)


def test_truncated_adapter(tmp_path: Path, build_release: Build) -> None:
    adapter = copy_adapter("llada-single", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors has \d+ bytes, its header promises \d+; it is trunc"
    ):
        load(build_release("tiny-llada"), adapter_name_or_path=adapter)
