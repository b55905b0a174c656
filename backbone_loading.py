"""Backbones in their original on-disk formats: LLaDA is a Llama and Dream a Qwen2, under names of their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from math import isfinite
from pathlib import Path
from reprlib import repr as shortened
from threading import RLock
from typing import Any, ParamSpec, TypeVar

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import PreTrainedTokenizerFast

Given = ParamSpec("Given")
Loaded = TypeVar("Loaded")
BACKBONE_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]  # no code, no pickles
TOKENIZER_FILES = ("*token*.json", "vocab.json", "merges.txt", "chat_template*", "additional_chat_templates/*")
LARGEST_TOKENIZER = 32 * 1024 * 1024  # bytes
LARGEST_VOCABULARY = 1 << 20  # four times Gemma's
SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
LONGEST_SPECIAL_TOKEN = 256  # characters
# What the rules of tokenizer.json may do to a text; those of Llama, Qwen2, LLaDA and Dream make it no longer.
GROWING_FIELDS = ("content", "prepend", "continuing_subword_prefix", "end_of_word_suffix")
LARGEST_GROWTH = 16
MOST_RULES = 100
LONGEST_WORD = 1000  # characters, of WordPiece, which takes their square
CHECKED_ELEMENTS = 4 * 1024 * 1024  # weights looked at together for NaN
# One for all threads and releases: with code of its own, each release has this module once more.
_LOADING: Any = vars(torch).setdefault("_diffretriever_loading", RLock())

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
    "llama": {r"^model\.": "backbone."},
    "qwen2": {r"^model\.": "backbone."},
}


def one_at_a_time(load: Callable[Given, Loaded]) -> Callable[Given, Loaded]:
    """Let one thread load at a time: transformers changes torch's default dtype meanwhile, and how modules are made."""

    @wraps(load)
    def locked(*args: Given.args, **kwargs: Given.kwargs) -> Loaded:
        with _LOADING:
            return load(*args, **kwargs)

    return locked


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
    try:
        folder = (beside or Path()) / Path(name).expanduser()
        if folder.is_dir():
            return folder.resolve()
    except (OSError, RuntimeError) as error:  # a name too long; no such user's home
        raise FileNotFoundError(f"{name:.200} is no folder: {error!s:.200}.") from error
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


def find_weights(config: Any, folder: Path, merged: bool, hub_options: Mapping[str, Any]) -> Path:
    """Find the folder of a release's weights: its own, or its backbone's.

    Args:
        config: the release's `DiffRetrieverConfig`.
        folder: the release's folder.
        merged: whether it holds merged weights of its own.
        hub_options: as for `resolve_folder`.

    Raises:
        FileNotFoundError: the backbone is not there; for one that a command fetches, with that command.
        ValueError: an option that merged weights cannot take, no weights anywhere, or others than were fetched.
    """
    if merged:
        for name in ("base_model_name_or_path", "backbone_type", "adapter_name_or_path"):
            if name in config.overrides:
                raise ValueError(
                    f"{folder} holds its own merged weights, so `{name}` cannot be set; load a release with an adapter."
                )
        if config.backbone_type is None or config.backbone_config is None:
            raise ValueError(f"{folder / 'config.json'} lacks `backbone_type` or `backbone_config` for its weights.")
        weights = folder
    elif config.base_model_name_or_path is None:
        raise ValueError(f"{folder / 'config.json'} names no `base_model_name_or_path`, and {folder} has no weights.")
    else:
        named_by_caller = "base_model_name_or_path" in config.overrides
        fetched = None if named_by_caller else config.fetched_backbone
        base, revision = str(config.base_model_name_or_path), config.base_model_revision
        if fetched is not None:
            _check_fetched(folder / base, fetched)
        beside = None if named_by_caller else folder
        weights = resolve_folder(base, beside, revision, hub_options, BACKBONE_FILES)
    check_no_adapter(weights)
    return weights


