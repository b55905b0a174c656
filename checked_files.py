"""What is read from a checkpoint's files, held against what they may say: one line names the file and the field."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from reprlib import repr as shortened
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen2Config

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Limits of what a file may ask for; real ones stay far below.
MAX_JSON = 16 * 1024 * 1024  # bytes
MAX_HEADER = 4 * 1024 * 1024  # bytes
MAX_DIMENSIONS = 8
MAX_WEIGHTS = 100_000
LONGEST_TEXT = 4096  # characters
LONGEST_LIST = 10_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

# What an original config.json must say where a plain Llama or Qwen2 has no such switch.
FIXED_FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "llada": {
        "activation_type": ("one of", "silu"),
        "alibi": ("one of", False),
        "attention_layer_norm": ("one of", False),
        "bias_for_layer_norm": ("one of", False, None),
        "block_group_size": ("one of", 1, None),
        "block_type": ("one of", "llama"),
        "clip_qkv": ("one of", None),
        "include_bias": ("one of", False),
        "include_qkv_bias": ("one of", False, None),
        "input_emb_norm": ("one of", False),
        "layer_norm_type": ("one of", "rms"),
        "multi_query_attention": ("one of", False, None),
        "rope": ("one of", True),
        "rope_full_precision": ("one of", True, None),
        "rope_scaling": ("one of", None),
        "scale_logits": ("one of", False),
        "weight_tying": ("one of", False),
    },
    "dream": {
        "hidden_act": ("one of", "silu"),
        "rope_scaling": ("one of", None),
        "tie_word_embeddings": ("one of", False),
        "use_sliding_window": ("one of", False, None),
    },
    "llama": {
        "attention_bias": ("one of", False, None),
        "hidden_act": ("one of", "silu"),
        "mlp_bias": ("one of", False, None),
        "pretraining_tp": ("one of", 1, None),
        "tie_word_embeddings": ("flag", None),
    },
    "qwen2": {
        "hidden_act": ("one of", "silu"),
        "tie_word_embeddings": ("flag", None),
        "use_sliding_window": ("one of", False, None),
    },
}
# Llama 3's scaling of RoPE, the one besides none that is read.
ROPE_SCALING: dict[str, tuple[Any, ...]] = {
    "rope_type": ("one of", "llama3"),
    "factor": ("number", 1.0, 1e4),
    "low_freq_factor": ("number", 1e-3, 1e4),
    "high_freq_factor": ("number", 1e-3, 1e4),
    "original_max_position_embeddings": ("whole", 1, 1 << 31),
}

# What the sizes of a backbone may be, by our config's field.
SIZES: dict[str, tuple[Any, ...]] = {
    "vocab_size": ("whole", 1, 1 << 24),
    "hidden_size": ("whole", 1, 1 << 16),
    "intermediate_size": ("whole", 1, 1 << 20),
    "num_hidden_layers": ("whole", 1, 512),
    "num_attention_heads": ("whole", 1, 1024),
    "num_key_value_heads": ("whole", 1, 1024),
    "max_position_embeddings": ("whole", 1, 1 << 31),
    "rms_norm_eps": ("number", 1e-12, 1.0),
    "rope_theta": ("number", 1.0, 1e12),
}

# Our config's field: the original's field.
CONFIG_FIELDS: dict[str, dict[str, str]] = {
    "llada": {
        "vocab_size": "embedding_size",
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    },
    **{kind: {name: name for name in SIZES} for kind in ("dream", "llama", "qwen2")},
}


def read_json(file: Path, rules: Mapping[str, tuple[Any, ...]] | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: the file.
        rules: what its fields may say, as for `check_fields`; None leaves them unread.

    Returns:
        The object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON object, too large, too deep, or a field that may not say what it says.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there.")
    if (size := file.stat().st_size) > MAX_JSON:
        raise ValueError(f"{file} has {size} bytes; what a model says about itself takes at most {MAX_JSON}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{file} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    if rules is not None:
        refuse_unknown(f"{file}: ", content, rules)
        check_fields(f"{file}: ", content, rules)
    return content


def refuse_unknown(where: str, fields: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ValueError for a field that is not known, unless it is null: what a later library has, and leaves off."""
    for field in sorted(fields.keys() - set(known)):
        if fields[field] is not None:
            raise ValueError(f"{where}`{field:.80}` is a field that is not known here; remove it, or set it to null.")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def check_fields(where: str, fields: Mapping[str, Any], rules: Mapping[str, tuple[Any, ...]]) -> None:
    """Hold fields against rules; one that is absent or has no rule is passed over.

    Args:
        where: begins the message: the file, say.
        fields: what a file holds.
        rules: {field: rule}. A rule is ("one of", *values), ("whole", least, most), ("number", least, most), ("flag",),
            ("text",), ("name",): a text that is not empty, ("names",): a text or a list of them, ("ids",): a list of
            token ids, ("wholes",): a whole number or a list of them, ("object",), ("object", the rule of each value) or
            ("any",). A last None lets null in.

    Raises:
        ValueError: the first field that breaks its rule, and what it may say.

    >>> check_fields("config.json: ", {"r": 0}, {"r": ("whole", 1, 64)})
    Traceback (most recent call last):
    ValueError: config.json: `r` must be a whole number of at least 1, got 0.
    """
    for field, value in fields.items():
        kind, *limits = rules.get(field, ("any",))
        if kind == "any" or (value is None and limits and limits[-1] is None):
            continue
        if kind == "one of":
            if not any(type(value) is type(allowed) and value == allowed for allowed in limits):
                named = [allowed for allowed in limits if allowed not in (None, [], {})] or limits[:1]
                words = ", ".join(map(repr, named)) + (" are" if len(named) > 1 else " is")
                raise ValueError(f"{where}`{field}` is {shortened(value)}; only {words} supported.")
            continue
        words, fits = _KINDS[kind]
        right = fits(value)
        if kind in ("whole", "number"):
            above = right and value > limits[1]
            words += f" of at most {limits[1]}" if above else f" of at least {limits[0]}"
            right = right and limits[0] <= value <= limits[1]
        if not right:
            words += " or null" * (None in limits)
            raise ValueError(f"{where}`{field}` must be {words}, got {shortened(value)}.")
        if kind == "object" and limits and limits[0] is not None:
            parts = {f"{field}.{name:.80}": part for name, part in value.items()}
            check_fields(where, parts, dict.fromkeys(parts, limits[0]))


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, numpy's included; true and false are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _list_of(fits: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and len(value) <= LONGEST_LIST and all(map(fits, value))


