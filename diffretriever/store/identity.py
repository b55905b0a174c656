"""Which model made some vectors, told by the content of its files rather than by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants

from .. import __version__
from ..files.hashes import hash_once
from ..model.adapter_loading import WEIGHTS_FILE
from ..model.checked_files import read_headers
from ..model.configuration_diffretriever import paper_prompt
from .differences import MODEL_OPTIONS, SHA256, tell_apart
from .manifest import Settings
from .model_parts import model_parts

SIDES = {"query": "queries", "passage": "passages"}
# What passages and the queries that search them must have in common.
SHARED = ("weights_sha256", "adapter_sha256", "hidden_size", "vocab_size", "prompts", "max_length", "model_parts")
# What each field that may be chosen for a run decides; chosen, it is no trait of the model.
CHOICES = {
    "max_length": ("max_length", "model_parts.text_tokens"),
    "query_length": ("max_length", "model_parts.text_tokens.query"),
    "passage_length": ("max_length", "model_parts.text_tokens.passage"),
    "num_query_masks": ("model_parts.num_masks.query",),
    "num_passage_masks": ("model_parts.num_masks.passage",),
}


def describe_model(model: Any, is_query: bool, dtype: str, options: dict[str, Any] | None = None) -> Settings:
    """Return the settings of a store of this model's vectors.

    Args:
        model: from `AutoModel.from_pretrained`, or one that runs elsewhere and has a method `describe`, which is asked.
        is_query: the side.
        dtype: of the stored vectors, one of `manifest.STORE_DTYPES`.
        options: `sparse_top_k` and others that change the vectors; recorded as they are.

    Raises:
        FileNotFoundError: the model's files are no longer where it was loaded from.
        ValueError: the model does not know where it was loaded from.
    """
    if hasattr(model, "describe"):
        told: Settings = model.describe(is_query, dtype, options or {})
        return told
    config, loaded_from = model.config, getattr(model, "loaded_from", None)
    if loaded_from is None:
        raise ValueError(
            f"{config.name_or_path!r} does not say which files it was made from. Load it with "
            "AutoModel.from_pretrained; a release that an earlier version built brings that version's code: build it "
            "again with publish.py."
        )
    given = dict(options or {})
    table = getattr(config, "query_budget_table", None)  # of queries alone: passages do not depend on it
    given |= {"query_budget_table": table} if is_query and table is not None else {}
    top_k = given.pop("sparse_top_k", None) or config.sparse_top_k
    return Settings(
        model=str(config.name_or_path),
        revision=_commit(loaded_from.release),
        weights_sha256=hash_weights(loaded_from.weights),
        adapter_sha256=None if loaded_from.adapter is None else hash_files([loaded_from.adapter / WEIGHTS_FILE]),
        side="query" if is_query else "passage",
        num_masks=config.num_masks(is_query),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        sparse_top_k=min(top_k, config.vocab_size),
        dtype=dtype,
        prompts={side: dict(config.prompt(side == "query")) for side in ("query", "passage")},
        max_length=config.max_length,
        options={
            "normalize": config.normalize,
            "num_denoise_steps": config.num_denoise_steps,
            "model_dtype": str(model.dtype).removeprefix("torch."),
            "chosen": sorted(CHOICES.keys() & set(getattr(config, "overrides", ()))),
            **given,
        },
        library_versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "diffretriever": __version__,
        },
        model_parts=model_parts(model),
    )


def check_searchable(passages: Settings, queries: Settings, name: str) -> None:
    """Refuse queries that another model made than the passages, and sides that are swapped.

    Budgets and lengths that were chosen when one of them was encoded (`--num-query-masks`, `--max-length`) may differ.

    Args:
        passages: the passage store's manifest.
        queries: the query store's manifest, or `describe_model` of the model that encodes the queries.
        name: of the passage store, for messages.

    Raises:
        ValueError: the message names each difference.
    """
    check_sides(passages, queries, name)
    found = _without(passages.differences(queries), _chosen_fields(passages, queries))
    differences = {
        field: values for field, values in found.items() if field.partition(".")[0] in SHARED or field in MODEL_OPTIONS
    }
    if differences:
        raise ValueError(
            f"{name}: its passages were {tell_apart(passages, queries, differences)}. Encode both with one model."
        )


def differences_of_store(there: Settings, ours: Settings) -> dict[str, tuple[Any, Any]]:
    """Return `there.differences(ours)` without what was chosen for the other side: it changes no vector of this one.

    Args:
        there: a store's settings.
        ours: those of a run that would go on with it.
    """
    other = "passage" if there.side == "query" else "query"
    chosen = {field for field in _chosen_fields(there, ours) if field.endswith(f".{other}")}
    return _without(there.differences(ours), chosen)


def _chosen_fields(one: Settings, other: Settings) -> set[str]:
    """Return what budgets and lengths decide that were chosen for a run of either."""
    # a store that does not record its model's parts does not say either whether its length was chosen
    choices = [settings.options.get("chosen", ["max_length"]) for settings in (one, other)]
    choices = [chosen for chosen in choices if isinstance(chosen, list)]
    fields = {
        field for choice, fields in CHOICES.items() if any(choice in chosen for chosen in choices) for field in fields
    }
    for side in ("query", "passage"):
        if f"model_parts.num_masks.{side}" in fields and _prompts_follow(one, other, side):
            fields |= {f"prompts.{side}", f"model_parts.chat_template.{side}"}
            if one.prompts[side] != other.prompts[side]:  # what they leave of max_length follows, too
                fields.add(f"model_parts.text_tokens.{side}")
    return fields


def _without(differences: dict[str, tuple[Any, Any]], fields: set[str]) -> dict[str, tuple[Any, Any]]:
    """Return the differences that lie in none of the fields."""
    return {
        name: values
        for name, values in differences.items()
        if not any(f"{name}.".startswith(f"{field}.") for field in fields)
    }


def _prompts_follow(one: Settings, other: Settings, side: str) -> bool:
    """Return whether both have the paper's prompt for their K of a side, which follows from it."""
    for settings in (one, other):
        counts = settings.model_parts.get("num_masks")
        k = counts.get(side) if isinstance(counts, dict) else None
        if not isinstance(k, int) or settings.prompts.get(side) != paper_prompt(side, k):
            return False
    return True