def _check_fetched(weights: Path, fetched: Mapping[str, str]) -> None:
    """Refuse a backbone that is not there, or holds other weights than the release's, with the command that helps."""
    weights = Path(os.path.normpath(weights))
    place = shlex.quote(str(weights))
    file = weights / "model.safetensors"
    command = f"diffretriever fetch-backbone {fetched['name']} --output {{}}"
    command += " --from hub" if fetched["origin"].startswith("https://huggingface.co/") else ""
    if not weights.is_dir():
        raise FileNotFoundError(
            f"The backbone {fetched['name']} is not in {weights} yet. Fetch it: {command.format(place)}"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there. Remove {weights}, and fetch it: {command.format(place)}")
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != fetched["sha256"]:
        raise ValueError(
            f"{file} holds other weights than the release's (SHA-256 {digest.hexdigest()[:12]}…, expected "
            f"{fetched['sha256'][:12]}…). Fetch them into another folder, {command.format('FOLDER')}, and pass it as "
            "`base_model_name_or_path`; a folder that is passed so is taken as it is."
        )


def check_no_adapter(weights: Path) -> None:
    """Raise ValueError for a folder of weights with an adapter in it, whose base transformers would load instead."""
    if (weights / "adapter_config.json").is_file():
        raise ValueError(
            f"{weights / 'adapter_config.json'} would make transformers load another model than these weights; move "
            "the adapter out, and name its folder as `adapter_name_or_path`."
        )


def audit_weights(
    folder: Path,
    headers: Mapping[str, tuple[Path, Mapping[str, Any]]],
    backbone_type: str | None,
    expected: Mapping[str, Sequence[int]],
) -> str:
    """Check every key and shape of a checkpoint before any weight is read.

    Args:
        folder: the checkpoint.
        headers: what its files hold: {original name: (file, {"dtype", "shape"})}.
        backbone_type: whose names it uses; None for ours (a self-contained release).
        expected: {our parameter name: shape}, from `parameter_shapes`.

    Returns:
        The checkpoint's dtype as safetensors names it ("BF16", "F32", …).

    Raises:
        ValueError: missing or unexpected keys, or another shape; the message names file, key and shapes.
    """
    found: dict[str, tuple[Path, str, Mapping[str, Any]]] = {}
    for name, (file, entry) in headers.items():
        ours = our_name(backbone_type, name) if backbone_type else name
        if ours in found:
            raise ValueError(f"{file}: {name:.200} and {found[ours][1]:.200} are the same weight under two names.")
        found[ours] = (file, name, entry)
    if "lm_head.weight" not in expected:  # the embedding serves as head, whatever the file has for one
        found.pop("lm_head.weight", None)
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
            raise ValueError(f"{file}: {name} is stored as {shortened(entry['dtype'])}; expected BF16, F16 or F32.")
    return next(iter(found.values()))[2]["dtype"]


def _some(names: list[str]) -> str:
    return ", ".join(name[:200] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer so that every supported transformers can read it; 5.x alone knows its own class name."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):  # 4.54 wants an object there, and takes a list here
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("auto_map", "backend", "is_local", "local_files_only", "name_or_path"):  # code, and where it lay
        settings.pop(name, None)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    file = folder / "tokenizer.json"  # half the size without the white space
    rules = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(rules, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def load_tokenizer(folders: list[Path], vocab_size: int = LARGEST_VOCABULARY) -> Any:
    """Load the fast tokenizer of the first folder that has one; code in the folder is never run.

    Args:
        folders: where to look, in this order.
        vocab_size: V, the rows of the backbone's embedding, if it is known.

    Raises:
        FileNotFoundError: no folder has tokenizer files.
        ValueError: they are broken or too large, or have ids that the backbone has not.
    """
    for folder in folders:
        library: Any = transformers  # Dream's tokenizer: Qwen2's rules, special tokens of its own
        if (folder / "tokenizer.json").is_file():
            loader = PreTrainedTokenizerFast
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            loader = library.Qwen2TokenizerFast
        else:
            continue
        for file in (file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            if file.stat().st_size > LARGEST_TOKENIZER:
                raise ValueError(
                    f"{file} has {file.stat().st_size} bytes; a tokenizer's have at most {LARGEST_TOKENIZER}."
                )
        _check_tokenizer_files(folder)
        try:
            tokenizer = loader.from_pretrained(folder)
            largest = max(tokenizer.get_vocab().values(), default=0)
        except BaseException as error:  # the tokenizers library raises plain Exceptions, and panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{folder}: its tokenizer files cannot be read: {error!s:.300}") from error
        if largest >= vocab_size:
            raise ValueError(f"{folder}: its tokenizer has the token id {largest}, of a vocabulary of {vocab_size}.")
        return tokenizer
    places = " or ".join(map(str, folders))
    raise FileNotFoundError(f"No tokenizer.json, nor vocab.json with merges.txt, in {places}.")


def _check_tokenizer_files(folder: Path) -> None:
    """Raise ValueError for tokenizer files by which a short text would take very long, or become a very long one."""
    for name in SPECIAL_TOKEN_FILES:
        try:
            content = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):  # not there, or for the library to refuse
            continue
        if not isinstance(content, dict):
            continue
        whole = name == "tokenizer.json"
        _check_special_tokens(folder / name, content.get("added_tokens") if whole else content)
        if whole:
            for part in ("normalizer", "pre_tokenizer", "decoder", "model"):
                _check_rules(folder / name, part, content.get(part))


def _check_special_tokens(file: Path, content: Any) -> None:
    """Raise ValueError for a long special token: older tokenizers libraries take its length's square of time."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *(item[field] for field in item if field not in ("chat_template", "name_or_path"))]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and len(item) > LONGEST_SPECIAL_TOKEN:
            raise ValueError(
                f"{file} holds a special token of {len(item)} characters, {shortened(item)}; at most "
                f"{LONGEST_SPECIAL_TOKEN} are read."
            )


def _check_rules(file: Path, part: str, rules: Any) -> None:
    """Raise ValueError for rules of tokenizer.json that are too many, or that together make a text too much longer."""
    steps, growth, waiting = 0, 1.0, [rules]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            steps += 1
            growth *= max([1, *(len(item[field]) for field in GROWING_FIELDS if isinstance(item.get(field), str))])
            pattern = item.get("pattern") if item.get("type") == "Replace" else None
            found = pattern.get("String") if isinstance(pattern, dict) else None
            if isinstance(found, str) and isinstance(item.get("content"), str):  # what is found goes
                growth /= max(1, min(len(found), len(item["content"])))
            size = item.get("max_input_chars_per_word")
            if steps > MOST_RULES or growth > LARGEST_GROWTH or (isinstance(size, int) and size > LONGEST_WORD):
                raise ValueError(
                    f"{file}: `{part}` is {shortened(rules)}; at most {MOST_RULES} steps, which together make a text "
                    f"{LARGEST_GROWTH} times longer, and words of {LONGEST_WORD} characters are read."
                )
            waiting += [item[field] for field in item if field not in ("vocab", "merges")]


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
    return torch.float32 if on_cpu and not _multiplies_bfloat16() else torch.bfloat16


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has a unit for it: without one bfloat16 takes twice the time of float32, with one half."""
    units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, unit, bool)() for unit in units)


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


def check_output(model: Any, output: Any) -> Any:
    """Return what a model made of B texts, {name: [B, …]}, or raise ValueError for vectors that are not finite."""
    for name in ("repr_hidden", "sparse_values"):
        values = output.get(name)
        if values is None or isfinite(values.sum().item()):  # in a fiftieth of the time of a look at each
            continue
        if not torch.isfinite(values).all():  # else the sum overflowed
            raise ValueError(not_finite(model, values))
    return output
