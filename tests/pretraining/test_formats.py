"""The files of small backbones, against the reference checkpoints; the model's own code reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import KINDS, PARITY, original_key
from paired_texts import tiny_model
from safetensors.torch import load_file

from diffretriever.model.configuration_diffretriever import DIFFUSION_TYPES
from diffretriever.pretraining.formats import FORMATS, write_description, write_weights
from diffretriever.pretraining.recipe import Shape

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def description(kind: str, shape: Shape, folder: Path) -> dict[str, Any]:
    """What config.json and generation_config.json say beside the reference's tokenizer."""
    folder.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(PARITY / "backbones" / f"tiny-{kind}" / name, folder / name)
    write_description(kind, shape, folder)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")}


def test_a_recipe_can_name_every_format() -> None:
    assert tuple(FORMATS) == DIFFUSION_TYPES


@pytest.mark.parametrize("kind", KINDS)
def test_the_description_equals_the_reference_checkpoints(kind: str, tmp_path: Path) -> None:
    vocabulary = {"llada": 2048, "dream": 2016}[kind]
    got = description(kind, Shape(vocabulary, d_model=64, n_layers=4, n_heads=4, mlp_hidden_size=192), tmp_path)
    for name, fields in got.items():
        expected = json.loads((PARITY / "backbones" / f"tiny-{kind}" / f"{name}.json").read_text())
        if name == "config" and kind == "dream":
            expected["num_key_value_heads"] = 4  # the reference shares keys and values; ours never do
        assert list(fields.items()) == list(expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_written_weights_equal_the_reference_checkpoints(
    kind: str, tmp_path: Path, load_release: Callable[..., Any]
) -> None:
    write_weights(load_release(f"tiny-{kind}"), kind, tmp_path)
    old = load_file(str(PARITY / "backbones" / f"tiny-{kind}" / "model.safetensors"))
    new = load_file(str(tmp_path / "model.safetensors"))
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert value.dtype == new[name].dtype
        assert torch.equal(value, new[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_float32_weights_stand_under_the_original_names(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    write_weights(model, kind, tmp_path, torch.float32)
    stored = load_file(str(tmp_path / "model.safetensors"))
    assert len(stored) == len(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(stored[original_key(kind, name)], value), name


@pytest.mark.parametrize(("kind", "theta", "eps"), [("llada", 500_000.0, 1e-5), ("dream", 1_000_000.0, 1e-6)])
def test_what_a_shape_leaves_open_is_the_formats_own(kind: str, theta: float, eps: float, tmp_path: Path) -> None:
    config = description(kind, Shape(), tmp_path)["config"]
    assert (config["rope_theta"], config["rms_norm_eps"]) == (theta, eps)
    config = description(kind, Shape(rope_theta=10_000.0, rms_norm_eps=1e-3), tmp_path)["config"]
    assert (config["rope_theta"], config["rms_norm_eps"]) == (10_000.0, 1e-3)


def test_dream_has_biases_on_queries_keys_and_values_alone() -> None:
    found = {name: bool(value.any()) for name, value in tiny_model("dream").state_dict().items()}
    biases = {name.split("layers.")[1]: used for name, used in found.items() if name.endswith("bias")}
    assert biases == {f"{layer}.self_attn.{part}_proj.bias": False for layer in (0, 1) for part in "qkv"}
