"""The on-disk formats of small backbones, against the reference checkpoints and transformers' own models."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import KINDS, original_key
from paired_texts import EOS, MASK, SPECIAL, tiny_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from diffretriever.pretraining.backbone import hidden_states, mask_states
from diffretriever.pretraining.backbone_format import rope_theta
from diffretriever.pretraining.data import pad_left
from diffretriever.pretraining.formats import FORMATS
from diffretriever.pretraining.llada_format import to_llada_name, to_llama_name
from diffretriever.training.recipe import BACKBONE_TYPES, Shape

BACKBONES = Path(__file__).parents[1] / "parity" / "backbones"
REFERENCE_IDS = {"llada": {"mask": 2006, "bos": 2000, "eos": 2001}, "dream": {"mask": 2007, "bos": 2006, "eos": 2000}}
THEIRS: dict[str, Any] = {"llada": LlamaForCausalLM, "dream": Qwen2ForCausalLM}


def scrambled(kind: str) -> Any:
    """A small model none of whose weights, biases included, is zero."""
    model, numbers = tiny_model(kind), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2, generator=numbers)
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a padded batch; each row ends in two masks and a tail of three."""
    numbers = random.Random(0)
    return pad_left([[*numbers.choices(range(99), k=length), MASK, MASK, 5, 6, 7] for length in (4, 9, 7)], EOS)


def test_a_recipe_can_name_every_format() -> None:
    assert tuple(FORMATS) == BACKBONE_TYPES


def test_names_map_both_ways() -> None:
    stored = load_file(str(BACKBONES / "tiny-llada" / "model.safetensors"))
    for name in stored:
        assert to_llada_name(to_llama_name(name)) == name
    with pytest.raises(KeyError, match="no counterpart"):
        to_llada_name("model.layers.0.self_attn.q_norm.weight")


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_equals_the_reference_checkpoint(kind: str, tmp_path: Path) -> None:
    source, copy = BACKBONES / f"tiny-{kind}", tmp_path / "copy"
    FORMATS[kind].save(FORMATS[kind].load(source), source, copy, REFERENCE_IDS[kind])
    old, new = (load_file(str(folder / "model.safetensors")) for folder in (source, copy))
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert value.dtype == new[name].dtype
        assert torch.equal(value, new[name]), name
    for name in ("config.json", "generation_config.json"):
        expected, got = (json.loads((folder / name).read_text()) for folder in (source, copy))
        assert list(got.items()) == list(expected.items())
    assert (copy / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_float32_weights_survive_saving_and_loading(kind: str, tmp_path: Path) -> None:
    model = scrambled(kind)
    FORMATS[kind].save(model, BACKBONES / f"tiny-{kind}", tmp_path, SPECIAL, torch.float32)
    again = FORMATS[kind].load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    ids, mask = rows()
    assert torch.equal(hidden_states(model, ids, mask), hidden_states(again, ids, mask))


@pytest.mark.parametrize(("kind", "theta", "eps"), [("llada", 500_000.0, 1e-5), ("dream", 1_000_000.0, 1e-6)])
def test_what_a_shape_leaves_open_is_the_formats_own(kind: str, theta: float, eps: float) -> None:
    config = FORMATS[kind].new_config(Shape(), SPECIAL)
    assert (rope_theta(config), config.rms_norm_eps) == (theta, eps)
    config = FORMATS[kind].new_config(Shape(rope_theta=10_000.0, rms_norm_eps=1e-3), SPECIAL)
    assert (rope_theta(config), config.rms_norm_eps) == (10_000.0, 1e-3)


def test_dream_has_biases_on_queries_keys_and_values_alone() -> None:
    biases = {name.split("layers.")[1] for name in tiny_model("dream").state_dict() if name.endswith("bias")}
    assert biases == {f"{layer}.self_attn.{part}_proj.bias" for layer in (0, 1) for part in "qkv"}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_states_equal_transformers_own_model_without_the_causal_mask(kind: str, tmp_path: Path) -> None:
    """The model is read from the file by names written out apart from the format's."""
    model = scrambled(kind)
    FORMATS[kind].save(model, BACKBONES / f"tiny-{kind}", tmp_path, SPECIAL, torch.float32)
    stored = load_file(str(tmp_path / "model.safetensors"))
    theirs = THEIRS[kind]._from_config(model.config, attn_implementation="eager").eval()
    names = {name: original_key(kind, name.replace("model.", "backbone.", 1)) for name in theirs.state_dict()}
    theirs.load_state_dict({name: stored[original] for name, original in names.items()})
    ids, mask = rows()
    size = ids.shape[1]
    full = torch.zeros(len(ids), 1, size, size).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    positions = torch.arange(size)[None].expand(len(ids), -1)
    expected = theirs.model(
        inputs_embeds=theirs.model.embed_tokens(ids), attention_mask=full, position_ids=positions
    ).last_hidden_state
    real = mask.bool()
    assert (hidden_states(model, ids, mask)[real] - expected[real]).abs().max() < 1e-5
    assert (mask_states(model, ids, mask, num_masks=2) - expected[:, -5:-3]).abs().max() < 1e-5
    causal = theirs.model(input_ids=ids[1:2]).last_hidden_state
    assert (causal - expected[1:2]).abs().max() > 0.1  # else the comparison would be worth nothing


@pytest.mark.parametrize(("kind", "title"), [("llada", "LLaDA"), ("dream", "Dream")])
def test_a_missing_file_is_named(kind: str, title: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"config.json is missing: expected a backbone in {title}'s format"):
        FORMATS[kind].load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_and_a_misshapen_weight_are_named(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(BACKBONES / f"tiny-{kind}", folder)
    (folder / "model.safetensors").chmod(0o644)
    weights = load_file(str(folder / "model.safetensors"))
    lost, bent = (original_key(kind, name) for name in ("backbone.norm.weight", "backbone.layers.1.mlp.up_proj.weight"))
    del weights[lost]
    weights[bent] = weights[bent][:-1].contiguous()
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    message = r"misshapen weights: \['model.norm.weight', 'model.layers.1.mlp.up_proj.weight'\]"
    with pytest.raises(ValueError, match=message):
        FORMATS[kind].load(folder)
