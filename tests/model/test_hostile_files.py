"""Files made to harm: none runs code, takes for ever, fills the memory or shows a library's traceback."""

from __future__ import annotations

import json
import reprlib
import struct
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import ADAPTERS, KINDS, PARITY, REMOVED, copy_adapter, copy_backbone, edit_json, shard
from transformers import AutoModel

from diffretriever.model.backbone_loading import audit_weights, load_tokenizer, original_name, our_name
from diffretriever.model.bidirectional_layers import linear_shapes, parameter_shapes
from diffretriever.model.chat_template import render_prompts
from diffretriever.model.checked_files import read_backbone_config, read_headers, read_json
from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig
from diffretriever.model.modeling_diffretriever import read_adapter, read_settings
from diffretriever.model.tokenization_helpers import RetrievalTokenizer
from diffretriever.publishing import build as building

Build = Callable[..., Path]
INDEX = "model.safetensors.index.json"
HUGE = 10**4000


def load(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)


def own_release(kind: str, place: Path, **settings: Any) -> tuple[Path, Path]:
    """Return a backbone and a release of it that a test may change."""
    base = copy_backbone(kind, place / "base")
    release = place / f"release-{place.name}"
    building.build(str(base), release, str(PARITY / "adapters" / ADAPTERS[kind]), **settings)
    return base, release


@cache
def tiny_layers(kind: str) -> dict[str, tuple[int, int]]:
    return linear_shapes(parameter_shapes(*read_backbone_config(PARITY / "backbones" / f"tiny-{kind}")))


def read_tiny_adapter(kind: str, folder: Path) -> Any:
    return read_adapter(folder, tiny_layers(kind), partial(our_name, kind), partial(original_name, kind))


# ------------------------------------------------------------------------------------------ weights


def with_header(file: Path, header: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


WIDE = {"dtype": "F32", "shape": [3] * 3_000_000, "data_offsets": [0, 4]}


@pytest.mark.once
@pytest.mark.usefixtures("within")
@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"x": WIDE}, "is no whole safetensors file"),  # more than a header may take
        ({"x": {**WIDE, "shape": [3] * 9}}, r"`shape` of x has 9 numbers, at most 8"),
        ({"x": {**WIDE, "shape": [1] * 300_000}}, r"`shape` of x has 300000 numbers, at most 8"),
        ({"x": {**WIDE, "shape": [HUGE] * 8}}, "offsets, shape and dtype of x do not fit together"),
        ({"x": {**WIDE, "shape": ["a"]}}, "is no whole safetensors file"),
        ({"x": {**WIDE, "shape": {"a": 1}}}, "is no whole safetensors file"),
        ({"x": {**WIDE, "dtype": []}}, "is no whole safetensors file"),
        ({"x": {**WIDE, "data_offsets": 5}}, "is no whole safetensors file"),
        ({"x": [], "y": 1}, "is no whole safetensors file"),
        ({"__metadata__": {"format": 5}}, "`__metadata__` holds something else than strings"),
        ({"__metadata__": [1]}, "is no whole safetensors file"),
    ],
    ids=lambda case: reprlib.repr(case)[:50],
)
def test_hostile_headers(header: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = copy_backbone("llada", tmp_path / "base")
    with_header(base / "model.safetensors", header)
    with pytest.raises(ValueError, match=words) as failure:
        read_headers(base)
    assert str(base / "model.safetensors") in str(failure.value)
    adapter = copy_adapter("llada-single", tmp_path / "adapter")
    with_header(adapter / "adapter_model.safetensors", header)
    with pytest.raises(ValueError, match=words):
        read_tiny_adapter("llada", adapter)


@pytest.mark.usefixtures("within")
def test_a_header_nested_deeply(tmp_path: Path) -> None:
    text = ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}").encode()
    base = copy_backbone("llada", tmp_path / "base")
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        read_headers(base)


