"""Hybrid search: the candidates of both sides, their scores min-max normalised and averaged (paper §3.3, Eq. 4)."""

from __future__ import annotations

from typing import Protocol

import torch

from ..store.segments import QueryVectors

BATCH_NUMBERS = 8 * 1024 * 1024  # ranked positions and scores held at once


class Ranker(Protocol):
    """What a search engine must be able to do."""

    def __len__(self) -> int: ...

    def rank(self, queries: QueryVectors, kind: str, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions int64 and scores float32, [Q, at most top_k], best first; unused slots are -1 and -inf."""

    def scores_at(self, queries: QueryVectors, kind: str, positions: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each query's scores of chosen positions; -inf for a missing dense vector, 0 for a missing sparse one."""


def rank_fused(
    engine: Ranker, queries: QueryVectors, dense_kind: str, top_k: int, candidates: int | None, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank by the hybrid score.

    A query's candidates are its `candidates` best passages by the dense score together with its `candidates` best by
    the sparse score, of those that have a vector or share a term with it. Both scores of each candidate are exact:
    what one side alone found is scored by the other too. The normalisation runs over the candidates. Where
    `candidates` covers the collection, every passage is one, and the result is that of `model.score`.

    Args:
        engine: finds and scores passages.
        queries: Q queries.
        dense_kind: "single_dense" or "multi_dense".
        top_k: passages a query.
        candidates: of each side; None takes all passages.
        weight: the dense share.

    Returns:
        positions int64 and scores float32, [Q, at most top_k]; unused slots are -1 and -inf.
    """
    depth = len(engine) if candidates is None else min(candidates, len(engine))
    ranked: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in queries.batches(max(1, BATCH_NUMBERS // max(1, depth))):
        dense, sparse = engine.rank(batch, dense_kind, depth), engine.rank(batch, "sparse_max", depth)
        pools = [torch.arange(len(engine))] * len(batch) if depth == len(engine) else _pools(dense, sparse)
        both = []
        for kind, (positions, scores) in ((dense_kind, dense), ("sparse_max", sparse)):
            found = [_place(*row) for row in zip(pools, positions, scores, strict=True)]
            both.append(_complete(engine, batch, kind, pools, found))
        ranked += [_best(pool, d, s, top_k, weight) for pool, d, s in zip(pools, both[0], both[1], strict=True)]
    return pad_rows([positions for positions, _ in ranked], -1), pad_rows([scores for _, scores in ranked], -torch.inf)


def _pools(dense: tuple[torch.Tensor, torch.Tensor], sparse: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Return each query's candidates by rising position."""
    pools = []
    for dense_positions, dense_scores, sparse_positions, sparse_scores in zip(*dense, *sparse, strict=True):
        has_vector, shares_term = dense_scores > -torch.inf, sparse_scores > 0
        pools.append(torch.unique(torch.cat([dense_positions[has_vector], sparse_positions[shares_term]])))
    return pools


def _place(pool: torch.Tensor, positions: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the scores in the order of the pool, NaN for those that are not known yet."""
    placed = torch.full((len(pool),), torch.nan)
    if len(pool) and len(positions):
        places = torch.searchsorted(pool, positions).clamp_(max=len(pool) - 1)
        inside = pool[places] == positions
        placed[places[inside]] = scores[inside]
    return placed


def _complete(
    engine: Ranker, queries: QueryVectors, kind: str, pools: list[torch.Tensor], placed: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the placed scores with the engine's in place of the unknown ones."""
    unknown = [scores.isnan() for scores in placed]
    if any(bool(rows.any()) for rows in unknown):
        asked = [pool[rows] for pool, rows in zip(pools, unknown, strict=True)]
        found = engine.scores_at(queries, kind, asked)
        for scores, rows, new in zip(placed, unknown, found, strict=True):
            scores[rows] = new
    return placed


def _best(
    pool: torch.Tensor, dense: torch.Tensor, sparse: torch.Tensor, top_k: int, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    fused = fuse(dense, sparse, weight)
    order = torch.sort(fused, descending=True, stable=True).indices[:top_k]  # the pool rises, so ties keep its order
    return pool[order], fused[order]


def fuse(dense: torch.Tensor, sparse: torch.Tensor, weight: float = 0.5) -> torch.Tensor:
    """Hybrid score of one query's candidates, paper Eq. 4: both sides min-max normalised, then interpolated.

    Args:
        dense, sparse: float32 [C], the same candidates; a score that is not finite counts as missing and becomes 0.
        weight: the dense share.

    Returns:
        float32 [C] in [0, 1]

    >>> fuse(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([5.0, 5.0, 5.0]))
    tensor([0.0000, 0.5000, 0.2500])
    """
    return weight * _min_max(dense) + (1.0 - weight) * _min_max(sparse)


def _min_max(scores: torch.Tensor) -> torch.Tensor:
    finite = torch.isfinite(scores)
    if not bool(finite.any()):
        return torch.zeros_like(scores)
    low, high = scores[finite].aminmax()
    spread = high - low
    return torch.where(finite, (scores - low) / (spread if spread > 0 else 1.0), 0.0)


def pad_rows(rows: list[torch.Tensor], value: float) -> torch.Tensor:
    """Stack rows of different lengths.

    >>> pad_rows([torch.tensor([1, 2]), torch.tensor([3])], -1).tolist()
    [[1, 2], [3, -1]]
    """
    if not rows:
        return torch.empty(0, 0)
    padded = rows[0].new_full((len(rows), max(len(row) for row in rows)), value)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
