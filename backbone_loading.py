"""Backbones in their original on-disk formats: LLaDA is a Llama, Dream is a Qwen2, under names of their own."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
BACKBONE_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]  # no code, no pickles
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
CHECKED_ELEMENTS = 4 * 1024 * 1024  # weights looked at together for NaN
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# LLaDA's module names and ours (LlamaModel's), and Dream's and ours (Qwen2Model's). One regex group a pattern:
# transformers 5 takes a second one literally. The head's pattern is anchored apart from the blocks' `ff_out`.
NAME_PATTERNS: dict[str, dict[str, str]] = {
    "llada": {
        r"^model\.transformer\.wte\b": "backbone.embed_tokens",
        r"^model\.transformer\.ln_f\b": "backbone.norm",
        r"^model\.transformer\.ff_out\b": "lm_head",
        r"^model\.transformer\.blocks\.(\d+)\.attn_norm\b": r"backbone.layers.\1.input_layernorm",
        r"^model\.transformer\.blocks\.(\d+)\.q_proj\b": r"backbone.layers.\1.self_attn.q_proj",
        r"^model\.transformer\.blocks\.(\d+)\.k_proj\b": r"backbone.layers.\1.self_attn.k_proj",
        r"^model\.transformer\.blocks\.(\d+)\.v_proj\b": r"backbone.layers.\1.self_attn.v_proj",
        r"^model\.transformer\.blocks\.(\d+)\.attn_out\b": r"backbone.layers.\1.self_attn.o_proj",
        r"^model\.transformer\.blocks\.(\d+)\.ff_norm\b": r"backbone.layers.\1.post_attention_layernorm",
        r"^model\.transformer\.blocks\.(\d+)\.ff_proj\b": r"backbone.layers.\1.mlp.gate_proj",
        r"^model\.transformer\.blocks\.(\d+)\.up_proj\b": r"backbone.layers.\1.mlp.up_proj",
        r"^model\.transformer\.blocks\.(\d+)\.ff_out\b": r"backbone.layers.\1.mlp.down_proj",
    },
    "dream": {r"^model\.": "backbone."},
}

# What an original config.json must say where a plain Llama or Qwen2 has no such switch.
FIXED_FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "llada": {
        "activation_type": ("silu",),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "bias_for_layer_norm": (False, None),
        "block_group_size": (1, None),
        "block_type": ("llama",),
        "clip_qkv": (None,),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "input_emb_norm": (False,),
        "layer_norm_type": ("rms",),
        "multi_query_attention": (False, None),
        "rope": (True,),
        "rope_full_precision": (True, None),
        "rope_scaling": (None,),
        "scale_logits": (False,),
        "weight_tying": (False,),
    },
    "dream": {
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "tie_word_embeddings": (False,),
        "use_sliding_window": (False, None),
    },
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
    "dream": {
        name: name
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
        )
    },
}


def our_name(backbone_type: str, original: str) -> str:
    """Translate a parameter's or module's original name.

    >>> our_name("llada", "model.transformer.blocks.3.ff_out.weight")
    'backbone.layers.3.mlp.down_proj.weight'
    >>> our_name("llada", "model.transformer.ff_out.weight")
    'lm_head.weight'
    """
    for pattern, replacement in NAME_PATTERNS[backbone_type].items():
        name, count = re.subn(pattern, replacement, original)
        if count:
            return name
    return original


def original_name(backbone_type: str, ours: str) -> str:
    """Translate one of our names back into the backbone's own.

    >>> original_name("llada", "backbone.layers.3.mlp.down_proj")
    'model.transformer.blocks.3.ff_out'
    """
    for pattern, replacement in NAME_PATTERNS[backbone_type].items():
        back = "^" + re.escape(replacement).replace(r"\\1", r"(\d+)") + ("" if replacement.endswith(".") else r"\b")
        template = pattern.removeprefix("^").removesuffix(r"\b").replace(r"(\d+)", r"\1").replace(r"\.", ".")
        name, count = re.subn(back, template, ours)
        if count:
            return name
    return ours


def resolve_folder(
    name: str, beside: Path | None, revision: str | None, hub_options: Mapping[str, Any], patterns: list[str]
) -> Path:
    """Return the local folder, absolute, of a Hub id or path; what is on the Hub is fetched into the cache.

    Args:
        name: a folder (a relative one starts at `beside`) or a Hub id.
        beside: the folder of the release that names it.
        revision: commit, tag or branch on the Hub.
        hub_options: cache_dir, token, local_files_only, force_download.
        patterns: which files to fetch.

    Raises:
        FileNotFoundError: a path that is not there.
        OSError: the Hub or its cache does not have it.
    """
    folder = Path(name).expanduser() if beside is None else beside / Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(
            f"{folder} is not there, and {name!r} is no Hub id (organisation/name). If it was moved, pass its new "
            "place as `base_model_name_or_path` (backbone) or `adapter_name_or_path` (adapter)."
        )
    options = dict(hub_options)
    if HF_HUB_OFFLINE:  # huggingface_hub 1.x else wants a listing of the files, which no old cache has
        options["local_files_only"] = True
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **options)).resolve()
    except (OSError, ValueError) as error:  # huggingface_hub's errors are one or the other
        wanted = f"{name} (revision {revision})" if revision else name
        raise OSError(
            f"{wanted} could not be had from the Hub nor from its cache; {folder} is no folder either. Check the name, "
            f"fetch it where there is a network (hf download {name}), or give a local folder. ({error})"
        ) from error


def find_weights(config: Any, folder: Path, hub_options: Mapping[str, Any]) -> tuple[Path, str | None]:
    """Find a release's weights: its own merged ones, or its backbone's, whose config is then read into `config`.

    Args:
        config: the release's `DiffRetrieverConfig`.
        folder: the release's folder.
        hub_options: as for `resolve_folder`.

    Returns:
        The folder of the weights, and the backbone type whose parameter names they have; None for ours.

    Raises:
        ValueError: an option that merged weights cannot take, or no weights anywhere.
    """
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        for name in ("base_model_name_or_path", "backbone_type", "adapter_name_or_path"):
            if name in config.overrides:
                raise ValueError(
                    f"{folder} holds its own merged weights, so `{name}` cannot be set; load a release with an adapter."
                )
        if config.backbone_type is None or config.backbone_config is None:
            raise ValueError(f"{folder / 'config.json'} lacks `backbone_type` or `backbone_config` for its weights.")
        weights, names_of = folder, None
    elif config.base_model_name_or_path is None:
        raise ValueError(f"{folder / 'config.json'} names no `base_model_name_or_path`, and {folder} has no weights.")
    else:
        beside = None if "base_model_name_or_path" in config.overrides else folder
        base, revision = str(config.base_model_name_or_path), config.base_model_revision
        weights = resolve_folder(base, beside, revision, hub_options, BACKBONE_FILES)
        config.backbone_type, config.backbone_config = read_backbone_config(weights, config.backbone_type)
        names_of = config.backbone_type
    check_no_adapter(weights)
    return weights, names_of


def check_no_adapter(weights: Path) -> None:
    """Raise ValueError for a folder of weights with an adapter in it, whose base transformers would load instead."""
    if (weights / "adapter_config.json").is_file():
        raise ValueError(
            f"{weights / 'adapter_config.json'} would make transformers load another model than these weights; move "
            "the adapter out, and name its folder as `adapter_name_or_path`."
        )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, or say which file is wrong."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def read_backbone_config(folder: Path, backbone_type: str | None = None) -> tuple[str, LlamaConfig | Qwen2Config]:
    """Read a backbone's original config.json as transformers' own config.

    Args:
        folder: the backbone's folder.
        backbone_type: what the release says it is; None accepts either.

    Returns:
        "llada" or "dream", and the Llama or Qwen2 config.

    Raises:
        ValueError: another model type, a missing field, or a switch that a Llama or Qwen2 does not have.
    """
    file = folder / "config.json"
    raw = read_json(file)
    found = str(raw.get("model_type", "")).lower()
    if found not in NAME_PATTERNS:
        raise ValueError(
            f'{file}: model_type is {raw.get("model_type")!r}; DiffRetriever reads "llada" and "Dream" backbones.'
        )
    if backbone_type not in (None, found):
        raise ValueError(f"{file} is a {found} backbone, but the release's `backbone_type` is {backbone_type!r}.")
    for field, allowed in FIXED_FIELDS[found].items():
        if raw.get(field, allowed[0]) not in allowed:
            raise ValueError(f"{file}: `{field}` is {raw[field]!r}; only {allowed[0]!r} is supported.")
    if found == "llada":
        raw = _with_llada_defaults(raw)
    missing = [field for field in CONFIG_FIELDS[found].values() if raw.get(field) is None]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}.")
    for field in CONFIG_FIELDS[found].values():
        kind, wanted = (int, "whole") if field not in ("rms_norm_eps", "rope_theta") else ((int, float), "positive")
        if isinstance(raw[field], bool) or not isinstance(raw[field], kind) or raw[field] <= 0:
            raise ValueError(f"{file}: `{field}` must be a {wanted} number above 0, got {raw[field]!r}.")
    values = {ours: raw[theirs] for ours, theirs in CONFIG_FIELDS[found].items()}
    # Ids stay unset: with a pad id, the embedding would treat the end-of-text token's row as padding.
    values["mask_token_id"] = raw.get("mask_token_id")
    values.update(pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, use_cache=False)
    return found, LlamaConfig(**values) if found == "llada" else Qwen2Config(**values)


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
        header = {name: entry for name, entry in json.loads(header_bytes).items() if name != "__metadata__"}
        expected = 8 + length + _data_bytes(header)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        what = _not_safetensors(start)
        raise ValueError(f"{file} is no whole safetensors file ({what}; {size} bytes). Fetch it again.") from error
    if size != expected:
        raise ValueError(f"{file} has {size} bytes, its header promises {expected}; it is truncated or corrupt.")
    return header


def _data_bytes(header: dict[str, dict[str, Any]]) -> int:
    """Return the size of the data that a header describes: tensors end to end, each as large as its shape says."""
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        begin, stop = entry["data_offsets"]
        width = ITEM_BYTES.get(entry["dtype"], 0)
        if begin != end or (width and stop - begin != width * math.prod(entry["shape"])):
            raise ValueError("offsets, shapes and dtypes do not fit together")
        end = stop
    return end


def _not_safetensors(start: bytes) -> str:
    if start.startswith(b"version "):
        return "it is a git-lfs pointer, not the weights"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "it is a pickled torch file, which is never loaded"
    return "its header is truncated or corrupt"


def read_headers(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Read the headers of a checkpoint's weight files, one or many shards.

    Returns:
        {original name: (file, header entry)}

    Raises:
        FileNotFoundError, ValueError: no weights, only pickled ones, a missing or broken shard.
    """
    if not (folder / INDEX_FILE).is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED_SUFFIXES)
            hint = f" Pickled files ({', '.join(pickled)}) are never loaded; convert them." if pickled else ""
            raise FileNotFoundError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}.{hint}")
        file = folder / WEIGHTS_FILE
        return {name: (file, entry) for name, entry in read_header(file).items()}
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{folder / INDEX_FILE} must hold `weight_map`, an object from weight names to file names.")
    headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
    entries: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ValueError(f"{folder / INDEX_FILE} places {name} in {shard}, which does not hold it.")
        entries[name] = (folder / shard, headers[shard][name])
    for shard, header in headers.items():
        for name in header.keys() - weight_map.keys():
            raise ValueError(f"{folder / shard} holds {name}, which {INDEX_FILE} does not list.")
    return entries


