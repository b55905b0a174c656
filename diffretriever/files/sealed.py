"""Folders that say what is in them: a manifest with the hash of every file, by which damage is found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .durable import write_json
from .fields import fill
from .hashes import check_own_hash, hash_file, with_own_hash
from .lines import read_object

SEAL_FILE = "manifest.json"


class Damaged(ValueError):
    """A folder does not hold what it was sealed with; the message is the reason, which follows the folder's name."""


@dataclass(frozen=True)
class Sealed:
    """A file as it was when its folder was sealed."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Seal:
    """What a folder's manifest says.

    Args:
        about: JSON values that were kept with the folder.
        files: by their relative names.
    """

    about: dict[str, Any]
    files: dict[str, Sealed]


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write the manifest of a folder; the last thing that is written there.

    Args:
        folder: all of its files are whole.
        about: JSON values that are kept with it, for example what it was made from.
    """
    files = {name: Sealed(path.stat().st_size, hash_file(path)) for name, path in _files(folder).items()}
    write_json(folder / SEAL_FILE, with_own_hash(asdict(Seal(about, files))))


def check_seal(folder: Path) -> dict[str, Any]:
    """Read every file of a sealed folder, and return what it is about.

    Raises:
        Damaged: no manifest, an altered one, or a file that is missing, cut off or altered; names the file.
    """
    if not (folder / SEAL_FILE).is_file():
        raise Damaged(f"has no {SEAL_FILE}: it was not written to its end, or by an earlier version")
    file = folder / SEAL_FILE
    try:
        found = fill(Seal, check_own_hash(read_object(file), file), str(file))
    except ValueError as error:
        raise Damaged(f"holds a damaged file, {error}") from error
    present = _files(folder)
    for name, entry in found.files.items():
        if name not in present:
            raise Damaged(f"lacks {name}")
        size = present[name].stat().st_size
        if size != entry.bytes:
            raise Damaged(f"holds {name} with {size:,} bytes instead of {entry.bytes:,}")
        if hash_file(present[name]) != entry.sha256:
            raise Damaged(f"holds {name} with other content than was written (its SHA-256 differs)")
    return found.about


def _files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder, but for its manifest, by their relative names."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found.pop(SEAL_FILE, None)
    return found