def rewrite_index(base: Path, **changes: Any) -> None:
    fields = json.loads((base / INDEX).read_text()) | changes
    (base / INDEX).write_text(json.dumps({name: value for name, value in fields.items() if value is not REMOVED}))


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metadata", [REMOVED, None, [], 5, "x", {}], ids=str)
def test_an_index_needs_no_metadata(kind: str, metadata: Any, tmp_path: Path, load_release: Any) -> None:
    base, release = own_release(kind, tmp_path)
    shard(base)
    rewrite_index(base, metadata=metadata)
    expected = load_release(f"tiny-{kind}", ADAPTERS[kind]).encode_texts(["what is a tide"], True)
    out = load(release).encode_texts(["what is a tide"], True)
    assert all(torch.equal(out[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "shard_name",
    [
        "../base-outside/x.safetensors",
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x",
        "..",
        ".",
        "",
        "a\0b",
        "x" * 1_000_000,
        5,
        None,
        [],
    ],
    ids=lambda name: str(name)[:30],
)
def test_an_index_names_files_of_its_own_folder_only(shard_name: Any, tmp_path: Path) -> None:
    base = copy_backbone("llada", tmp_path / "base")
    shard(base)
    weight_map = json.loads((base / INDEX).read_text())["weight_map"]
    outside = tmp_path / "x.safetensors"
    outside.write_bytes((base / "model-00001-of-00003.safetensors").read_bytes())
    rewrite_index(base, weight_map={**weight_map, next(iter(weight_map)): shard_name})
    with pytest.raises(
        ValueError, match=r"index\.json: `weight_map` must name files of its own folder, got"
    ) as failure:
        read_headers(base)
    assert len(str(failure.value)) < 500


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    base = copy_backbone("llada", tmp_path / "base")
    shard(base)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(base.glob("*.safetensors"))):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert audit_weights(base, read_headers(base), "llada", parameter_shapes(*read_backbone_config(base))) == "BF16"


def test_of_two_sets_of_weights_those_that_are_loaded_are_checked(tmp_path: Path) -> None:
    """transformers takes model.safetensors where there is an index, too."""
    base = copy_backbone("llada", tmp_path / "base")
    single = (base / "model.safetensors").read_bytes()
    shard(base)
    (base / "model.safetensors").write_bytes(single[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors has \d+ bytes, its header promises"):
        read_headers(base)


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("llada", {"n_layers": 1_000_000}, "`n_layers` must be a whole number of at most 512, got 1000000"),
        ("llada", {"d_model": 10**9}, "`d_model` must be a whole number of at most 65536"),
        ("llada", {"embedding_size": HUGE}, "`embedding_size` must be a whole number of at most 16777216"),
        ("llada", {"n_heads": 3}, "`n_heads` is 3, which does not go with a width of 64 in 3 heads"),
        ("llada", {"n_kv_heads": 3}, "`n_kv_heads` is 3, which does not go with"),
        ("llada", {"mlp_hidden_size": None, "mlp_ratio": "x" * 1_000_000}, "`mlp_ratio` must be a whole number"),
        ("llada", {"mlp_hidden_size": None, "mlp_ratio": [1], "d_model": 64}, "`mlp_ratio` must be a whole number"),
        ("llada", {"rope_theta": 1e300}, "`rope_theta` must be a number of at most"),
        ("llada", {"rms_norm_eps": HUGE}, r"`rms_norm_eps` must be a number of at most 1\.0"),
        ("llada", {"model_type": ["llada"]}, r"model_type is \['llada'\]; DiffRetriever reads"),
        ("llada", {"mask_token_id": -1}, "`mask_token_id` must be a whole number of at least 0"),
        ("dream", {"num_hidden_layers": 10**12}, "`num_hidden_layers` must be a whole number of at most 512"),
        ("dream", {"num_attention_heads": 5}, "`num_attention_heads` is 5, which does not go with"),
        ("dream", {"max_position_embeddings": 1e300}, "`max_position_embeddings` must be a whole number"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_sizes_of_a_backbone(kind: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = copy_backbone(kind, tmp_path / "base", **fields)
    with pytest.raises(ValueError, match=words) as failure:
        read_backbone_config(base)
    assert str(base / "config.json") in str(failure.value)
    assert len(str(failure.value)) < 500


SELF_CONTAINED = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_query_masks": 10**9}, "config field `num_query_masks` must be a whole number of at most 1024"),
        ({"num_passage_masks": 10**30}, "`num_passage_masks` must be a whole number of at most 1024"),
        ({"max_length": 10**9}, "`max_length` must be a whole number of at most 1048576"),
        ({"sparse_top_k": 10**9}, "`sparse_top_k` must be a whole number of at most"),
        ({"base_model_name_or_path": "x" * 1_000_000}, "`base_model_name_or_path` must be a string of 1 to 4096"),
        ({"backbone_type": "x" * 1_000_000}, "`backbone_type` must be one of"),
        ({"query_prompt": {"system": "x" * 10_001, "user": "{text}", "assistant": ""}}, "at most 10000 characters"),
        ({"backbone_config": {}}, r"`backbone_config\.model_type` is None; only 'llama', 'qwen2' are supported"),
        (
            {"backbone_config": {**SELF_CONTAINED, "num_hidden_layers": 10**6}},
            "num_hidden_layers` must be .* at most 512",
        ),
        (
            {"backbone_config": {**SELF_CONTAINED, "rope_scaling": {"a": 1}}},
            r"`rope_scaling` holds, which is not known here, a",
        ),
        ({"backbone_config": {**SELF_CONTAINED, "hidden_size": [1]}}, r"hidden_size` must be a whole number"),
        (
            {"backbone_config": {**SELF_CONTAINED, "num_attention_heads": 5}},
            "num_attention_heads` is 5, which does not",
        ),
    ],
    ids=lambda case: reprlib.repr(case)[:50],
)
def test_sizes_of_a_release(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as failure:
        DiffRetrieverConfig(**fields)
    assert len(str(failure.value)) < 500


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("attn_implementation", "someone/kernels"),
        ("_attn_implementation", "someone/kernels"),
        ("transformers_weights", "other.safetensors"),
        ("torch_dtype", "load"),
        ("dtype", "float8_e4m3fn"),
        ("to_dict", 5),
        ("check", None.__class__.__name__),
        ("per_layer_config", {"0": {}}),
    ],
)
def test_a_config_cannot_choose_what_transformers_loads(
    field: str, value: Any, tmp_path: Path, build_release: Build
) -> None:
    _, release = own_release("llada", tmp_path)
    edit_json(release / "config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"config\.json of .*: `{field}` is ") as failure:
        load(release)
    assert str(release) in str(failure.value)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a": ' * 50_000, "[]", "null", "5", '"x"'])
def test_a_config_that_is_no_object(text: str, tmp_path: Path) -> None:
    """AutoModel reads config.json before any code of ours; the class itself and the commands say what is wrong."""
    _, release = own_release("llada", tmp_path)
    (release / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON: .*|must hold a JSON object, got \w+\.)"):
        DiffRetrieverConfig.from_pretrained(release)


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, release = own_release("llada", tmp_path)
    with (release / "config.json").open("ab") as stream:
        stream.truncate(17 * 1024 * 1024)
    with pytest.raises(ValueError, match=r"config\.json has \d+ bytes; .* takes at most 16777216"):
        read_json(release / "config.json")
    with (release / "tokenizer.json").open("ab") as stream:
        stream.truncate(33 * 1024 * 1024)
    with pytest.raises(ValueError, match=r"tokenizer\.json has \d+ bytes; a tokenizer's have at most 33554432"):
        load_tokenizer([release])


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", {"bos_token": "x" * 1_000_000}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "x" * 1_000_000}}}),
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": "x" * 1_000_000}]}),
        ("added_tokens.json", {"x" * 1_000_000: 9}),
        ("tokenizer.json", {"added_tokens": [{"id": 9, "content": "x" * 1_000_000}]}),
    ],
    ids=lambda case: str(case)[:40],
)
def test_special_tokens_without_end(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    base = copy_backbone("llada", tmp_path / "base")
    (base / name).write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=rf"{name} holds a special token of 1000000 characters, .* at most 256"
    ) as failure:
        load_tokenizer([base])
    assert len(str(failure.value)) < 500


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("largest", [2048, 2**31])
def test_ids_that_the_backbone_has_not(largest: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, release = own_release("llada", tmp_path)
    rules = json.loads((base / "tokenizer.json").read_text())
    rules["model"]["vocab"]["never seen"] = largest
    for folder in (base, release):
        (folder / "tokenizer.json").write_text(json.dumps(rules))
    words = f"its tokenizer has the token id {largest}, of a vocabulary of 2048"
    with pytest.raises(ValueError, match=words):
        load(release)
    with pytest.raises(ValueError, match=words):
        building.build(str(base), tmp_path / "again")
    assert len(capfd.readouterr().err) < 5000


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaa"}
HOSTILE_RULES: dict[str, tuple[str, Any]] = {
    "a long replacement": ("normalizer", {**REPLACE, "content": "b" * 100_000}),
    "one after the other": ("normalizer", {"type": "Sequence", "normalizers": [REPLACE, REPLACE]}),
    "a long beginning": ("normalizer", {"type": "Prepend", "prepend": "x" * 10_000_000}),
    "many": ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 100_000}),
    "decoded": ("decoder", {"type": "Sequence", "decoders": [{**REPLACE, "content": "b" * 100_000}]}),
    "long words": (
        "model",
        {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "", "vocab": {"a": 1}}
        | {"max_input_chars_per_word": 10**9},
    ),
    "a long prefix": (
        "model",
        {"type": "BPE", "continuing_subword_prefix": "x" * 1_000_000, "vocab": {}, "merges": []},
    ),
}


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("name", HOSTILE_RULES)
def test_rules_that_make_texts_long(name: str, tmp_path: Path) -> None:
    base = copy_backbone("llada", tmp_path / "base")
    part, rules = HOSTILE_RULES[name]
    edit_json(base / "tokenizer.json", **{part: rules})
    with pytest.raises(ValueError, match=rf"tokenizer\.json: `{part}` is .*; at most 100 steps") as failure:
        load_tokenizer([base])
    assert len(str(failure.value)) < 700


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize(
    "rules",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}},
        {"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}},
    ],
    ids=str,
)
def test_rules_at_which_the_library_panics(rules: dict[str, Any], tmp_path: Path) -> None:
    base = copy_backbone("llada", tmp_path / "base")
    edit_json(base / "tokenizer.json", **rules)
    with pytest.raises(ValueError, match=r"tokenizer.* (cannot be used: PanicException|files cannot be read: ).*"):
        read_whole_tokenizer(base)


