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
except ImportError:  # Windows has none: every file then seems to be nobody's, and ours for the asking
    fcntl = None


@cache
def machine_name() -> str:
    """Return a name of this machine since its last start, the same for all its processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    start = boot.read_text().strip() if boot.is_file() else f"{uuid.getnode():x}"
    return f"{platform.node()} {start}"


def create_locked(choose: Callable[[], Path]) -> tuple[Path, int]:
    """Make a new file and lock it until it is closed, where the filesystem has locks.

    Args:
        choose: returns a name that no file has; asked again where others removed the file or its folder at once.

    Returns:
        The file, and its descriptor for reading and writing.
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
        _lock(handle, wait=True)
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # `remove_if_free` was faster than our lock
    return file, handle


def take_lock(file: Path) -> int | None:
    """Lock a file until it is closed; it is made if it is not there, and its folder with it.

    Returns:
        Its descriptor for reading and writing; None while somebody has it locked. Where the filesystem has no locks,
        everybody gets one.

    Raises:
        OSError: the file cannot be made, or is a link.
    """
    for last in (*[False] * 100, True):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except FileNotFoundError:  # the folder was removed this moment
            if last:
                raise
            continue
        if _lock(handle, wait=False) is False:
            break
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # its owner gave it up between our opening and our lock
    os.close(handle)
    return None


def is_locked(file: Path) -> bool:
    """Return whether somebody holds the lock on a file.

    Raises:
        FileNotFoundError: no such file.
    """
    # for reading, and shared: another user's claim, or one on a disk that cannot be written, tells as much
    return _try_lock(file, lambda: None, os.O_RDONLY, shared=True) is False


def remove_if_free(file: Path) -> bool:
    """Remove a file that nobody has locked; returns whether that was so, False where the filesystem has no locks.

    Raises:
        FileNotFoundError: no such file.
    """
    return _try_lock(file, partial(remove_file, file), os.O_RDWR) is True


def _try_lock(file: Path, work: Callable[[], None], flags: int, shared: bool = False) -> bool | None:
    """Return what `_lock` says of a file that is opened so, and do some work while we hold the lock."""
    try:
        handle = os.open(file, flags)
    except PermissionError:  # another user's
        return False
    try:
        locked = _lock(handle, wait=False, shared=shared)
        if locked:
            work()
        return locked
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool, shared: bool = False) -> bool | None:
    """Lock an open file until it is closed; False where somebody else has it locked, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