def _is_id(value: Any) -> bool:
    return is_whole(value) and 0 <= value < 1 << 31


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "whole": ("a whole number", is_whole),
    "number": ("a number", lambda value: is_whole(value) or isinstance(value, float)),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "text": (f"a string of at most {LONGEST_TEXT} characters", _is_text),
    "name": (f"a string of 1 to {LONGEST_TEXT} characters", lambda value: _is_text(value) and value != ""),
    "names": (
        f"a string or a list of at most {LONGEST_LIST} strings",
        lambda value: _is_text(value) or _list_of(_is_text, value),
    ),
    "ids": (f"a list of at most {LONGEST_LIST} token ids", lambda value: _list_of(_is_id, value)),
    "wholes": (
        f"a whole number or a list of at most {LONGEST_LIST}",
        lambda value: is_whole(value) or _list_of(is_whole, value),
    ),
    "object": ("an object", lambda value: isinstance(value, dict)),
}


def read_backbone_config(folder: Path, backbone_type: str | None = None) -> tuple[str, LlamaConfig | Qwen2Config]:
    """Read a backbone's original config.json as transformers' own config.

    Args:
        folder: the backbone's folder.
        backbone_type: what the release says it is; None accepts any.

    Returns:
        "llada", "dream", "llama" or "qwen2", and the Llama or Qwen2 config. It says `tie_word_embeddings` where the
        checkpoint has no head of its own.

    Raises:
        ValueError: another model type, a missing field, or a switch that a Llama or Qwen2 does not have.
    """
    file = folder / "config.json"
    raw = read_json(file)
    found = raw["model_type"].lower() if isinstance(raw.get("model_type"), str) else ""
    if found not in FIXED_FIELDS:
        got = shortened(raw.get("model_type"))
        known = '"llada", "Dream", "llama" and "qwen2"'
        raise ValueError(f"{file}: model_type is {got}; DiffRetriever reads {known} backbones.")
    if backbone_type not in (None, found):
        raise ValueError(f"{file} is a {found} backbone, but the release's `backbone_type` is {backbone_type!r}.")
    sizes = {original: SIZES[field] for field, original in CONFIG_FIELDS[found].items()}
    optional = {"mask_token_id": ("whole", 0, 1 << 31), "mlp_ratio": ("whole", 1, 1024)}
    check_fields(f"{file}: ", raw, FIXED_FIELDS[found])
    check_fields(f"{file}: ", {name: raw[name] for name in raw if raw[name] is not None}, sizes | optional)
    if found == "llada":
        raw = _with_llada_defaults(raw)
    if found in ("llama", "qwen2"):
        raw = _with_native_defaults(f"{file}: ", raw)
    missing = [name for name in sizes if raw.get(name) is None]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}.")
    check_fields(f"{file}: ", raw, sizes)
    values = {ours: raw[theirs] for ours, theirs in CONFIG_FIELDS[found].items()}
    check_heads(f"{file}: ", values, CONFIG_FIELDS[found])
    values.update(rms_norm_eps=float(values["rms_norm_eps"]), rope_theta=float(values["rope_theta"]))
    # Ids stay unset: with a pad id, the embedding would treat the end-of-text token's row as padding.
    values["mask_token_id"] = raw.get("mask_token_id")
    tied = found in ("llama", "qwen2") and bool(raw.get("tie_word_embeddings"))
    values.update(pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=tied, use_cache=False)
    if found == "llama":
        values["rope_scaling"] = raw["rope_scaling"]
    return found, LlamaConfig(**values) if found in ("llada", "llama") else Qwen2Config(**values)


