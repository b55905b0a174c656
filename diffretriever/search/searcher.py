"""The one interface to search: the same calls for exact search in this process and for an engine elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..store.identity import check_searchable
from ..store.manifest import Settings
from ..store.segments import QueryVectors, query_vectors
from .exact import ExactEngine
from .fusion import Ranker, rank_fused
from .modes import CANDIDATES, FUSED, MODES


class Engine(Ranker, Protocol):
    """A `Ranker` that knows its passages' ids and the model that made them."""

    @property
    def settings(self) -> Settings | None:
        """What the passages were encoded with, where that is known."""

    def ids(self, positions: Sequence[int]) -> list[str]:
        """The ids of passages."""

    def texts(self, positions: Sequence[int]) -> list[str | None]:
        """The texts of passages, None where they are not kept."""


@dataclass(frozen=True)
class Hit:
    """One found passage."""

    id: str
    score: float
    position: int  # in the store


@dataclass(frozen=True)
class Results:
    """What a search found.

    Args:
        ids: each query's passages, best first; a query may have fewer than asked for.
        scores: float32 [Q, k], -inf where there is no passage.
        positions: int64 [Q, k], the passages' positions in the store, -1 where there is none.
        query_ids: the queries' ids, if they came from a store.
    """

    ids: list[list[str]]
    scores: torch.Tensor
    positions: torch.Tensor
    query_ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, query: int) -> list[Hit]:
        rows = zip(self.ids[query], self.scores[query].tolist(), self.positions[query].tolist(), strict=False)
        return [Hit(passage, score, position) for passage, score, position in rows]

    def __iter__(self) -> Iterator[list[Hit]]:
        return (self[query] for query in range(len(self)))

    def run(self, query_ids: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
        """Return {query id: {passage id: score}}, the form that evaluation tools read.

        Args:
            query_ids: one a query; None takes the store's.

        Raises:
            ValueError: no ids, or another number than there are queries.
        """
        names = self.query_ids if query_ids is None else list(query_ids)
        if names is None or len(names) != len(self):
            raise ValueError(f"there are {len(self)} queries and {len(names or [])} query ids; give one for each.")
        return {name: {hit.id: hit.score for hit in hits} for name, hits in zip(names, self, strict=True)}


class Searcher:
    """Searches passages in the five scoring modes.

    Args:
        passages: a store, an output of `encode_texts`, or an engine such as `QdrantEngine`.
        ids: the passages' ids, for an output of `encode_texts`; None numbers them.
        device, in_memory, block_size: for exact search, see `ExactEngine`.

    Raises:
        ValueError: the passages' tensors do not go together, or options that an engine does not take.

    >>> passages = {"repr_hidden": torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])}
    >>> searcher = Searcher(passages, ids=["east", "north"])
    >>> searcher.search({"repr_hidden": torch.tensor([[[0.0, 1.0]]])}, "multi_dense", top_k=1).ids
    [['north']]
    """

    def __init__(self, passages: Any, ids: Sequence[str] | None = None, **options: Any) -> None:
        if isinstance(passages, Mapping) or hasattr(passages, "shards"):
            self.engine: Engine = ExactEngine(passages, ids=ids, **options)
        elif hasattr(passages, "rank"):
            if ids is not None or options:
                raise ValueError(f"an engine knows its ids and options; leave out {['ids', *options]}.")
            self.engine = passages
        else:
            raise ValueError(
                "`passages` must be a store, an output of encode_texts or an engine, got "
                f"{type(passages).__name__}; open a store's folder with open_store(folder)."
            )

    def __len__(self) -> int:
        return len(self.engine)

    def search(
        self,
        queries: Any,
        mode: str = "multi_dense",
        top_k: int = 10,
        *,
        candidates: int | None = CANDIDATES,
        fusion_weight: float = 0.5,
    ) -> Results:
        """Find each query's best passages.

        Args:
            queries: a store of queries or an output of `encode_texts`, Q of them; K_q may differ from K_p.
            mode: one of MODES.
            top_k: passages a query.
            candidates: in the fusion modes, how many of each side are fused (see `rank_fused`); None takes all.
            fusion_weight: in the fusion modes, the dense scores' share.

        Returns:
            The results, best first, ties by position in the store. A passage without vectors, or in `sparse_max`
            without a term in common with the query, is no result.

        Raises:
            ValueError: a wrong argument, queries of another model than the passages', vectors that are missing, not
                finite or of another dimension.
        """
        if mode not in MODES:
            raise ValueError(f"scoring mode {mode!r} is not known; the modes are {', '.join(MODES)}.")
        for name, value in (("top_k", top_k), ("candidates", 1 if candidates is None else candidates)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number from 1, got {value!r}.")
        if not 0.0 <= fusion_weight <= 1.0:
            raise ValueError(f"`fusion_weight` must lie between 0 and 1, got {fusion_weight}.")
        stored = not isinstance(queries, Mapping) and hasattr(queries, "manifest")
        if stored and self.engine.settings is not None:
            check_searchable(self.engine.settings, queries.manifest, "the collection")
        vectors = query_vectors(queries)
        positions, scores = self._rank(vectors, mode, top_k, candidates, fusion_weight)
        found = positions >= 0
        if mode not in FUSED:
            found &= scores > (0.0 if mode == "sparse_max" else -torch.inf)
        positions, scores = positions.masked_fill(~found, -1), scores.masked_fill(~found, -torch.inf)
        wanted = positions[found].tolist()  # of all queries at once: for an engine elsewhere this is one request
        names = iter(self.engine.ids(wanted))
        ids = [[next(names) for _ in range(count)] for count in found.sum(dim=1).tolist()]
        return Results(ids, scores, positions, queries.ids() if stored else None)

    def _rank(
        self, queries: QueryVectors, mode: str, top_k: int, candidates: int | None, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if mode != "multi_dense" and mode != "single_dense":
            queries.require_sparse()
        if not len(queries) or not len(self.engine):
            empty = torch.empty(len(queries), 0)
            return empty.long(), empty
        if mode not in FUSED:
            return self.engine.rank(queries, mode, top_k)
        # every hit of a fused ranking is a candidate, so fewer candidates than hits would cut it short
        depth = None if candidates is None else max(candidates, top_k)
        return rank_fused(self.engine, queries, FUSED[mode], top_k, depth, weight)
