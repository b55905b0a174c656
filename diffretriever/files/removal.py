"""Removal of what this package made, and of nothing else: no other module removes files or folders."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path


def remove_file(file: Path) -> None:
    """Remove a file, if it is there; of a link, the link."""
    file.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there.

    Raises:
        FileExistsError: it is a link; what it leads to is somebody's.
    """
    refuse_link(folder)
    with suppress(FileNotFoundError):  # another process may be removing it, too
        shutil.rmtree(folder)


def refuse_link(folder: Path) -> None:
    """Refuse a folder in which files are to be removed, or that is to be replaced, where it leads elsewhere.

    Raises:
        FileExistsError: it is a link.
    """
    if folder.is_symlink():
        raise FileExistsError(
            f"{folder}: is a link; nothing is removed or replaced behind it. Remove the link, or choose another folder."
        )
