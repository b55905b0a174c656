"""BM25 neighbours: for each training query, other pairs whose passages BM25 takes for answers."""

from __future__ import annotations

import hashlib
import io
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..evaluation.bm25 import BM25
from ..files.durable import publish_folder, write_whole
from ..files.sealed import Damaged, check_seal, seal
from ..training.checkpoints import PARTIAL, remove_partial

NEIGHBOURS_FILE = "neighbours.npy"


def bm25_neighbours(queries: Sequence[str], passages: Sequence[str], depth: int) -> np.ndarray:
    """Find hard negatives among the training passages.

    Args:
        queries, passages: pair n is (queries[n], passages[n]).
        depth: neighbours a query.

    Returns:
        int32 [N, depth], numbers of other pairs, best first; a pair with the same passage text is left out. -1 where
        there are no more.

    Raises:
        ImportError: bm25s or PyStemmer is not installed.
    """
    index = BM25([str(number) for number in range(len(passages))], passages)
    most = max(Counter(passages).values())  # so many of the best may be the query's own passage
    found = np.full((len(queries), depth), -1, dtype=np.int32)
    for number, ranked in enumerate(index.rank(queries, depth + most)):
        others = [other for other, _ in ranked if passages[other] != passages[number]][:depth]
        found[number, : len(others)] = others
    return found


def cached_neighbours(
    queries: Sequence[str], passages: Sequence[str], depth: int, folder: Path, data: Iterable[str]
) -> np.ndarray:
    """Return what `bm25_neighbours` does, kept in `folder` under the data's hashes; what is damaged is made anew."""
    mark = hashlib.sha256(" ".join(data).encode()).hexdigest()[:16]
    place = folder / f"neighbours-{mark}-{depth}"
    try:
        check_seal(place)
    except Damaged:
        remove_partial(folder)
        made, buffer = folder / PARTIAL / place.name, io.BytesIO()
        np.save(buffer, bm25_neighbours(queries, passages, depth))
        write_whole(made / NEIGHBOURS_FILE, [buffer.getbuffer()])
        seal(made, {})
        publish_folder(made, place)
    found: np.ndarray = np.load(place / NEIGHBOURS_FILE)
    return found


def with_neighbours(seeds: Sequence[int], neighbours: np.ndarray, rng: random.Random) -> list[int]:
    """Return a batch in which pairs stand beside one of their neighbours: each is the other's hard negative.

    Args:
        seeds: pair numbers.
        neighbours: from `bm25_neighbours`.
        rng: source of randomness.

    Returns:
        The seeds and one neighbour of each, every pair once.
    """
    batch = list(seeds)
    for seed in seeds:
        row = [other for other in neighbours[seed].tolist() if other >= 0]
        if row:
            batch.append(rng.choice(row))
    return list(dict.fromkeys(batch))
