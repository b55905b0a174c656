"""Locks on files that the system drops when their owner dies."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType

from .removal import remove_file

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has none: callers then go by signs of life
    fcntl = None


@cache
def machine_name() -> str:
    """Return a name of this machine since its last start, the same for all its processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    start = boot.read_text().strip() if boot.is_file() else f"{uuid.getnode():x}"
    return f"{platform.node()} {start}"


def create_locked(choose: Callable[[], Path]) -> tuple[Path, int, bool]:
    """Make a new file and lock it until it is closed.

    Args:
        choose: returns a name that no file has; asked again where others removed the file or its folder at once.

    Returns:
        The file, its descriptor for reading and writing, and whether it is locked (some filesystems have no locks).
    """
    for last in (*[False] * 100, True):
        file = choose()
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:  # the folder was removed this moment
            if last:
                raise
            continue
        locked = _lock(handle, wait=True)
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # `remove_if_free` was faster than our lock
    return file, handle, locked


def is_free(file: Path) -> bool:
    """Return whether nobody holds the lock on a file.

    Raises:
        FileNotFoundError: no such file.
    """
    return _while_locked(file, lambda: None)


def remove_if_free(file: Path) -> bool:
    """Remove a file that nobody has locked; returns whether that was so.

    Raises:
        FileNotFoundError: no such file.
    """
    return _while_locked(file, partial(remove_file, file))


def _while_locked(file: Path, work: Callable[[], None]) -> bool:
    try:
        handle = os.open(file, os.O_RDWR)
    except PermissionError:  # another user's
        return False
    try:
        free = _lock(handle, wait=False)
        if free:
            work()
        return free
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file until it is closed; False where it is locked, or the filesystem has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
