"""The one interface to search: the same calls for exact search in this process and for an engine elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..model.batching import check_count
from ..model.scoring import EVEN_FUSION, check_mode, fusion_weight_of
from ..store.identity import check_searchable, check_sides
from ..store.segments import QueryVectors, query_vectors
from .engine import Engine, Ranking
from .exact import ExactEngine
from .fusion import Sides, join_sides
from .modes import CANDIDATES, FUSED, FUSIONS, SPARSE
from .results import Results

BATCH_NUMBERS = 8 * 1024 * 1024  # ranked positions and scores held at once
as_they_are = partial(torch.autocast, "cpu", enabled=False)  # it would round scores, and cannot join float16's shards


class Rankings:
    """Some queries ranked for several modes; what two modes need is ranked once, when the first asks for it.

    Args:
        engine: holds the passages.
        queries: Q queries.
        depth: passages ranked a query; in the fusion modes, candidates of each side.
        fusion: one of FUSIONS.
    """

    def __init__(self, engine: Engine, queries: QueryVectors, depth: int, fusion: str) -> None:
        self._engine, self._queries, self._depth = engine, queries, min(depth, len(engine))
        self._fusion = fusion
        self._ranked: dict[str, Ranking] = {}
        self._sides: dict[str, Sides] = {}

    def results(self, mode: str, top_k: int, fusion_weight: float = EVEN_FUSION) -> Results:
        """Return the best passages in one mode; see `Searcher.search`."""
        if mode in FUSED:
            return self.sides(mode).fuse(fusion_weight, top_k)
        positions, scores = (tensor[:, :top_k] for tensor in self._ranking(mode))
        found = (positions >= 0) & (scores > (0.0 if mode == "sparse_max" else -torch.inf))
        positions, scores = positions.masked_fill(~found, -1), scores.masked_fill(~found, -torch.inf)
        return Results.of(self._engine, positions, scores, self._queries.ids)

    def sides(self, mode: str) -> Sides:
        """Return the candidates of a fusion mode; see `Searcher.rank_sides`."""
        if mode not in self._sides:
            sparse, dense = self._ranking("sparse_max"), self._ranking(FUSED[mode])
            asked = (self._engine, self._queries, FUSED[mode], dense, sparse, self._depth, self._fusion)
            with as_they_are():
                self._sides[mode] = join_sides(*asked)
        return self._sides[mode]

    def _ranking(self, kind: str) -> Ranking:
        if kind == "sparse_max":
            self._queries.require_sparse()
        if kind not in self._ranked:
            nothing = not len(self._queries) or not len(self._engine)
            empty = torch.empty(len(self._queries), 0, dtype=torch.float32, device="cpu")
            with as_they_are():
                ranked = (empty.long(), empty) if nothing else self._engine.rank(self._queries, kind, self._depth)
            self._ranked[kind] = ranked
        return self._ranked[kind]


class Searcher:
    """Searches passages in the five scoring modes.

    Args:
        passages: a store, an output of `encode_texts`, or an engine such as `QdrantEngine`.
        ids: the passages' ids, for an output of `encode_texts`; None numbers them.
        fusion: how the fusion modes fuse: "exact", both scores of each candidate, or "runs", each side's own ranking
            alone, as in the method's research code.
        device, in_memory, block_size: for exact search, see `ExactEngine`.

    Raises:
        ValueError: the passages' tensors do not go together, or are the queries'; no such fusion, or options that an
            engine does not take.

    >>> passages = {"repr_hidden": torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])}
    >>> searcher = Searcher(passages, ids=["east", "north"])
    >>> searcher.search({"repr_hidden": torch.tensor([[[0.0, 1.0]]])}, "multi_dense", top_k=1).ids
    [['north']]
    """

    def __init__(self, passages: Any, ids: Sequence[str] | None = None, fusion: str = "exact", **options: Any) -> None:
        if fusion not in FUSIONS:
            raise ValueError(f"fusion {fusion!r} is not known; it is one of {', '.join(FUSIONS)}.")
        self.fusion = fusion
        check_sides(passages, None, "`passages`")
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
        fusion_weight: float | None = None,
    ) -> Results:
        """Find each query's best passages.

        Args:
            queries: a store of queries or an output of `encode_texts`, Q of them; K_q may differ from K_p.
            mode: one of MODES.
            top_k: passages a query.
            candidates: in the fusion modes, how many of each side are fused (see `rank_sides`); None takes all.
            fusion_weight: in the fusion modes, the dense scores' share; None is half, whatever the model recommends.

        Returns:
            The results, best first, ties by position in the store. A passage without vectors, or in `sparse_max`
            without a term in common with the query, is no result.

        Raises:
            ValueError: a wrong argument, queries of another model than the passages', passages instead of queries,
                vectors that are missing, not finite or of another dimension.
        """
        check_mode(mode)
        weight = fusion_weight_of(None, fusion_weight)
        top_k, candidates = check_count("top_k", top_k), _count_or_all("candidates", candidates)
        depth: int | None = top_k
        if mode in FUSED:  # every hit is a candidate, so fewer candidates than hits would cut the ranking short
            depth = None if candidates is None else max(candidates, top_k)
        vectors = self._vectors(queries)
        size = BATCH_NUMBERS // max(1, min(depth or len(self), len(self)))
        parts = list(vectors.batches(size)) or [vectors]
        return Results.joined([self.rank(part, depth).results(mode, top_k, weight) for part in parts])

    def encode(self, model: Any, queries: Sequence[str], modes: Iterable[str]) -> Mapping[str, Any]:
        """Encode queries as the passages were encoded: with or without the content filter.

        Args:
            model: from `AutoModel.from_pretrained`.
            queries: their texts.
            modes: the scoring modes to be searched in; sparse vectors are computed where one of them needs them.

        Returns:
            The output of `encode_texts`.
        """
        there = self.engine.settings
        content_filter = there is None or bool(there.options.get("content_filter", True))
        sparse = any(mode in SPARSE for mode in modes)
        encoded: Mapping[str, Any] = model.encode_texts(
            queries, is_query=True, compute_sparse=sparse, content_filter=content_filter
        )
        return encoded

    def rank_sides(self, queries: Any, mode: str, candidates: int | None = CANDIDATES) -> Sides:
        """Find the candidates of a fusion and score both sides; `rank_sides(…).fuse(weight, top_k)` ranks them.

        A query's candidates are its `candidates` best passages by the dense score together with its `candidates` best
        by the sparse score, of those that have a vector or share a term with it. In the fusion "exact", what one side
        alone found is scored by the other too; in "runs" that score is missing.

        Args:
            queries: as for `search`; the candidates of all Q of them are held at once.
            mode: a fusion mode.
            candidates: of each side; None takes all passages, and the fused score is then that of `model.score`.

        Raises:
            ValueError: as for `search`, or the mode is no fusion.
        """
        check_mode(mode)
        candidates = _count_or_all("candidates", candidates)
        if mode not in FUSED:
            raise ValueError(f"scoring mode {mode!r} has one side; the fusion modes are {', '.join(FUSED)}.")
        return self.rank(queries, candidates).sides(mode)

    def rank(self, queries: Any, depth: int | None = CANDIDATES) -> Rankings:
        """Prepare to rank queries in several modes, sharing what these have in common.

        Args:
            queries: as for `search`.
            depth: passages ranked a query; in the fusion modes, candidates of each side. None ranks all.

        Raises:
            ValueError: as for `search`.
        """
        depth = _count_or_all("depth", depth)
        return Rankings(self.engine, self._vectors(queries), len(self) if depth is None else depth, self.fusion)

    def _vectors(self, queries: Any) -> QueryVectors:
        """Bring queries into one form; refuse those that another model encoded."""
        if isinstance(queries, QueryVectors):
            return queries
        check_sides(None, queries, "`passages`")
        if hasattr(queries, "manifest") and self.engine.settings is not None:
            check_searchable(self.engine.settings, queries.manifest, "the collection")
        with as_they_are():
            return query_vectors(queries)


def _count_or_all(name: str, value: int | None) -> int | None:
    """Return a number of passages; None stands for all."""
    return None if value is None else check_count(name, value)
