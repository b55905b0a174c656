"""Ids that occur twice, found by their hashes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from ..files.hashes import hash64


def repeated_hashes(hashes: array[int]) -> np.ndarray:
    """Return the values that occur twice, int64, sorted.

    Args:
        hashes: of type "q", in any order; 8 bytes each, which is 8 GB for 10^9 texts, and twice that for this call.

    >>> repeated_hashes(array("q", [7, 3, 7, 3, 7, 1])).tolist()
    [3, 7]
    """
    values = np.sort(np.frombuffer(hashes, dtype=np.int64))
    return np.unique(values[1:][values[1:] == values[:-1]])


def find_repeated(ids: Iterable[str], hashes: np.ndarray) -> list[tuple[str, int, int]]:
    """Return the ids that really occur twice, as different ids may share a hash.

    Args:
        ids: all ids again.
        hashes: what `repeated_hashes` found among their `hash64`.

    Returns:
        (id, number of its first text, number of its second), counted from 1; at most ten.
    """
    wanted = set(hashes[:1000].tolist())
    seen: dict[str, int] = {}
    found: list[tuple[str, int, int]] = []
    for number, text_id in enumerate(ids, start=1):
        if hash64(text_id) not in wanted:
            continue
        if text_id in seen:
            found.append((text_id, seen[text_id], number))
            if len(found) == 10:
                break
        seen.setdefault(text_id, number)
    return found
