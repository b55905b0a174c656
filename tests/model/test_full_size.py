"""The released checkpoints at full size, by their safetensors headers alone: every key and shape is accounted for."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint_folders import KINDS, PARITY

from diffretriever.model.adapter_loading import ADAPTER_FIELDS, Adapter
from diffretriever.model.backbone_loading import (
    audit_weights,
    original_name,
    our_name,
)
from diffretriever.model.bidirectional_layers import linear_shapes, parameter_shapes
from diffretriever.model.checked_files import INDEX_FILE, read_backbone_config, read_headers, read_json

Shapes = dict[str, tuple[int, ...]]
PARAMETERS = {"llada": 8_015_581_184, "dream": 7_615_616_512}
CONFIGS: dict[str, dict[str, Any]] = {
    "llada": {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "embedding_size": 126464,
        "vocab_size": 126464,
        "max_sequence_length": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-05,
    },
    "dream": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
    },
}


def llada_keys() -> Shapes:
    """LLaDA-8B-Instruct's keys, as its index lists them."""
    shapes: Shapes = {"model.transformer.wte.weight": (126464, 4096), "model.transformer.ff_out.weight": (126464, 4096)}
    for i in range(32):
        block = f"model.transformer.blocks.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            shapes[f"{block}.{name}.weight"] = (4096, 4096)
        shapes[f"{block}.ff_proj.weight"] = shapes[f"{block}.up_proj.weight"] = (12288, 4096)
        shapes[f"{block}.ff_out.weight"] = (4096, 12288)
        shapes[f"{block}.attn_norm.weight"] = shapes[f"{block}.ff_norm.weight"] = (4096,)
    return shapes | {"model.transformer.ln_f.weight": (4096,)}


def dream_keys() -> Shapes:
    """Dream-v0-Instruct-7B's keys, as its index lists them."""
    shapes: Shapes = {"model.embed_tokens.weight": (152064, 3584), "lm_head.weight": (152064, 3584)}
    for i in range(28):
        layer = f"model.layers.{i}"
        for name, rows in (("q_proj", 3584), ("k_proj", 512), ("v_proj", 512)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, 3584)
            shapes[f"{layer}.self_attn.{name}.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (3584, 3584)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (18944, 3584)
        shapes[f"{layer}.mlp.down_proj.weight"] = (3584, 18944)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (3584,)
    return shapes | {"model.norm.weight": (3584,)}


KEYS = {"llada": llada_keys(), "dream": dream_keys()}


def write_sparse_checkpoint(kind: str, folder: Path, keys: Shapes, shards: int = 4) -> Path:
    """Write config, index and shards whose headers are real and whose data are holes in the file."""
    folder.mkdir()
    config = json.loads((PARITY / "backbones" / f"tiny-{kind}" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | CONFIGS[kind]))
    weight_map: dict[str, str] = {}
    for number in range(shards):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        for name in list(keys)[number::shards]:
            start, end = end, end + 2 * math.prod(keys[name])
            header[name] = {"dtype": "BF16", "shape": list(keys[name]), "data_offsets": [start, end]}
            weight_map[name] = file
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
        os.truncate(folder / file, 8 + len(encoded) + end)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made = {
        kind: write_sparse_checkpoint(kind, tmp_path_factory.mktemp("full") / kind, keys) for kind, keys in KEYS.items()
    }
    return made.__getitem__


def expected_shapes(folder: Path) -> tuple[str, Shapes]:
    kind, config = read_backbone_config(folder)
    return kind, parameter_shapes(kind, config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_and_shape(kind: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(kind)
    found, shapes = expected_shapes(folder)
    assert found == kind
    assert audit_weights(folder, read_headers(folder), kind, shapes) == "BF16"
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[kind]
    assert {original_name(kind, name): shape for name, shape in shapes.items()} == KEYS[kind]
    assert {our_name(kind, name): shape for name, shape in KEYS[kind].items()} == shapes
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 2 * PARAMETERS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_one_key_less_or_more_is_seen(kind: str, tmp_path: Path) -> None:
    keys = dict(KEYS[kind])
    gone = list(keys)[40]
    del keys[gone]
    folder = write_sparse_checkpoint(kind, tmp_path / "less", keys)
    with pytest.raises(ValueError, match=f"lacks 1 of {len(KEYS[kind])} weights: {gone}"):
        audit_weights(folder, read_headers(folder), *expected_shapes(folder))
    folder = write_sparse_checkpoint(kind, tmp_path / "more", KEYS[kind] | {"model.extra.weight": (3, 3)})
    with pytest.raises(ValueError, match=r"1 weights .* no place for: model\.extra\.weight"):
        audit_weights(folder, read_headers(folder), *expected_shapes(folder))


LLADA_TARGETS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
DREAM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_keys(kind: str, rank: int = 16) -> Shapes:
    """The released adapters' keys: seven projections a layer, and LLaDA's head, whose name is a target's too."""
    targets = LLADA_TARGETS if kind == "llada" else DREAM_TARGETS
    shapes: Shapes = {}
    for name, shape in KEYS[kind].items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in targets and len(shape) == 2:
            shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, shape[1])
            shapes[f"base_model.model.{module}.lora_B.weight"] = (shape[0], rank)
    return shapes


def read_adapter(kind: str, folder: Path, checkpoint: Path, keys: Shapes) -> Adapter:
    targets = LLADA_TARGETS if kind == "llada" else DREAM_TARGETS
    peft.LoraConfig(r=16, lora_alpha=64, lora_dropout=0.05, target_modules=list(targets)).save_pretrained(str(folder))
    fields = read_json(folder / "adapter_config.json", ADAPTER_FIELDS)
    zero = torch.zeros(())  # one number seen as every tensor: right shapes, no memory
    tensors = {name: zero.expand(shape) for name, shape in keys.items()}
    layers = linear_shapes(expected_shapes(checkpoint)[1])
    return Adapter(folder, fields, tensors, layers, partial(our_name, kind), partial(original_name, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_released_adapters_fit(kind: str, tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    keys = adapter_keys(kind)
    adapter = read_adapter(kind, tmp_path / "adapter", checkpoint(kind), keys)
    layers = {"llada": 32, "dream": 28}[kind]
    assert len(adapter.modules) == 7 * layers + (kind == "llada") == len(keys) // 2
    assert ("lm_head" in adapter.modules) == (kind == "llada")
    assert set(adapter.config.rank_pattern.values()) == {16}
    assert set(adapter.config.alpha_pattern.values()) == {64}


def test_llada_adapter_without_its_head_is_seen(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    keys = {name: shape for name, shape in adapter_keys("llada").items() if "transformer.ff_out" not in name}
    with pytest.raises(ValueError, match=r"targets model\.transformer\.ff_out, but .* holds no weights for it"):
        read_adapter("llada", tmp_path / "adapter", checkpoint("llada"), keys)
