"""Files that appear whole or not at all, and survive a crash of the machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..model.saved_folder import sync
from .locks import create_locked, machine_name, remove_if_free
from .removal import refuse_link, remove_file, remove_folder

TEMPORARY = ".unfinished-"  # begins the name of every file that is still being written
_TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}.+-([0-9a-f]{{8}})-[0-9a-f]{{12}}", re.DOTALL)
BLOCK = 8 * 1024 * 1024  # bytes handed to one write
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
FORGOTTEN = 86400.0  # seconds after which a half-written file counts as left behind where locks do not tell
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, chunks: Iterable[bytes | memoryview], keep: bool = False) -> None:
    """Write a file under a temporary name, force it to the disk and only then give it its name.

    Args:
        path: the file; one that is there is replaced in one step.
        chunks: its content, piece by piece.
        keep: leave a file that is already there as it is, where the filesystem has hard links.

    Raises:
        OSError: the content could not be written; no file of this name has changed. A full disk is named as one.
    """
    refuse_device(path)
    with _naming(path):
        temporary, handle = create_locked(lambda: temporary_name(path))  # the lock says that its writer lives
    try:
        try:
            for chunk in chunks:  # making it may fail by files of its own
                with _naming(path):
                    _write_all(handle, memoryview(chunk).cast("B"))
            with _naming(path):
                os.fsync(handle)  # a power cut may not leave a name without its content
                if keep:
                    _link_or_replace(temporary, path)
                else:
                    os.replace(temporary, path)
        finally:
            os.close(handle)
        with _naming(path):
            sync(path.parent)
    finally:
        remove_file(temporary)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have the system's errors name a file, and not its temporary one or none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(error.filename).name.startswith(TEMPORARY):
            raise  # its folder cannot be made
        reason = os.strerror(error.errno or 0)
        if error.errno in FULL_DISK:
            reason += "; nothing of this file is kept. Make room"
        raise OSError(error.errno, reason, str(path)) from error


def _link_or_replace(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.replace(temporary, path)


def _write_all(handle: int, content: memoryview) -> None:
    while len(content):  # one call may write less than it was given
        content = content[os.write(handle, content[:BLOCK]) :]


def refuse_device(path: Path) -> None:
    """Refuse what a file would replace where it should be written into: a device, a pipe, a link such as /dev/stdout.

    Raises:
        FileExistsError: it is one.
    """
    link = os.readlink(path) if path.is_symlink() else ""
    if path.exists() and not path.is_dir() and (link.startswith("/proc/") or not path.is_file()):
        raise FileExistsError(f"{path}: is a device or a pipe, which a file would replace; give the name of a file.")


def check_place(path: Path) -> None:
    """Make the folder of a file that is to be written later.

    Raises:
        OSError: the file could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    refuse_device(path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # half a surrogate pair, as in the name of a file that is no UTF-8, is written as its escape, which JSON reads
    write_whole(path, [text.encode("utf-8", "backslashreplace")])


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, whole or not at all, making its folder."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def publish_folder(made: Path, place: Path) -> None:
    """Force a folder that was filled aside to the disk and only then give it its name.

    Args:
        made: the folder, on the same filesystem as `place`, in a folder of the caller's for what is unfinished.
        place: its name to be; what is there is moved beside `made`, and removed once its successor has its name.

    Raises:
        OSError: `place` is a link, or the folder could not be forced to the disk, or named; what was there is there
            again.
    """
    refuse_link(place)
    for path in (*made.rglob("*"), made):
        if not path.is_symlink():  # it may point to where it leads once it is in its place
            sync(path)
    old = made.with_name(f"{made.name}.replaced")
    if place.exists():
        remove_folder(old)  # of a process that died here
        os.replace(place, old)
    try:
        os.replace(made, place)
    except BaseException:
        if old.exists():
            os.replace(old, place)
        raise
    sync(place.parent)
    remove_folder(old)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left half-written, and nothing that a living one is writing."""
    for file in folder.glob(f"{TEMPORARY}*"):
        name = _TEMPORARY_NAME.fullmatch(file.name)
        if name is None or file.is_symlink() or not file.is_file():
            continue  # not made here
        try:
            ours = name[1] == _machine_mark()
            if not (ours and remove_if_free(file)) and time.time() - file.stat().st_mtime > FORGOTTEN:
                remove_file(file)
        except FileNotFoundError:  # it got its name this moment, or is removed
            continue


def temporary_name(path: Path) -> Path:
    """Return a name for a file that is to become `path`; its writer holds a lock on it."""
    return path.with_name(f"{TEMPORARY}{path.name}-{_machine_mark()}-{uuid.uuid4().hex[:12]}")


def _machine_mark() -> str:
    return hashlib.sha256(machine_name().encode()).hexdigest()[:8]
