"""What a store says about itself: the model and settings that made it, and its shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files.durable import write_whole
from ..files.hashes import hash_json

MANIFEST_FILE = "manifest.json"
FORMAT = "diffretriever store 1"
STORE_DTYPES = ("float16", "bfloat16", "float32", "int8")
# Recorded, but free to differ between the runs that make one store: they do not change what the vectors mean.
RECORDED_ONLY = ("model", "library_versions", "options.tokens_per_batch")


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest.

    Args:
        file: its name in the store's folder.
        first: position of its first text.
        count: texts in it.
        size: bytes.
        header_sha256: hash of its header, which holds the hash of all other bytes.
        texts_sha256: hash of the ids and texts that it was made from.
    """

    file: str
    first: int
    count: int
    size: int
    header_sha256: str
    texts_sha256: str


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is in a store.

    Args:
        model: the release as the user named it.
        revision: its commit on the Hub, if it came from there.
        weights_sha256: hash over the backbone's weight files.
        adapter_sha256: hash over the adapter's weight files; None without an adapter.
        side: "query" or "passage".
        num_masks: K of this side.
        hidden_size: H.
        vocab_size: V.
        sparse_top_k: T, slots of each sparse vector.
        dtype: of the stored dense vectors, one of STORE_DTYPES.
        prompts: {"query": …, "passage": …}, the texts of the three roles.
        max_length: tokens of prefix, text and suffix.
        options: what else changes the vectors (normalize, num_denoise_steps, content_filter, the model's dtype …).
        library_versions: of torch, transformers and this package when the store was begun.
    """

    model: str
    revision: str | None
    weights_sha256: str
    adapter_sha256: str | None
    side: str
    num_masks: int
    hidden_size: int
    vocab_size: int
    sparse_top_k: int
    dtype: str
    prompts: dict[str, dict[str, str]]
    max_length: int
    options: dict[str, Any] = field(default_factory=dict)
    library_versions: dict[str, str] = field(default_factory=dict)

    def differences(self, other: Settings) -> list[str]:
        """Return one line for each setting in which `other` is not this; [] where they make the same vectors."""
        mine, theirs = (flat(asdict(settings)) for settings in (self, other))
        names = [name for name in {**mine, **theirs} if not is_recorded_only(name)]
        differing = [name for name in names if mine.get(name) != theirs.get(name)]
        if differing and self.model != other.model:
            differing.insert(0, "model")
        return [f"{name}: the store has {mine.get(name)!r}, this run has {theirs.get(name)!r}" for name in differing]


@dataclass(frozen=True)
class Manifest(Settings):
    """Settings and shards of a finished store."""

    shards: tuple[ShardEntry, ...] = ()

    @classmethod
    def of(cls, settings: Settings, shards: Iterable[ShardEntry]) -> Manifest:
        """Return the manifest of a store with these settings and shards."""
        return cls(**{entry.name: getattr(settings, entry.name) for entry in fields(Settings)}, shards=tuple(shards))

    @property
    def count(self) -> int:
        """Texts in the store."""
        return sum(shard.count for shard in self.shards)

    @property
    def settings(self) -> Settings:
        """The settings alone."""
        return Settings(**{entry.name: getattr(self, entry.name) for entry in fields(Settings)})

    def write(self, folder: Path) -> None:
        """Write manifest.json, which makes the store finished."""
        write_whole(folder / MANIFEST_FILE, [json_bytes(asdict(self))])

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read manifest.json.

        Raises:
            FileNotFoundError: the folder has none.
            ValueError: it is damaged or of another format.
        """
        file = folder / MANIFEST_FILE
        content = read_json(file)
        try:
            return cls(
                **settings_of(content),
                shards=tuple(ShardEntry(**entry) for entry in content["shards"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: the manifest is damaged ({error}).") from error


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among the fields of a JSON file."""
    return {entry.name: content[entry.name] for entry in fields(Settings)}


def is_recorded_only(name: str) -> bool:
    """Return whether a setting, in dotted form, may differ between the runs that make one store."""
    return name in RECORDED_ONLY or name.partition(".")[0] in RECORDED_ONLY


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file of this store format, with a hash of itself."""
    whole = {"format": FORMAT, **content, "sha256": hash_json(content)}
    return json.dumps(whole, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of this store format.

    Returns:
        Its fields, without format and hash.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, of another format, or altered.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); the file is damaged.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file}: the format is {found!r}; this version reads {FORMAT!r}.")
    own = {name: value for name, value in content.items() if name not in ("format", "sha256")}
    if content.get("sha256") != hash_json(own):
        raise ValueError(f"{file}: the content does not match its own hash; it was damaged or edited.")
    return own


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields under dotted names.

    >>> flat({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