def audit_weights(folder: Path, backbone_type: str | None, expected: Mapping[str, Sequence[int]]) -> str:
    """Check every key and shape of a checkpoint before any weight is read.

    Args:
        folder: the checkpoint.
        backbone_type: whose names it uses; None for ours (a self-contained release).
        expected: {our parameter name: shape}.

    Returns:
        The checkpoint's dtype as safetensors names it ("BF16", "F32", …).

    Raises:
        ValueError: missing or unexpected keys, or another shape; the message names file, key and shapes.
    """
    found: dict[str, tuple[Path, str, dict[str, Any]]] = {}
    for name, (file, entry) in read_headers(folder).items():
        ours = our_name(backbone_type, name) if backbone_type else name
        if ours in found:
            raise ValueError(f"{file}: {name} and {found[ours][1]} are the same weight under two names.")
        found[ours] = (file, name, entry)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        originals = [original_name(backbone_type, name) if backbone_type else name for name in missing]
        raise ValueError(f"{folder} lacks {len(missing)} of {len(expected)} weights: {_some(originals)}.")
    unexpected = [found[name][1] for name in sorted(found.keys() - expected.keys())]
    if unexpected:
        raise ValueError(
            f"{folder} holds {len(unexpected)} weights that its config has no place for: {_some(unexpected)}."
        )
    for ours, shape in expected.items():
        file, name, entry = found[ours]
        if tuple(entry["shape"]) != tuple(shape):
            raise ValueError(f"{file}: {name} has shape {entry['shape']}; config.json asks for {list(shape)}.")
        if entry["dtype"] not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{file}: {name} is stored as {entry['dtype']}; expected BF16, F16 or F32.")
    return next(iter(found.values()))[2]["dtype"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer so that every supported transformers can read it; 5.x alone knows its own class name."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = read_json(file)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):  # 4.54 wants an object there, and takes a list here
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("auto_map", "backend", "is_local", "local_files_only", "name_or_path"):  # code, and where it lay
        settings.pop(name, None)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    file = folder / "tokenizer.json"  # half the size without the white space
    file.write_text(json.dumps(read_json(file), ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def load_tokenizer(folders: list[Path]) -> Any:
    """Load the fast tokenizer of the first folder that has one; code in the folder is never run.

    Raises:
        FileNotFoundError: no folder has tokenizer files.
    """
    for folder in folders:
        library: Any = transformers  # Dream's tokenizer: Qwen2's rules, special tokens of its own
        if (folder / "tokenizer.json").is_file():
            loader = PreTrainedTokenizerFast
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            loader = library.Qwen2TokenizerFast
        else:
            continue
        try:
            return loader.from_pretrained(folder)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ValueError(f"{folder}: its tokenizer files cannot be read: {error}") from error
    places = " or ".join(map(str, folders))
    raise FileNotFoundError(f"No tokenizer.json, nor vocab.json with merges.txt, in {places}.")


def dtype_argument() -> str:
    """Return what transformers calls the dtype argument; it was renamed in 4.56."""
    major, minor = map(int, transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def choose_dtype(kwargs: dict[str, Any], stored: str) -> torch.dtype:
    """Return the dtype that the caller asked for, else the one that suits where the model will run."""
    asked = [kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs]
    asked = [dtype for dtype in asked if dtype is not None]
    if asked and asked[0] == "auto":
        return {"F32": torch.float32, "F16": torch.float16}.get(stored, torch.bfloat16)
    if asked:
        dtype = getattr(torch, asked[0].removeprefix("torch."), None) if isinstance(asked[0], str) else asked[0]
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f'`dtype` must be a floating-point torch.dtype, its name or "auto", got {asked[0]!r}.')
        return dtype
    places = kwargs.get("device_map")
    places = set(map(str, places.values())) if isinstance(places, dict) else {str(places)}
    on_cpu = places == {"cpu"} or not (torch.cuda.is_available() or torch.accelerator.is_available())
    fast_cpu = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return torch.float32 if on_cpu and not fast_cpu else torch.bfloat16


def is_finite(weight: torch.Tensor) -> bool:
    """Whether a weight holds no NaN or infinity; packed and offloaded ones are passed over."""
    if weight.is_meta or not weight.is_floating_point():
        return True
    rows = max(1, CHECKED_ELEMENTS * len(weight) // max(1, weight.numel()))  # a CPU's sum makes a float32 copy
    return all(bool(part.sum(dtype=torch.float32).isfinite()) for part in weight.detach().split(rows))


def check_finite(model: Any, folder: Path, original: Callable[[str], str]) -> None:
    """Raise ValueError for weights that hold NaN or infinity; `original` gives a parameter's name in the folder."""
    broken = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if broken:
        names = ", ".join(map(original, broken[:5]))
        raise ValueError(f"{folder}: {names} hold NaN or infinite values (as {model.dtype}).")


def not_finite(model: Any, values: torch.Tensor) -> str:
    """Say which rows of [B, …] are not finite, and why.

    Args:
        model: that made the values.
        values: what it returned for B texts.
    """
    rows = torch.isfinite(values).flatten(1).all(dim=1).logical_not().nonzero().flatten().tolist()
    broken = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    cause = f"the weights are finite, so {model.dtype} overflowed; load with dtype=torch.float32 or torch.bfloat16"
    if broken:
        cause = f"the weights {', '.join(broken[:5])} hold NaN or infinite values"
    return f"The vectors of rows {rows[:10]} are not finite: {cause}."