def check_heads(where: str, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise ValueError where heads do not share a backbone's width out evenly.

    Args:
        where: begins the message.
        values: the sizes of SIZES.
        names: what the message calls them.
    """
    width, heads, groups = (values[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    for whole, name, part in ((width, "num_attention_heads", 2 * heads), (heads, "num_key_value_heads", groups)):
        if whole % part:
            raise ValueError(
                f"{where}`{names[name]}` is {values[name]}, which does not go with a width of {width} in {heads} heads."
            )


def _with_llada_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill in what LLaDA's own configuration class derives."""
    derived = dict(raw)
    if raw.get("embedding_size") is None:
        derived["embedding_size"] = raw.get("vocab_size")
    if raw.get("n_kv_heads") is None:
        derived["n_kv_heads"] = raw.get("n_heads")
    if raw.get("mlp_hidden_size") is None and raw.get("d_model") and raw.get("mlp_ratio"):
        derived["mlp_hidden_size"] = raw["d_model"] * raw["mlp_ratio"]
    return derived


def _with_native_defaults(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Bring the spellings of transformers 4 and 5 together, and fill in what its Llama and Qwen2 derive."""
    derived = dict(raw)
    if raw.get("num_key_value_heads") is None:
        derived["num_key_value_heads"] = raw.get("num_attention_heads")
    check_fields(where, raw, {"rope_parameters": ("object", None), "rope_scaling": ("object", None)})
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    derived["rope_theta"] = 10_000.0 if rope.get("rope_theta") is None else rope["rope_theta"]
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    scaling.setdefault("rope_type", rope.get("type", "default"))
    derived["rope_scaling"] = None
    if scaling["rope_type"] != "default":
        if raw["model_type"].lower() != "llama":
            raise ValueError(f"{where}`rope_scaling` of a {raw['model_type']} is not read; only none is supported.")
        check_rope_scaling(where, scaling)
        derived["rope_scaling"] = scaling
    heads, head_width = derived.get("num_attention_heads") or 1, raw.get("head_dim")
    if head_width is not None and head_width != (raw.get("hidden_size") or 0) // heads:
        raise ValueError(
            f"{where}`head_dim` is {shortened(head_width)}; only hidden_size / num_attention_heads is read."
        )
    return derived


def check_rope_scaling(where: str, scaling: Mapping[str, Any]) -> None:
    """Raise ValueError for another scaling of RoPE than Llama 3's, whole and with nothing else."""
    named = {f"rope_scaling.{name:.80}": value for name, value in scaling.items()}
    check_fields(where, named, {f"rope_scaling.{name}": rule for name, rule in ROPE_SCALING.items()})
    if odd := sorted(scaling.keys() ^ ROPE_SCALING.keys()):
        problem = "lacks" if odd[0] in ROPE_SCALING else "holds, which is not known here,"
        raise ValueError(f"{where}`rope_scaling` {problem} {odd[0]:.80}.")


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Read a safetensors file's header and check it against the file's size; no weight is read.

    Returns:
        {name: {"dtype", "shape", "data_offsets"}}

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, corrupt, pickled, or a git-lfs pointer.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; the checkpoint is incomplete.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        header_bytes = stream.read(length) if length <= min(size - 8, MAX_HEADER) else b""
    try:
        header = json.loads(header_bytes)
        if any(not isinstance(text, str) for text in header.pop("__metadata__", {}).values()):
            raise ValueError("`__metadata__` holds something else than strings")
        expected = 8 + length + _data_bytes(header)
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        what = str(error) if type(error) is ValueError else _not_safetensors(start)  # else json's own
        raise ValueError(f"{file} is no whole safetensors file ({what}; {size} bytes). Fetch it again.") from error
    if size != expected:
        raise ValueError(f"{file} has {size} bytes, its header promises {expected}; it is truncated or corrupt.")
    return header


def _data_bytes(header: dict[str, dict[str, Any]]) -> int:
    """Return the size of the data that a header describes: tensors end to end, each as large as its shape says."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if len(entry["shape"]) > MAX_DIMENSIONS:  # to multiply a million numbers takes for ever
            raise ValueError(f"`shape` of {name:.200} has {len(entry['shape'])} numbers, at most {MAX_DIMENSIONS}")
        width = ITEM_BYTES.get(entry["dtype"], 0)
        if begin != end or (width and stop - begin != width * math.prod(entry["shape"])):
            raise ValueError(f"offsets, shape and dtype of {name:.200} do not fit together")
        end = stop
    return end


def _not_safetensors(start: bytes) -> str:
    if start.startswith(b"version "):
        return "it is a git-lfs pointer, not the weights"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "it is a pickled torch file, which is never loaded"
    return "its header is truncated or corrupt"


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file whole, once its header was found right.

    Raises:
        FileNotFoundError, ValueError: as `read_header`.
    """
    read_header(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error!s:.200}). Fetch it again.") from error


def read_headers(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Read the headers of a checkpoint's weight files: one, or those that an index names, as transformers chooses.

    Returns:
        {original name: (file, header entry)}

    Raises:
        FileNotFoundError, ValueError: no weights, only pickled ones, a missing or broken shard.
    """
    file, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if file.is_file():
        return {name: (file, entry) for name, entry in read_header(file).items()}
    if not index.is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED_SUFFIXES)
        hint = f" Pickled files ({', '.join(pickled)}) are never loaded; convert them." if pickled else ""
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}.{hint}")
    placed: dict[str, set[str]] = {}
    for name, shard in read_weight_map(index).items():
        placed.setdefault(shard, set()).add(name)
    entries: dict[str, tuple[Path, dict[str, Any]]] = {}
    for shard, names in sorted(placed.items()):
        header = read_header(folder / shard)
        for name in names - header.keys():
            raise ValueError(f"{index} places {name:.200} in {shard}, which does not hold it.")
        for name in header.keys() - names:
            raise ValueError(f"{folder / shard} holds {name:.200}, which {INDEX_FILE} does not list.")
        entries |= {name: (folder / shard, entry) for name, entry in header.items()}
    return entries


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model, or an index of them."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the names of the weights and of the shards that an index places them in, all of its own folder.

    Raises:
        FileNotFoundError, ValueError: no index, or one that names something else.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or len(weight_map) > MAX_WEIGHTS:
        raise ValueError(
            f"{index} must hold `weight_map`, an object from at most {MAX_WEIGHTS} weight names to file names."
        )
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\0]{1,255}(?<!^\.)(?<!^\.\.)", shard):
            raise ValueError(f"{index}: `weight_map` must name files of its own folder, got {shortened(shard)}.")
    return weight_map


@contextmanager
def for_transformers(folder: Path) -> Iterator[Path]:
    """Give a folder from which transformers reads a checkpoint's weights: it insists on an index with `metadata`."""
    index = folder / INDEX_FILE
    try:
        if (folder / WEIGHTS_FILE).is_file() or isinstance(read_json(index).get("metadata"), dict):
            yield folder
            return
        with TemporaryDirectory() as place:
            weight_map = {name: str(folder.absolute() / shard) for name, shard in read_weight_map(index).items()}
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (Path(place) / INDEX_FILE).write_text(text, encoding="utf-8")
            yield Path(place)
    except SafetensorError as error:  # transformers 4.54 with all of a model on the disk, say
        raise ValueError(
            f"{folder}: transformers could not place the weights ({error!s:.200}). Where `device_map` or `max_memory` "
            "leaves nothing of the model in memory, leave a part of it."
        ) from error