# ------------------------------------------------------------------------------------------ every field of every file

DEEP = "@deep@"
VALUES: dict[str, Any] = {
    "null": None,
    "list": [],
    "object": {},
    "minus": -1,
    "huge": 1e300,
    "long": "x" * 1_000_000,
    "deep": DEEP,
    "NaN": float("nan"),
    "true": True,
    "digits": HUGE,
    "half a pair": "\ud800",
}


def as_text(fields: Any) -> str:
    return json.dumps(fields).replace(f'"{DEEP}"', "[" * 10_000 + "]" * 10_000)


def read_whole_backbone(folder: Path) -> None:
    audit_weights(folder, read_headers(folder), "llada", parameter_shapes(*read_backbone_config(folder)))


def read_whole_tokenizer(folder: Path) -> None:
    tokenizer, config = load_tokenizer([folder]), DiffRetrieverConfig(max_length=2000)
    RetrievalTokenizer(tokenizer, config, render_prompts(tokenizer, config)).prepare(
        ["a cat", "a" * 3000 + "!"], True, True
    )


@cache
def tiny_tokenizer() -> Any:
    return load_tokenizer([PARITY / "backbones" / "tiny-llada"])


READERS: dict[str, Callable[[Path], Any]] = {
    "adapter_config.json": partial(read_tiny_adapter, "llada"),
    "retriever_config.json": lambda place: read_settings(place / "retriever_config.json", tiny_tokenizer()),
    "config.json": read_whole_backbone,
    INDEX: read_whole_backbone,
    "tokenizer_config.json": read_whole_tokenizer,
    "tokenizer.json": read_whole_tokenizer,
    "release/config.json": DiffRetrieverConfig.from_pretrained,
}


