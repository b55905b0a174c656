"""Ids that occur twice, found in bounded memory."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

RUN_OF_IDS = 1 << 20  # hashes held in memory at once


def hash_id(text_id: str) -> int:
    """Return a hash of an id, 64 bits."""
    return int.from_bytes(hashlib.blake2b(text_id.encode("utf-8"), digest_size=8).digest(), "little")


class IdIndex:
    """Finds ids that occur twice among any number, with the hashes in sorted runs on disk.

    >>> with IdIndex() as index:
    ...     index.add(["a", "b", "a"])
    ...     index.repeated().tolist() == [hash_id("a")]
    True
    """

    def __init__(self, run_length: int = RUN_OF_IDS) -> None:
        self._run_length = run_length
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # made when the first run is full
        self._runs: list[Path] = []
        self._open = array("Q")

    def __enter__(self) -> IdIndex:
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, ids: Iterable[str]) -> None:
        """Take ids in."""
        self._open.extend(map(hash_id, ids))
        if len(self._open) >= self._run_length:
            self._close_run()

    def _close_run(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="diffretriever-ids-")
        path = Path(self._folder.name) / f"{len(self._runs)}.npy"
        np.save(path, np.sort(np.frombuffer(self._open, dtype=np.uint64)))
        self._runs.append(path)
        self._open = array("Q")

    def repeated(self) -> np.ndarray:
        """Return the hashes that occur twice, uint64, the first thousand."""
        runs = [np.load(path, mmap_mode="r") for path in self._runs]
        runs.append(np.sort(np.frombuffer(self._open, dtype=np.uint64)))
        total = sum(len(run) for run in runs)
        parts = max(1, -(-total // self._run_length))
        edges = [part * (1 << 64) // parts for part in range(1, parts)]  # hashes are spread evenly
        places = [[0, *np.searchsorted(run, np.array(edges, dtype=np.uint64)).tolist(), len(run)] for run in runs]
        found: list[np.ndarray] = [np.empty(0, dtype=np.uint64)]
        for part in range(parts):
            slices = [run[place[part] : place[part + 1]] for run, place in zip(runs, places, strict=True)]
            values = np.sort(np.concatenate(slices)) if slices else found[0]
            found.append(values[1:][values[1:] == values[:-1]])
        return np.unique(np.concatenate(found))[:1000]


def find_repeated(ids: Iterable[str], hashes: np.ndarray) -> list[tuple[str, int, int]]:
    """Return the ids that really occur twice, as different ids may share a hash.

    Args:
        ids: all ids again.
        hashes: those that `IdIndex.repeated` found.

    Returns:
        (id, number of its first text, number of its second), counted from 1; at most ten.
    """
    wanted = set(hashes.tolist())
    seen: dict[str, int] = {}
    found: list[tuple[str, int, int]] = []
    for number, text_id in enumerate(ids, start=1):
        if hash_id(text_id) not in wanted:
            continue
        if text_id in seen:
            found.append((text_id, seen[text_id], number))
            if len(found) == 10:
                break
        seen.setdefault(text_id, number)
    return found
