"""What a store says about itself: the model and settings that made it, and its shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files.durable import write_whole
from ..files.fields import fill
from ..files.hashes import check_own_hash, with_own_hash
from ..files.lines import read_object
from .differences import SHA256, differing_fields

MANIFEST_FILE = "manifest.json"
FORMAT = "diffretriever store 1"
LARGEST = 1 << 29  # bytes of a manifest or plan: 512 MiB, of `plan.MAX_SHARDS` shards
STORE_DTYPES = ("float16", "bfloat16", "float32", "int8")
# Recorded, but free to differ between the runs that make one store: they do not change what the vectors mean.
RECORDED_ONLY = ("model", "library_versions", "options.tokens_per_batch", "options.chosen")
_PLAIN_NAME = re.compile(r"\w[\w.-]*")  # of a file in the store's own folder


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest.

    Args:
        file: its name in the store's folder.
        first: position of its first text.
        count: texts in it.
        size: bytes.
        header_sha256: hash of its header, which holds the hash of all other bytes.
        texts_sha256: hash of the ids and texts that it was made from; "" for a file without any.

    Raises:
        ValueError: a value that no shard has.
    """

    file: str
    first: int
    count: int
    size: int
    header_sha256: str
    texts_sha256: str

    def __post_init__(self) -> None:
        if not _PLAIN_NAME.fullmatch(self.file):
            raise ValueError(f"`file` is {self.file!r:.80}; expected the name of a file in the store's folder")
        for name, value, expected in (("header_sha256", self.header_sha256, 1), ("texts_sha256", self.texts_sha256, 0)):
            if not SHA256.fullmatch(value) and (expected or value):
                raise ValueError(f"`{name}` is {value!r:.80}; expected 64 hexadecimal digits")
        check_numbers(self, {"first": 0, "count": 0, "size": 0})


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
        model_parts: of `model_parts.model_parts`; {} in a store of a version that did not record them.

    Raises:
        ValueError: a value that no store has.
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
    model_parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in STORE_DTYPES:
            raise ValueError(f"dtype {self.dtype!r:.80}: a store's is one of {', '.join(STORE_DTYPES)}.")
        if self.side not in ("query", "passage"):
            raise ValueError(f'`side` is {self.side!r:.80}; expected "query" or "passage"')
        least = {"num_masks": 1, "hidden_size": 1, "vocab_size": 0, "sparse_top_k": 0, "max_length": 0}
        check_numbers(self, least)

    def differences(self, other: Settings) -> dict[str, tuple[Any, Any]]:
        """Return {setting in dotted form: (its value here, in `other`)}; {} where they make the same vectors.

        What one of them does not record is not compared.
        """
        mine, theirs = asdict(self), asdict(other)
        # between commits that changed nothing of the model there is no difference
        left_out = {"revision"} if self.model_parts and other.model_parts else {"model_parts"}
        return {
            name: (here, there)
            for name, here, there in differing_fields(mine, theirs)
            if not is_recorded_only(name) and name.partition(".")[0] not in left_out
        }


@dataclass(frozen=True)
class Manifest(Settings):
    """Settings and shards of a finished store.

    Raises:
        ValueError: a value that no store has, or shards that do not follow one another.
    """

    shards: tuple[ShardEntry, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        first = 0
        for number, shard in enumerate(self.shards):
            if not shard.count:
                raise ValueError(f"shards[{number}]: `count` is 0; expected at least one text")
            if shard.first != first:
                raise ValueError(f"shards[{number}]: `first` is {shard.first}; expected {first}, the texts before it")
            first += shard.count
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("`shards` names one file twice")

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
            ValueError: it is damaged, of another format, or a field of it is wrong.
        """
        file = folder / MANIFEST_FILE
        return cls.of_fields(read_json(file), file)

    @classmethod
    def of_fields(cls, content: Mapping[str, Any], file: Path) -> Manifest:
        """Return the manifest among the fields of a JSON file, each of them checked.

        Raises:
            ValueError: one is missing or wrong; the message names file and field.
        """
        if not content.get("shards"):
            raise ValueError(f"{file}: `shards` is {content.get('shards')!r}; a store holds at least one text.")
        return fill(cls, content, str(file), others=True)


def check_numbers(values: Any, least: Mapping[str, int]) -> None:
    """Refuse fields that are no whole numbers of at least so much.

    Args:
        values: a dataclass.
        least: {field: the smallest value}.

    Raises:
        ValueError: names the first such field.
    """
    for name, smallest in least.items():
        value = getattr(values, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"`{name}` is {value!r:.80}; expected a whole number of at least {smallest}")


def is_recorded_only(name: str) -> bool:
    """Return whether a setting, in dotted form, may differ between the runs that make one store."""
    return name in RECORDED_ONLY or name.partition(".")[0] in RECORDED_ONLY


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file of this store format, with a hash of itself."""
    whole = {"format": FORMAT, **with_own_hash(content)}
    # as `files.durable.write_text`: half a surrogate pair is in the name of a model's folder that is no UTF-8
    return json.dumps(whole, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of this store format.

    Returns:
        Its fields, without format and hash.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, of another format, or altered.
    """
    whole = read_object(file, LARGEST)
    found = whole.get("format")
    if found != FORMAT:
        raise ValueError(f"{file}: the format is {found!r:.80}; this version reads {FORMAT!r}.")
    return check_own_hash(whole, file, beside=["format"])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields under dotted names.

    >>> flat({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
