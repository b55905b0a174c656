"""Which model made some vectors, told by the content of its files rather than by its name."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from ..files.durable import BLOCK
from .manifest import Settings

COMMIT = re.compile(r"(?<=\.)[0-9a-f]{40}(?=\.)")
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
    """
    config = model.config
    revision = find_revision(model)
    release = _release_folder(config, revision)
    given = dict(options or {})
    top_k = given.pop("sparse_top_k", None) or config.sparse_top_k
    return Settings(
        model=str(config.name_or_path),
        revision=revision,
        weights_sha256=hash_files(_weights_folder(config, release)),
        adapter_sha256=_adapter_hash(config, release),
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
            "diffretriever": _own_version(),
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
    """Return one hash over the names and contents of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors files; the model's weights are no longer there.")
    with ThreadPoolExecutor(4) as workers:
        hashes = list(workers.map(_hash_file, files))
    lines = [f"{file.name} {digest}" for file, digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _hash_file(file: Path) -> str:
    real = file.resolve()
    if BLOB_NAME.fullmatch(real.name):
        return real.name
    digest = hashlib.sha256()
    with real.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def find_revision(model: Any) -> str | None:
    """Return the commit on the Hub that a model was loaded from; None for a folder.

    transformers names the module of a repository's code by the commit; 4.x also keeps it in the config.
    """
    found = COMMIT.search(type(model).__module__)
    return found[0] if found else getattr(model.config, "_commit_hash", None)


def _release_folder(config: Any, revision: str | None) -> Path:
    name = str(config.name_or_path)
    return Path(name) if Path(name).is_dir() else _snapshot(name, revision)


def _weights_folder(config: Any, release: Path) -> Path:
    base = config.base_model_name_or_path
    return release if base is None else _resolve(base, release, config.base_model_revision)


def _adapter_hash(config: Any, release: Path) -> str | None:
    adapter = config.adapter_name_or_path
    return None if adapter is None else hash_files(_resolve(adapter, release, None))


def _resolve(name: str, release: Path, revision: str | None) -> Path:
    """Return the folder that the model was loaded from: inside the release, anywhere else, or the Hub's cache."""
    for folder in (release / name, Path(name)):
        if folder.is_dir():
            return folder
    return _snapshot(name, revision)


def _snapshot(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # the model is loaded, so its files are in the cache

    return Path(snapshot_download(repository, revision=revision, local_files_only=True))


def _own_version() -> str:
    try:
        return importlib.metadata.version("diffretriever")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "source"
