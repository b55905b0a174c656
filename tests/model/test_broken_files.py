"""Backbones that are broken on disk: each is refused with the file, the key and what was expected."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import KINDS, REMOVED, copy_backbone, edit_json, edit_weights, original_key, shard
from safetensors.torch import load_file
from transformers import AutoModel

from diffretriever.publishing import build as building

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WTE = "model.transformer.wte.weight"
UP = "model.transformer.blocks.1.up_proj.weight"


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., None]:
    """Break a backbone after its release was built: loading must name what is wrong, and so must another build.

    A build reads the headers of the weights only (`at_build=False`: it cannot see this).
    """

    def check(
        change: Callable[[Path], Any], words: str, kind: str = "llada", sharded: bool = False, at_build: bool = True
    ) -> None:
        base, release = copy_backbone(kind, tmp_path / "base"), tmp_path / f"release-{tmp_path.name}"
        if sharded:
            shard(base)
        building.build(str(base), release)
        change(base)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            AutoModel.from_pretrained(release, trust_remote_code=True)
        if at_build:
            with pytest.raises((ValueError, FileNotFoundError), match=words):
                building.build(str(base), tmp_path / "again")
            assert not (tmp_path / "again").exists()

    return check


def cut(size: int) -> Callable[[Path], Any]:
    return lambda base: (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:size])


def overwrite(file: str, content: bytes) -> Callable[[Path], Any]:
    return lambda base: (base / file).write_bytes(content)


def replace(old: bytes, new: bytes, file: str = WEIGHTS) -> Callable[[Path], Any]:
    def change(base: Path) -> None:
        content = (base / file).read_bytes()
        assert old in content
        (base / file).write_bytes(content.replace(old, new, 1))

    return change


def pickled_only(base: Path) -> None:
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 955600\n"


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut(-1), r"model\.safetensors has 955599 bytes, its header promises 955600; it is truncated or corrupt"),
        (cut(-4096), r"model\.safetensors has \d+ bytes, its header promises 955600"),
        (cut(500), r"model\.safetensors is no whole safetensors file \(its header is truncated or corrupt; 500 bytes"),
        (cut(5), r"model\.safetensors is no whole safetensors file \(.*; 5 bytes\)\. Fetch it again"),
        (cut(0), r"model\.safetensors is no whole safetensors file .*0 bytes"),
        (overwrite(WEIGHTS, POINTER), r"model\.safetensors .*it is a git-lfs pointer, not the weights"),
        (overwrite(WEIGHTS, b"PK\x03\x04" + b"\0" * 900), r"model\.safetensors .*a pickled torch file, which is never"),
        (overwrite(WEIGHTS, b"\x80\x02" + b"\0" * 900), r"model\.safetensors .*a pickled torch file"),
        (overwrite(WEIGHTS, struct.pack("<Q", 2) + b"[]"), r"model\.safetensors is no whole safetensors file"),
        (overwrite(WEIGHTS, struct.pack("<Q", 9) + b'{"a": 12}'), r"model\.safetensors is no whole safetensors file"),
        (replace(b'{"', b"{\x00"), r"model\.safetensors is no whole safetensors file \(its header"),
        (replace(b'"data_offsets"', b'"dbta_offsets"'), r"model\.safetensors is no whole safetensors file"),
        (replace(b'"shape":[64,64]', b'"shape":[64,46]'), r"model\.safetensors is no whole safetensors file"),
        (
            replace(b'"shape":[2048,64]', b'"shape":[64,2048]'),
            r"has shape \[64, 2048\]; config\.json asks for \[2048, 64",
        ),
    ],
)
def test_broken_weight_files(change: Any, words: str, broken: Callable[..., None]) -> None:
    broken(change, words)


@pytest.mark.parametrize("change", [pickled_only, lambda base: (base / WEIGHTS).unlink()], ids=["pickled", "none"])
def test_no_weights(change: Any, tmp_path: Path) -> None:
    """A release can be built without weights at hand, as for a backbone on the Hub; loading it needs them."""
    base = copy_backbone("llada", tmp_path / "base")
    change(base)
    building.build(str(base), tmp_path / f"weightless-{tmp_path.name}")
    with pytest.raises(FileNotFoundError, match=r"base holds neither model\.safetensors nor") as failure:
        AutoModel.from_pretrained(tmp_path / f"weightless-{tmp_path.name}", trust_remote_code=True)
    assert ("Pickled files (pytorch_model.bin) are never loaded" in str(failure.value)) == (change is pickled_only)


def put(key: str, *shape: int) -> Callable[[Path], Any]:
    return lambda base: edit_weights(
        base / WEIGHTS, lambda tensors: tensors.update({key: torch.ones(shape, dtype=torch.bfloat16)})
    )


def drop(*keys: str) -> Callable[[Path], Any]:
    return lambda base: edit_weights(base / WEIGHTS, lambda tensors: [tensors.pop(key) for key in keys])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(UP), r"base lacks 1 of 39 weights: model\.transformer\.blocks\.1\.up_proj\.weight\."),
        (drop("model.transformer.ff_out.weight"), r"lacks 1 of 39 weights: model\.transformer\.ff_out\.weight"),
        (put("model.transformer.blocks.4.up_proj.weight", 192, 64), r"no place for: .*blocks\.4\.up_proj\.weight"),
        (put("model.transformer.blocks.0.q_proj.bias", 64), r"1 weights .* no place for: .*blocks\.0\.q_proj\.bias"),
        (put("lm_head.weight", 2048, 64), r"are the same weight under two names"),
        (put(UP, 64, 192), r"blocks\.1\.up_proj\.weight has shape \[64, 192\]; config\.json asks for \[192, 64\]"),
        (
            lambda b: edit_weights(b / WEIGHTS, lambda t: t.update({UP: torch.ones(192, 64, dtype=torch.int8)})),
            r"blocks\.1\.up_proj\.weight is stored as 'I8'; expected BF16, F16 or F32",
        ),
    ],
)
def test_keys_and_shapes(change: Any, words: str, broken: Callable[..., None]) -> None:
    broken(change, words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(kind: str, value: float, broken: Callable[..., None]) -> None:
    key = original_key(kind, "backbone.layers.2.mlp.down_proj.weight")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][3, 4] = value

    words = key.replace(".", r"\.") + " hold NaN or infinite values"
    broken(lambda base: edit_weights(base / WEIGHTS, spoil), words, kind, at_build=False)


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], Any]:
    def rewrite(base: Path) -> None:
        fields = json.loads((base / INDEX).read_text())
        change(fields["weight_map"])
        (base / INDEX).write_text(json.dumps(fields))

    return rewrite


SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda base: (base / SECOND).unlink(), r"model-00002-of-00003\.safetensors is not there; .* incomplete"),
        (overwrite(SECOND, POINTER), r"model-00002-of-00003\.safetensors .*git-lfs pointer"),
        (
            index(lambda m: m.update({WTE: SECOND})),
            r"index\.json places model\.transformer\.wte.* which does not hold it",
        ),
        (index(lambda m: m.pop(WTE)), r"holds model\.transformer\.wte\.weight, which .*index\.json does not list"),
        (index(lambda m: m.clear()), r"base lacks 39 of 39 weights: .* and 34 more"),
        (overwrite(INDEX, b"{}"), r"index\.json must hold `weight_map`"),
        (overwrite(INDEX, b'{"weight_map": ["a"]}'), r"index\.json must hold `weight_map`"),
        (overwrite(INDEX, b"{"), r"index\.json is not valid JSON"),
    ],
)
def test_broken_shards(change: Any, words: str, broken: Callable[..., None]) -> None:
    broken(change, words, sharded=True)


def config(**changes: Any) -> Callable[[Path], Any]:
    return lambda base: edit_json(base / "config.json", **changes)


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("llada", overwrite("config.json", b"{"), r"base/config\.json is not valid JSON"),
        ("llada", overwrite("config.json", b"[]"), r"base/config\.json must hold a JSON object, got list"),
        ("llada", lambda base: (base / "config.json").unlink(), r"base/config\.json is not there"),
        ("llada", config(model_type="bert"), "config\\.json: model_type is 'bert'; DiffRetriever reads"),
        ("llada", config(model_type=REMOVED), r"config\.json: model_type is None"),
        ("llada", config(d_model=REMOVED, rope_theta=None), r"config\.json lacks d_model, rope_theta"),
        ("llada", config(n_heads="4"), r"config\.json: `n_heads` must be a whole number of at least 1, got '4'"),
        ("llada", config(n_layers=0), r"config\.json: `n_layers` must be a whole number of at least 1, got 0"),
        ("llada", config(rms_norm_eps=-1), r"config\.json: `rms_norm_eps` must be a number of at least 1e-12, got -1"),
        ("llada", config(alibi=True), r"config\.json: `alibi` is True; only False is supported"),
        ("llada", config(weight_tying=True), r"config\.json: `weight_tying` is True; only False"),
        ("llada", config(rope=False), r"config\.json: `rope` is False; only True"),
        ("llada", config(rope_scaling={"factor": 2}), r"config\.json: `rope_scaling` is \{'factor': 2\}; only None"),
        ("llada", config(layer_norm_type="default"), r"config\.json: `layer_norm_type` is 'default'; only 'rms'"),
        ("llada", config(block_type="sequential"), r"config\.json: `block_type` is 'sequential'; only 'llama'"),
        ("llada", config(block_group_size=2), r"config\.json: `block_group_size` is 2; only 1"),
        ("llada", config(include_bias=True), r"config\.json: `include_bias` is True"),
        ("llada", config(scale_logits=True), r"config\.json: `scale_logits` is True"),
        (
            "llada",
            config(mlp_hidden_size=200),
            r"ff_proj\.weight has shape \[192, 64\]; config\.json asks for \[200, 64",
        ),
        ("llada", config(n_layers=5), r"lacks 9 of 48 weights: model\.transformer\.blocks\.4\."),
        ("dream", config(rope_scaling={"type": "yarn"}), r"config\.json: `rope_scaling` is \{'type': 'yarn'\}"),
        ("dream", config(tie_word_embeddings=True), r"config\.json: `tie_word_embeddings` is True; only False"),
        ("dream", config(use_sliding_window=True), r"config\.json: `use_sliding_window` is True"),
        ("dream", config(hidden_act="gelu"), r"config\.json: `hidden_act` is 'gelu'; only 'silu'"),
        ("dream", config(num_key_value_heads=REMOVED), r"config\.json lacks num_key_value_heads"),
        (
            "dream",
            config(num_key_value_heads=4),
            r"k_proj\.(weight|bias) has shape \[32.*\]; config\.json asks for \[64",
        ),
    ],
)
def test_broken_backbone_config(kind: str, change: Any, words: str, broken: Callable[..., None]) -> None:
    broken(change, words, kind)


def release_of(tmp_path: Path) -> Path:
    base, release = copy_backbone("llada", tmp_path / "base"), tmp_path / f"release-{tmp_path.name}"
    building.build(str(base), release)
    return release


def without_mask_token(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            text = (folder / file).read_text().replace("<|mdm_mask|>", "<|other|>")
            (folder / file).write_text(text)


def without_template(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template=REMOVED)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_mask_token, r"tokenizer of .* has no \[MASK\] token \(looked for <\|mdm_mask\|>, <\|mask\|>"),
        (without_template, "tokenizer of .* has no chat template"),
        (overwrite("tokenizer.json", b"{"), "its tokenizer files cannot be read"),
        (overwrite("tokenizer.json", b'{"version": "1.0"}'), "its tokenizer files cannot be read"),
    ],
)
def test_broken_tokenizers(change: Any, words: str, tmp_path: Path) -> None:
    release = release_of(tmp_path)
    change(release)
    with pytest.raises(ValueError, match=words):
        AutoModel.from_pretrained(release, trust_remote_code=True)
    base = tmp_path / "base"
    change(base)
    with pytest.raises(ValueError, match=words):
        building.build(str(base), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_no_tokenizer_anywhere(tmp_path: Path) -> None:
    release = release_of(tmp_path)
    for folder in (release, tmp_path / "base"):
        (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"No tokenizer\.json, nor vocab\.json with merges\.txt, in"):
        AutoModel.from_pretrained(release, trust_remote_code=True)


def test_release_config_that_is_no_json(tmp_path: Path) -> None:
    release = release_of(tmp_path)
    (release / "config.json").write_text('{"model_type": ')
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModel.from_pretrained(release, trust_remote_code=True)


def test_release_without_backbone_or_weights(tmp_path: Path) -> None:
    release = release_of(tmp_path)
    edit_json(release / "config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"config\.json names no `base_model_name_or_path`, and .* has no weights"):
        AutoModel.from_pretrained(release, trust_remote_code=True)
