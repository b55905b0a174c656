"""Who is working on what, when several processes of one machine share a folder: claim files with a lock.

A claim is a small file on which its owner holds a lock; the system drops the lock when the owner dies, however it does.
Claims save work; nothing depends on them for being right, since whoever does a piece of work writes the same bytes in
one step. Where locks do not tell (a filesystem without, or one that keeps them to each machine), work is done twice.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

from .lines import read_object
from .locks import is_locked, take_lock
from .removal import refuse_link, remove_file

_FILE = re.compile(r"([^.]+)(\.[0-9]+)?")  # a claim's name; earlier versions counted its owners behind a dot


class Claims:
    """The claims of one folder, seen from this process.

    Args:
        folder: made when the first claim is.

    Raises:
        FileExistsError: the folder is a link; claims are removed, and what is behind it may be somebody's.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "claims"
    >>> with Claims(folder) as mine, Claims(folder) as theirs:
    ...     print(mine.take("shard-7"), theirs.take("shard-7"))
    True False
    """

    def __init__(self, folder: Path) -> None:
        refuse_link(folder)
        self.folder = folder
        self._held: dict[str, int] = {}  # name: the descriptor that holds the lock

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, name: str) -> bool:
        """Claim a piece of work, also one whose owner has died.

        Args:
            name: the piece of work; no dots.

        Returns:
            Whether it is now ours; False while somebody has it, be it ourselves.
        """
        handle = None if name in self._held else take_lock(self.folder / name)
        if handle is None:
            return False
        self._held[name] = handle
        try:
            os.truncate(handle, 0)
            os.write(handle, json.dumps({"host": platform.node(), "process": os.getpid()}).encode())
        except OSError as error:
            self.release(name)
            raise OSError(error.errno, error.strerror, str(self.folder / name)) from error
        return True

    def holds(self, name: str) -> bool:
        """Return whether a piece of work is ours."""
        return name in self._held

    def release(self, name: str) -> None:
        """Give a claim up."""
        handle = self._held.pop(name)
        try:
            remove_file(self.folder / name)  # before the lock goes: no other's file is taken away
        finally:
            os.close(handle)

    def sweep(self, names: Collection[str]) -> None:
        """Remove the claims of others, dead or alive, once there is nothing left to claim.

        Args:
            names: all pieces of work; other files stay.
        """
        for name, file in _claims_in(self.folder):
            if name in names and name not in self._held:
                remove_file(file)

    def close(self) -> None:
        """Give up all claims, and the folder where it is empty."""
        for name in list(self._held):
            self.release(name)
        if self.folder.is_dir():
            try:
                self.folder.rmdir()
            except OSError as error:  # others still have claims here, or removed it first
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise


def _claims_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (piece of work, file) of the claims in a folder."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not file.is_symlink() and (found := _FILE.fullmatch(file.name)):
            yield found[1], file


def living_owners(folder: Path) -> list[str]:
    """Describe the owners of the claims in a folder."""
    found = []
    for _, file in _claims_in(folder):
        try:
            if is_locked(file):
                found.append(_describe_owner(file))
        except FileNotFoundError:  # given up this moment
            continue
    return list(dict.fromkeys(found))


def _describe_owner(file: Path) -> str:
    try:
        owner = read_object(file)
    except ValueError:  # it is being written
        owner = {}
    return f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown machine')}"
