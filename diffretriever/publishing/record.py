"""`release.json`: what a release was made of, so that it can be checked anywhere later."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.durable import write_whole
from ..files.fields import fill
from ..files.hashes import hash_file, hash_once
from ..files.lines import read_object
from .releases import check_repo_id, library_versions

RECORD_FILE = "release.json"
CARD_FILE = "README.md"
FORMAT = 1


@dataclass(frozen=True)
class _Backbone:
    name: str
    revision: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class _Text:
    """What `probe.fingerprint` records of a text."""

    side: str
    text: str
    token_ids: list[int]
    dense_shape: list[int]
    dense_float16: str
    sparse: Any

    def __post_init__(self) -> None:
        pairs = self.sparse if isinstance(self.sparse, list) else [None]
        if not all(isinstance(pair, list) and list(map(type, pair)) in ([int, float], [int, int]) for pair in pairs):
            raise ValueError("`sparse` must be a list of [token id, weight]")
        try:
            held = len(base64.b64decode(self.dense_float16, validate=True))
        except ValueError:
            held = -1
        if held != 2 * math.prod(self.dense_shape):
            raise ValueError("`dense_float16` must be base64 of as many numbers as `dense_shape` says")


@dataclass(frozen=True)
class _Fingerprint:
    dtype: str
    texts: list[_Text]


@dataclass(frozen=True)
class _Record:
    """The types of what is read of a release.json; it is handed on as it is."""

    release: str
    repo_id: str
    backbone: _Backbone
    files: dict[str, str]
    libraries: dict[str, str]
    fingerprint: _Fingerprint | None
    code_sha256: str | None = None
    adapter_sha256: str | None = None
    adapter: dict[str, str] | None = None


def release_files(folder: Path) -> dict[str, Path]:
    """Return a release's files by their path in it (with `/`), sorted; hidden ones and Python's caches are none."""
    places = ((file.relative_to(folder), file) for file in folder.rglob("*") if file.is_file())
    found = {
        place.as_posix(): file
        for place, file in places
        if not any(part.startswith(".") or part == "__pycache__" for part in place.parts)
    }
    return dict(sorted(found.items()))


def combined_hash(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 for several files: of the lines `sha256sum` would print for them, sorted by path."""
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def weights_hash(folder: Path) -> str:
    """Return one SHA-256 for a backbone's weights."""
    return combined_hash({file.name: hash_once(file.resolve()) for file in folder.glob("*.safetensors")})


def make_record(
    folder: Path, origin: dict[str, Any], fingerprint: dict[str, Any] | None, absent: str | None, linked: bool
) -> dict[str, Any]:
    """Describe a release folder that is otherwise finished.

    Args:
        folder: the release, with its code in place.
        origin: what only the builder knows: "release", "repo_id", "backbone" and "adapter".
        fingerprint: of `probe.fingerprint`, or None.
        absent: why there is no fingerprint.
        linked: the code files are to be links to a source tree, which may change: their hashes are left out.

    Returns:
        What release.json holds.
    """
    sha256 = {name: hash_file(file) for name, file in release_files(folder).items() if name != RECORD_FILE}
    code = {name: value for name, value in sha256.items() if name.endswith(".py")}
    adapter = {name: value for name, value in sha256.items() if name.startswith("adapter/")}
    return {
        "format": FORMAT,
        **origin,
        "code_sha256": None if linked else combined_hash(code),
        "adapter_sha256": combined_hash(adapter) if adapter else None,
        "libraries": {"python": platform.python_version(), **library_versions()},
        "files": {name: value for name, value in sha256.items() if not (linked and name in code)},
        "fingerprint": fingerprint,
        "fingerprint_absent": absent,
    }


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Write release.json."""
    write_whole(folder / RECORD_FILE, [record_bytes(record)])


def record_bytes(record: dict[str, Any]) -> bytes:
    """Return release.json as it is written: the same bytes for the same record."""
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def read_record(folder: Path) -> dict[str, Any]:
    """Read a release's record.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is broken, or of another format.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; give a release's name or the folder of a built release.")
    file = folder / RECORD_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RECORD_FILE}, so it is no release of publish.py, or an old one; build it again."
        )
    record = read_object(file)
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {record.get('format')!r}, this publish.py reads format {FORMAT}; build it again."
        )
    try:
        fill(_Record, record, str(file), others=True)
    except ValueError as error:
        raise ValueError(f"{error}; build the release again.") from error
    check_repo_id(f"{file}: `repo_id`", record["repo_id"])
    return record


def changes_since(record: dict[str, Any], folder: Path) -> list[str]:
    """Return what is no longer as recorded, a sentence each: files changed, missing or added.

    Args:
        record: what `read_record` returned.
        folder: the release.
    """
    recorded: dict[str, str] = record["files"]
    linked = record.get("code_sha256") is None
    files = release_files(folder)
    found = [f"{name} is missing; build the release again" for name in recorded if name not in files]
    for name, file in files.items():
        if name == RECORD_FILE or (linked and file.is_symlink() and name.endswith(".py")):
            continue
        if name not in recorded:
            found.append(f"{name} was added since it was built; remove it, or build the release again")
        elif hash_file(file) != recorded[name]:
            found.append(f"{name} was changed since it was built; build the release again")
    return found
