"""Which model made some vectors, told by the content of its files rather than by its name."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..files.hashes import hash_file
from .manifest import Settings

BLOB_NAME = re.compile("[0-9a-f]{64}")  # the Hub's cache names a large file by its SHA-256
SHARED_BY_BOTH_SIDES = ("weights_sha256", "adapter_sha256", "hidden_size", "vocab_size", "prompts")
SHARED_OPTIONS = ("normalize", "num_denoise_steps")


def describe_model(model: Any, is_query: bool, dtype: str, options: dict[str, Any] | None = None) -> Settings:
    """Return the settings of a store of this model's vectors.

    Args:
        model: from `AutoModel.from_pretrained`.
        is_query: the side.
        dtype: of the stored vectors, one of `manifest.STORE_DTYPES`.
        options: `sparse_top_k` and others that change the vectors; recorded as they are.

    Raises:
        FileNotFoundError: the model's files are no longer where it was loaded from.
        ValueError: the model does not know where it was loaded from.
    """
    config, loaded_from = model.config, getattr(model, "loaded_from", None)
    if loaded_from is None:
        raise ValueError(
            f"{config.name_or_path!r} does not say which files it was made from. Load it with "
            "AutoModel.from_pretrained; a release that an earlier version built brings that version's code: build it "
            "again with publish.py."
        )
    given = dict(options or {})
    top_k = given.pop("sparse_top_k", None) or config.sparse_top_k
    return Settings(
        model=str(config.name_or_path),
        revision=_commit(loaded_from.release),
        weights_sha256=hash_files(loaded_from.weights),
        adapter_sha256=None if loaded_from.adapter is None else hash_files(loaded_from.adapter),
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
            **given,
        },
        library_versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "diffretriever": __version__,
        },
    )


def check_searchable(passages: Settings, queries: Settings, name: str) -> None:
    """Refuse queries that another model, adapter or prompt made than the passages.

    Args:
        passages: the passage store's manifest.
        queries: the query store's manifest, or `describe_model` of the model that encodes the queries.
        name: of the passage store, for messages.

    Raises:
        ValueError: the message names each difference.
    """
    pairs = [(field, getattr(passages, field), getattr(queries, field)) for field in SHARED_BY_BOTH_SIDES]
    pairs += [(field, passages.options.get(field), queries.options.get(field)) for field in SHARED_OPTIONS]
    differences = [f"{field}: {mine!r:.200} and {theirs!r:.200}" for field, mine, theirs in pairs if mine != theirs]
    if differences:
        raise ValueError(
            f"{name}: its passages were encoded with {passages.model!r}, the queries with {queries.model!r}, and they "
            f"differ in {'; '.join(differences)}. Encode both with one model."
        )


def hash_files(folder: Path) -> str:
    """Return one hash over the names and contents of a folder's safetensors files.

    Raises:
        FileNotFoundError: it holds none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors files; the model's weights are no longer there.")
    with ThreadPoolExecutor(4) as workers:
        hashes = list(workers.map(_content_hash, files))
    lines = [f"{file.name} {digest}" for file, digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _content_hash(file: Path) -> str:
    real = file.resolve()
    if BLOB_NAME.fullmatch(real.name) and _in_hub_cache(file, real):
        return real.name
    status = real.stat()
    return _hash_once(real, status.st_size, status.st_mtime_ns)


def _in_hub_cache(file: Path, blob: Path) -> bool:
    """Return whether a file is a link of the Hub's cache, from models--…/snapshots/COMMIT/… to models--…/blobs."""
    place = blob.parent.parent
    return place.name.startswith("models--") and blob.parent.name == "blobs" and place / "snapshots" in file.parents


@cache
def _hash_once(file: Path, size: int, changed: int) -> str:
    """Hash a file that a process asks for again and again; `size` and `changed` tell whether it is still the same."""
    return hash_file(file)


def _commit(folder: Path) -> str | None:
    """Return the commit on the Hub whose files a folder of the Hub's cache holds; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None
