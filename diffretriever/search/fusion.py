"""Hybrid search: the candidates of both sides, their scores min-max normalised and averaged (paper §3.3, Eq. 4).

Two fusions go by this name. "exact" asks for both scores of every candidate, so that what one side ranked just outside
its list keeps its score. "runs" has the two rankings alone, as the method's research code, which made the paper's
tables: a passage that a ranking lacks counts 0 there, as much as that ranking's last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model.scoring import EVEN_FUSION, check_weight, fuse
from ..store.segments import QueryVectors
from .engine import Engine, Ranking
from .results import Results, pad_rows


@dataclass(frozen=True)
class Sides:
    """Each query's candidates with the exact scores of both sides, to be fused with any weight.

    Args:
        engine: knows the passages' ids.
        positions: for each query its candidates, int64 [C], rising; C differs.
        dense, sparse: float32 [C] each; -inf where a score is missing, 0 for a passage without a term in common.
        query_ids: the queries' ids, if they came from a store.
    """

    engine: Engine
    positions: list[torch.Tensor]
    dense: list[torch.Tensor]
    sparse: list[torch.Tensor]
    query_ids: list[str] | None = None

    def fuse(self, weight: float = EVEN_FUSION, top_k: int = 10) -> Results:
        """Rank the candidates by the hybrid score; each side is normalised over those that it has a score of.

        Args:
            weight: the dense scores' share, 0 to 1.
            top_k: passages a query.

        Returns:
            The results, best first, ties by position in the store.

        Raises:
            ValueError: the weight lies outside 0 to 1.
        """
        check_weight(weight)
        positions, scores = [], []
        for pool, dense, sparse in zip(self.positions, self.dense, self.sparse, strict=True):
            fused = fuse(dense, sparse, weight)
            order = torch.sort(fused, descending=True, stable=True).indices[:top_k]  # the pool rises: ties keep order
            positions.append(pool[order])
            scores.append(fused[order])
        return Results.of(self.engine, pad_rows(positions, -1), pad_rows(scores, -torch.inf), self.query_ids)


def join_sides(
    engine: Engine, queries: QueryVectors, dense_kind: str, dense: Ranking, sparse: Ranking, depth: int, fusion: str
) -> Sides:
    """Join two rankings of the same queries.

    A query's candidates are its `depth` best passages by the dense score together with its `depth` best by the sparse
    score, of those that have a vector or share a term with it. In the fusion "exact", the scores that only one of them
    has are asked for; where `depth` covers the collection, every passage is a candidate, and the fused result is that
    of `model.score`. In the fusion "runs" they are missing.

    Args:
        engine: scores passages.
        queries: Q queries.
        dense_kind: "single_dense" or "multi_dense".
        dense, sparse: the engine's rankings of the queries, [Q, at most depth].
        depth: passages asked for in each.
        fusion: one of FUSIONS.
    """
    exact = fusion == "exact"
    everything = torch.arange(len(engine), device="cpu") if exact and depth >= len(engine) else None
    pools = [_pool(*row) if everything is None else everything for row in zip(*dense, *sparse, strict=True)]
    both = []
    for kind, ranking in ((dense_kind, dense), ("sparse_max", sparse)):
        placed = [_place(*row) for row in zip(pools, *ranking, strict=True)]
        if exact:
            placed = _complete(engine, queries, kind, pools, placed)
        else:  # a ranking ends where the scores say nothing; NaN, not placed, is no score either
            least = 0.0 if kind == "sparse_max" else -torch.inf
            placed = [torch.where(scores > least, scores, -torch.inf) for scores in placed]
        both.append(placed)
    return Sides(engine, pools, both[0], both[1], queries.ids)


def _pool(
    dense_positions: torch.Tensor,
    dense_scores: torch.Tensor,
    sparse_positions: torch.Tensor,
    sparse_scores: torch.Tensor,
) -> torch.Tensor:
    """Return a query's candidates by rising position."""
    has_vector, shares_term = dense_scores > -torch.inf, sparse_scores > 0
    return torch.unique(torch.cat([dense_positions[has_vector], sparse_positions[shares_term]]))


def _place(pool: torch.Tensor, positions: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the scores in the order of the pool, NaN for those that are not known yet."""
    placed = torch.full((len(pool),), torch.nan, dtype=torch.float32, device="cpu")
    if len(pool) and len(positions):
        places = torch.searchsorted(pool, positions).clamp_(max=len(pool) - 1)
        inside = pool[places] == positions
        placed[places[inside]] = scores[inside]
    return placed


def _complete(
    engine: Engine, queries: QueryVectors, kind: str, pools: Sequence[torch.Tensor], placed: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the placed scores with the engine's in place of the unknown ones."""
    unknown = [scores.isnan() for scores in placed]
    if any(bool(rows.any()) for rows in unknown):
        asked = [pool[rows] for pool, rows in zip(pools, unknown, strict=True)]
        found = engine.scores_at(queries, kind, asked)
        for scores, rows, new in zip(placed, unknown, found, strict=True):
            scores[rows] = new
    return placed
