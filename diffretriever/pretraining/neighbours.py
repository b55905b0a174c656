"""BM25 neighbours: for each training query, other pairs whose passages BM25 takes for answers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import torch


def bm25_neighbours(queries: Sequence[str], passages: Sequence[str], depth: int) -> torch.Tensor:
    """Finds hard negatives among the training passages.

    Args:
        queries, passages: pair i is (queries[i], passages[i]).
        depth: neighbours per query.

    Returns:
        int32 [N, depth], numbers of other pairs; a pair with the same passage text is left out (its place
        is taken by the next neighbour, or by -1 where there is none).

    Raises:
        ImportError: if bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("mining hard negatives needs the package bm25s: pip install bm25s") from error
    index = bm25s.BM25(k1=0.9, b=0.4, backend="auto")  # numba where it is installed: 50 times as fast
    index.index(bm25s.tokenize(list(passages), stopwords="en", show_progress=False), show_progress=False)
    asked = bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
    take = min(depth + 4, len(passages))
    found, scores = index.retrieve(asked, k=take, show_progress=False)
    rows: list[list[int]] = []
    for number, (row, values) in enumerate(zip(found.tolist(), scores.tolist(), strict=True)):
        own = passages[number]
        good = [other for other, value in zip(row, values, strict=True) if value > 0 and passages[other] != own]
        rows.append((good + [-1] * depth)[:depth])
    return torch.tensor(rows, dtype=torch.int32)


def fingerprint(*columns: Sequence[str]) -> str:
    """A short hash of lists of texts, in their order."""
    digest = hashlib.sha256()
    for column in columns:
        for text in column:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def cached_neighbours(queries: Sequence[str], passages: Sequence[str], depth: int, folder: Path) -> torch.Tensor:
    """As `bm25_neighbours`, kept in a file of `folder` that is named after the data."""
    path = folder / f"neighbours-{fingerprint(queries, passages)}-{depth}.pt"
    if path.is_file():
        kept: torch.Tensor = torch.load(path, weights_only=True)
        return kept
    found = bm25_neighbours(queries, passages, depth)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def with_neighbours(seeds: Sequence[int], neighbours: torch.Tensor, rng: random.Random) -> list[int]:
    """A batch in which pairs stand beside one of their neighbours: each is the other's hard negative.

    Args:
        seeds: pair numbers.
        neighbours: from `bm25_neighbours`.
        rng: source of randomness.

    Returns:
        The seeds and one neighbour of each, every pair once.
    """
    batch = list(dict.fromkeys(seeds))
    for seed in seeds:
        row = [other for other in neighbours[seed].tolist() if other >= 0]
        if row:
            batch.append(rng.choice(row))
    return list(dict.fromkeys(batch))
