"""Files that a folder names: they lie in it, wherever its own links lead."""

from __future__ import annotations

from pathlib import Path


def check_inside(folder: Path, file: Path) -> None:
    """Refuse a link out of a folder that somebody else may have made.

    Args:
        folder: it may itself be a link.
        file: named by the folder's manifest. In the Hub's cache it is a link to the repository's blobs.

    Raises:
        ValueError: it leads out of the folder.
    """
    real = file.resolve()
    blobs = real.parent
    in_cache = blobs.name == "blobs" and blobs.parent / "snapshots" in file.absolute().parents
    if not (in_cache or real.is_relative_to(folder.resolve())):
        raise ValueError(f"{file}: leads out of its folder, to {real}; a folder's own files lie in it.")
