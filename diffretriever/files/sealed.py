"""Folders that say what is in them: a manifest with the hash of every file, by which damage is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .durable import write_json
from .hashes import hash_file, hash_json
from .lines import read_object

SEAL_FILE = "manifest.json"


class Damaged(ValueError):
    """A folder does not hold what it was sealed with; the message is the reason, which follows the folder's name."""


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write the manifest of a folder; the last thing that is written there.

    Args:
        folder: all of its files are whole.
        about: JSON values that are kept with it, for example what it was made from.
    """
    files = {name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for name, path in _files(folder).items()}
    content = {"about": about, "files": files}
    write_json(folder / SEAL_FILE, {**content, "sha256": hash_json(content)})


def check_seal(folder: Path) -> dict[str, Any]:
    """Read every file of a sealed folder, and return what it is about.

    Raises:
        Damaged: no manifest, an altered one, or a file that is missing, cut off or altered; names the file.
    """
    if not (folder / SEAL_FILE).is_file():
        raise Damaged(f"has no {SEAL_FILE}: it was not written to its end, or by an earlier version")
    try:
        content = read_object(folder / SEAL_FILE)
    except ValueError as error:
        raise Damaged(f"holds a damaged file, {error}") from error
    own = {name: content.get(name) for name in ("about", "files")}
    if content.get("sha256") != hash_json(own):
        raise Damaged(f"holds an altered {SEAL_FILE}")
    present = _files(folder)
    for name, entry in content["files"].items():
        if name not in present:
            raise Damaged(f"lacks {name}")
        size = present[name].stat().st_size
        if size != entry["bytes"]:
            raise Damaged(f"holds {name} with {size:,} bytes instead of {entry['bytes']:,}")
        if hash_file(present[name]) != entry["sha256"]:
            raise Damaged(f"holds {name} with other content than was written (its SHA-256 differs)")
    about: dict[str, Any] = content["about"]
    return about


def _files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder, but for its manifest, by their relative names."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found.pop(SEAL_FILE, None)
    return found
