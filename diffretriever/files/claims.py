"""Who is working on what, when several processes share a folder: claim files with a lock and a sign of life.

A claim is a small file that appears in one step (a hard link, or O_EXCL where there are none). Its owner holds a lock
on it, which the system drops when the owner dies, and touches it every few seconds. On the owner's machine the lock
decides whether the owner lives; elsewhere, since locks do not reach over every network filesystem, a claim that has not
been touched for a whole lease of the observer's own clock is abandoned: clocks of two machines are never compared.

An abandoned claim is never removed to be made anew, which two observers could do at once: the next generation of it is
made beside it. Claims save work; nothing depends on them for being right, since whoever does a piece of work writes the
same bytes in one step.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .durable import NO_LINKS, remove_temporaries, temporary_name
from .lines import read_object
from .locks import create_locked, is_free, machine_name
from .removal import refuse_link, remove_file

LEASE = 120.0  # seconds without a sign of life; network filesystems may show a touch up to a minute late
_FILE = re.compile(r"([^.]+)\.([0-9]+)")  # a claim's name and generation; other files are not ours


class Claims:
    """The claims of one folder, seen from this process.

    Args:
        folder: made when the first claim is.
        lease: seconds without a sign of life after which another machine's claim is abandoned.
        clock: seconds, monotonic.

    Raises:
        FileExistsError: the folder is a link; claims are removed, and what is behind it may be somebody's.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "claims"
    >>> with Claims(folder) as mine, Claims(folder) as theirs:
    ...     print(mine.take("shard-7"), theirs.take("shard-7"))
    True False
    """

    def __init__(self, folder: Path, lease: float = LEASE, clock: Callable[[], float] = time.monotonic) -> None:
        refuse_link(folder)
        self.folder = folder
        self.lease = lease
        self._clock = clock
        self._held: dict[str, tuple[Path, int]] = {}  # name: its file, and the descriptor that holds the lock
        self._seen: dict[Path, tuple[int, float]] = {}  # sign of life, and when this process first saw it
        self._guard = threading.Lock()
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="signs of life", daemon=True)
        self._heart.start()

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
            Whether it is now ours; False while somebody alive has it.
        """
        files = self._files(name)
        if files and not self._abandoned(files[-1]):
            return False
        generation = _generation(files[-1]) + 1 if files else 0
        return self._create(name, self.folder / f"{name}.{generation}")

    def holds(self, name: str) -> bool:
        """Return whether a piece of work is ours."""
        return name in self._held

    def release(self, name: str) -> None:
        """Give a claim up, and with it those of dead owners before us."""
        with self._guard:
            file, handle = self._held.pop(name)
        try:
            for other in self._files(name):
                if _generation(other) <= _generation(file):
                    remove_file(other)
        finally:
            os.close(handle)

    def sweep(self, names: Collection[str]) -> None:
        """Remove the claims of others, dead or alive, once there is nothing left to claim.

        Args:
            names: all pieces of work; other files stay.
        """
        with self._guard:
            own = {file for file, _ in self._held.values()}
        for name, file in _claims_in(self.folder):
            if name in names and file not in own:
                remove_file(file)

    def close(self) -> None:
        """Give up all claims, and the folder where it is empty."""
        self._closed.set()
        self._heart.join()
        for name in list(self._held):
            self.release(name)
        if self.folder.is_dir():
            remove_temporaries(self.folder)
            try:
                self.folder.rmdir()
            except OSError as error:  # others still have claims here, or removed it first
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise

    def _files(self, name: str) -> list[Path]:
        return sorted((file for found, file in _claims_in(self.folder, name) if found == name), key=_generation)

    def _create(self, name: str, file: Path) -> bool:
        temporary, handle, locked = create_locked(lambda: temporary_name(file))
        try:
            try:
                owner = {"machine": machine_name(), "host": platform.node(), "process": os.getpid(), "locked": locked}
                os.write(handle, json.dumps(owner).encode())
                taken = _appear(temporary, file, handle)
            finally:
                remove_file(temporary)
        except OSError as error:
            os.close(handle)  # with it the lock: a claim that appeared nevertheless is nobody's
            raise OSError(error.errno, error.strerror, str(file)) from error
        if not taken:
            os.close(handle)
            return False
        with self._guard:
            self._held[name] = (file, handle)
        return True

    def _abandoned(self, file: Path) -> bool:
        """Whether the owner of a claim is dead."""
        try:
            owner = read_owner(file)
            touched = file.stat().st_mtime_ns
            if owner.get("locked") and owner.get("machine") == machine_name():
                return is_free(file)
        except FileNotFoundError:
            return False  # given up this moment
        seen = self._seen.get(file)
        if seen is None or seen[0] != touched:
            self._seen[file] = (touched, self._clock())
            return False
        return self._clock() - seen[1] > self.lease

    def _beat(self) -> None:
        while not self._closed.wait(min(15.0, self.lease / 6)):
            with self._guard:
                files = [file for file, _ in self._held.values()]
            for file in files:
                try:
                    os.utime(file)
                except OSError:  # somebody took us for dead, or the server is away: the work goes on
                    continue


def _claims_in(folder: Path, name: str = "*") -> Iterator[tuple[str, Path]]:
    """Yield (piece of work, file) of the claims in a folder."""
    for file in folder.glob(f"{name}.*"):
        if found := _FILE.fullmatch(file.name):
            yield found[1], file


def _generation(file: Path) -> int:
    return int(file.suffix[1:])


def read_owner(file: Path) -> dict[str, Any]:
    """Return who made a claim; {} while it is being written.

    Raises:
        FileNotFoundError: the claim has been given up.
    """
    try:
        return read_object(file)
    except ValueError:
        return {}


def living_owners(folder: Path) -> list[str]:
    """Describe the owners of the claims in a folder, without waiting to see whether those elsewhere still live."""
    found: dict[str, float] = {}
    for _, file in sorted(_claims_in(folder)):
        try:
            owner, age = read_owner(file), max(0.0, time.time() - file.stat().st_mtime)
            if owner.get("locked") and owner.get("machine") == machine_name() and is_free(file):
                continue
        except FileNotFoundError:
            continue
        name = f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown machine')}"
        found[name] = min(age, found.get(name, age))
    return [f"{name} (last sign of life {age:.0f} s ago)" for name, age in found.items()]


def _appear(temporary: Path, file: Path, handle: int) -> bool:
    """Give a written file its name unless the name is taken."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _appear_without_links(file, handle)
    return True


def _appear_without_links(file: Path, handle: int) -> bool:
    try:
        target = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    os.lseek(handle, 0, os.SEEK_SET)
    owner = json.loads(os.read(handle, 4096))
    owner["locked"] = False  # the lock is on the temporary file; the sign of life decides
    os.write(target, json.dumps(owner).encode())
    os.close(target)
    return True
