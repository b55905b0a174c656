"""Exact search in torch, block by block: the reference that every other engine is measured against."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..store.manifest import Settings
from ..store.segments import QueryVectors, Segment, resident, segments_of
from .dense import ROW_TILE, PreparedQueries, Workspace, maxsim, mean_vectors
from .sparse import Postings, build_postings
from .topk import MAX_POSITIONS, TopK

# Numbers held at once in a block of vectors and in its similarities. On a CPU a thread's share should stay in its
# caches; with few queries the product is short, and larger blocks save more in calls than the caches would.
BLOCK_NUMBERS = 64 * 1024 * 1024
CPU_BLOCK_NUMBERS, CPU_FEW, CPU_FEW_BLOCK_NUMBERS = 384 * 1024, 32, 1024 * 1024
MOST_THREADS = 16  # of which a block takes account; memory stays bounded
MAX_COLUMNS = 256  # query vectors multiplied with a block at once


class ExactEngine:
    """Scores every passage; memory is bounded by a block, whatever the collection's size.

    Args:
        passages: a store (its vectors are memory-mapped), or an output of `encode_texts`.
        ids: the passages' ids, for an output of `encode_texts`; None numbers them.
        device: where the dense scores are computed. The sparse ones are computed on the CPU.
        in_memory: copy the vectors to the device's memory first; else they are read block by block.
        block_size: passages a block; None fits it to the processor's caches.

    Raises:
        ValueError: the passages' tensors do not go together, or are more than 2^32 texts.
    """

    def __init__(
        self,
        passages: Any,
        ids: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        in_memory: bool = False,
        block_size: int | None = None,
    ) -> None:
        if block_size is not None and block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {block_size}.")
        self.device = torch.device(device or "cpu")
        self.block_size = block_size
        self._segments: list[Segment] = segments_of(passages)
        self._ids = Ids(passages, ids)
        self.settings: Settings | None = None if isinstance(passages, Mapping) else passages.manifest
        if in_memory:
            self._segments = [resident(segment, self.device) for segment in self._segments]
        self._length = sum(segment.length for segment in self._segments)
        if self._length >= MAX_POSITIONS:
            raise ValueError(f"one searcher holds at most {MAX_POSITIONS - 1} passages, got {self._length}.")
        self._postings: list[Postings] | None = None
        self._spare: list[Workspace] = []  # that no thread uses now

    def __len__(self) -> int:
        return self._length

    def ids(self, positions: Sequence[int]) -> list[str]:
        """Return the ids of passages."""
        return self._ids.at(positions)

    def texts(self, positions: Sequence[int]) -> list[str | None]:
        """Return the texts of passages, None where they are not stored."""
        found: list[str | None] = []
        offsets = [segment.offset for segment in self._segments]
        for position in positions:
            segment = self._segments[bisect_right(offsets, position) - 1]
            found.append(segment.text(position - segment.offset))
        return found

    def rank(self, queries: QueryVectors, kind: str, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank all passages.

        Args:
            queries: Q queries.
            kind: "single_dense", "multi_dense" or "sparse_max".
            top_k: passages a query.

        Returns:
            positions int64 and scores float32, both [Q, min(top_k, passages)], best first; of equal scores the first
            position comes first. A text without vectors scores -inf.

        Raises:
            ValueError: the sides' dimensions differ, or a vector is not finite.
        """
        top_k = min(top_k, self._length)
        if kind == "sparse_max":
            return self._rank_sparse(queries, top_k)
        columns = 1 if kind == "single_dense" else queries.dense.shape[1]
        batch = max(1, MAX_COLUMNS // columns)
        groups = [PreparedQueries.of(part, kind, self.device) for part in queries.batches(batch)]
        best = [TopK(len(group), top_k, self.device) for group in groups]
        columns = max(len(group.matrix) for group in groups)
        with self._workspace() as workspace:
            for first, vectors, mask in self._blocks(columns, workspace):
                if kind == "single_dense":
                    vectors, mask = mean_vectors(vectors, mask)
                for group, kept in zip(groups, best, strict=True):
                    kept.update(maxsim(vectors, mask, group, workspace), first)
        results = [kept.result() for kept in best]
        return torch.cat([positions for positions, _ in results]), torch.cat([scores for _, scores in results])

    def scores_at(self, queries: QueryVectors, kind: str, positions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Score chosen passages, a list of positions a query.

        Args:
            queries, kind: as for `rank`.
            positions: for each query, int64 [C], rising; C may differ.

        Returns:
            For each query its scores, float32 [C].
        """
        scores = []
        for query, wanted in zip(queries.batches(1), positions, strict=True):
            if kind == "sparse_max":
                scores.append(self._sparse_scores(query)[0][wanted])
            else:
                scores.append(self._dense_scores(query, kind, wanted))
        return scores

    def _dense_scores(self, query: QueryVectors, kind: str, wanted: torch.Tensor) -> torch.Tensor:
        """Return the dense scores of one query with the passages at rising positions, float32 [C]."""
        found = torch.empty(len(wanted))
        prepared = PreparedQueries.of(query, kind, self.device)
        with self._workspace() as workspace:
            for segment, inside, rows in self._locate(wanted):
                vectors = segment.rows(rows).to(self.device)
                mask = segment.mask(0, segment.length)
                mask = None if mask is None else mask[rows.to(mask.device)]
                if kind == "single_dense":
                    vectors, mask = mean_vectors(vectors, mask)
                found[inside] = maxsim(vectors, mask, prepared, workspace)[:, 0].cpu()
        return found

    def _locate(self, positions: torch.Tensor) -> Iterator[tuple[Segment, torch.Tensor, torch.Tensor]]:
        """Yield (segment, which of the positions lie in it, their rows there)."""
        for segment in self._segments:
            inside = (positions >= segment.offset) & (positions < segment.offset + segment.length)
            if bool(inside.any()):
                yield segment, inside, positions[inside] - segment.offset

    def _blocks(self, columns: int, workspace: Workspace) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Yield (first position, float32 [p, K_p, H] in reused memory, mask) of consecutive passages."""
        for segment in self._segments:
            step = self._step(segment, columns)
            for start in range(0, segment.length, step):
                stop = min(start + step, segment.length)
                stored = segment.block(start, stop)
                vectors = stored
                if stored.dtype != torch.float32 or stored.device.type != self.device.type:
                    vectors = workspace.take("vectors", tuple(stored.shape)).copy_(stored)
                mask = segment.mask(start, stop)
                yield segment.offset + start, vectors, None if mask is None else mask.to(self.device)

    def _step(self, segment: Segment, columns: int) -> int:
        """Return how many passages make a block."""
        if self.block_size is not None or not segment.length:
            return self.block_size or 1
        _, num_vectors, width = segment.block(0, 1).shape
        budget = BLOCK_NUMBERS
        if self.device.type == "cpu":
            each = CPU_FEW_BLOCK_NUMBERS if columns < CPU_FEW else CPU_BLOCK_NUMBERS
            budget = each * min(MOST_THREADS, torch.get_num_threads())
        return max(1, budget // max(1, ROW_TILE * num_vectors * max(width, columns))) * ROW_TILE

    @contextmanager
    def _workspace(self) -> Iterator[Workspace]:
        """Lend memory to one thread; what earlier searches used is used again."""
        try:
            workspace = self._spare.pop()
        except IndexError:
            workspace = Workspace(self.device)
        try:
            yield workspace
        finally:
            self._spare.append(workspace)

    def _rank_sparse(self, queries: QueryVectors, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices, values = queries.require_sparse()
        results = []
        for number in range(len(queries)):
            best = TopK(1, top_k)
            for part in self._parts():
                scores = torch.empty(part.length)
                part.scores(indices[number], values[number], scores)
                best.update(scores[:, None], part.offset)
            results.append(best.result())
        empty = torch.empty(0, top_k)
        if not results:
            return empty.long(), empty
        return torch.cat([positions for positions, _ in results]), torch.cat([scores for _, scores in results])

    def _sparse_scores(self, query: QueryVectors) -> torch.Tensor:
        """Return the sparse scores of the first query with every passage, float32 [1, passages]."""
        indices, values = query.require_sparse()
        scores = torch.empty(1, self._length)
        for part in self._parts():
            part.scores(indices[0], values[0], scores[0, part.offset : part.offset + part.length])
        return scores

    def _parts(self) -> list[Postings]:
        if self._postings is None:
            self._postings = build_postings(self._segments)
        return self._postings


class Ids:
    """Looks up ids by position; a store's are read shard by shard, when first needed."""

    def __init__(self, passages: Any, ids: Sequence[str] | None) -> None:
        self._given = ids
        if isinstance(passages, Mapping):
            self._shards: list[Any] = []
            length = len(passages["repr_hidden"])
            if ids is not None and len(ids) != length:
                raise ValueError(f"`ids` has {len(ids)} entries for {length} passages.")
            return
        if ids is not None:
            raise ValueError("a store knows its passages' ids; leave `ids` out.")
        self._shards = list(passages.shards())
        self._offsets = [shard.offset for shard in self._shards]

    def at(self, positions: Sequence[int]) -> list[str]:
        """Return the ids of passages."""
        if self._given is not None:
            return [self._given[position] for position in positions]
        if not self._shards:
            return [str(position) for position in positions]
        found = []
        for position in positions:
            shard = self._shards[bisect_right(self._offsets, position) - 1]
            found.append(shard.ids[position - shard.offset])
        return found