def check_sides(passages: Any, queries: Any, name: str) -> None:
    """Refuse queries in the passages' place, and passages in the queries'.

    Args:
        passages, queries: settings, stores, engines or outputs of `encode_texts`; None, or what does not know its side,
            is not checked.
        name: of the passages, for messages.

    Raises:
        ValueError: a side is the other's.
    """
    for texts, where, side in ((passages, name, "passage"), (queries, "the queries", "query")):
        known = getattr(texts, "manifest", None) or getattr(texts, "settings", None) or texts
        found = getattr(known, "side", None)
        if found in SIDES and found != side:
            where = getattr(texts, "folder", where)
            raise ValueError(
                f"{where}: these are vectors of {SIDES[found]}, where {SIDES[side]} belong. Encode queries with "
                "is_query=True (`diffretriever encode --queries`) and passages without; to search, give the passages' "
                "as the store and the queries' as the queries."
            )


def hash_weights(folder: Path) -> str:
    """Return one hash over the names and contents of the files that hold a model's weights.

    Raises:
        FileNotFoundError, ValueError: the weights are no longer there, or broken.
    """
    return hash_files(sorted({file for file, _ in read_headers(folder).values()}))


def hash_files(files: Sequence[Path]) -> str:
    """Return one hash over the names and contents of files.

    Raises:
        FileNotFoundError: one is no longer there.
    """
    with ThreadPoolExecutor(4) as workers:
        hashes = list(workers.map(_content_hash, files))
    lines = [f"{file.name} {digest}" for file, digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _content_hash(file: Path) -> str:
    real = file.resolve(strict=True)
    if SHA256.fullmatch(real.name) and _in_hub_cache(file, real):  # the cache names a large file by its SHA-256
        return real.name
    return hash_once(real)


def _in_hub_cache(file: Path, blob: Path) -> bool:
    """Return whether a file is a link of the Hub's cache, from models--…/snapshots/COMMIT/… to models--…/blobs."""
    place = blob.parent.parent
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return (place.parent, blob.parent.name) == (cache, "blobs") and place / "snapshots" in file.parent.resolve().parents


def _commit(folder: Path) -> str | None:
    """Return the commit on the Hub whose files a folder of the Hub's cache holds; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None