# The tokenizer's files are read by the library of transformers' choice.
ONCE = [pytest.param(name, marks=[] if name.startswith("tokenizer") else pytest.mark.once) for name in READERS]


@pytest.mark.parametrize("name", ONCE)
def test_every_field_of_every_file(name: str, tmp_path: Path, build_release: Build) -> None:
    """Each field, the whole file and a new field, set to what nobody meant: loaded, or refused in one line."""
    if name.startswith(("adapter", "retriever")):
        place = copy_adapter("llada-q4p4", tmp_path / "adapter")
    elif name.startswith("release"):
        place = own_release("llada", tmp_path)[1]
    else:
        place = copy_backbone("llada", tmp_path / "base")
    if name == INDEX:
        shard(place)
    file = place / name.rpartition("/")[2]
    fields, read = json.loads(file.read_text()), READERS[name]
    read(place)
    refused = 0
    for field in (None, "some_new_field", *fields):
        for value in VALUES.values():
            file.write_text(as_text(value if field is None else {**fields, field: value}))
            start, said = time.process_time(), None
            try:
                read(place)
            except (ValueError, OSError) as error:
                said = str(error)
            assert time.process_time() - start < 5, field
            if said is not None:
                refused += 1
                assert len(said) < 1000, (field, said[:1000])
                assert str(place) in said or "config field" in said, (field, said)
    assert refused >= 2 * len(VALUES)
