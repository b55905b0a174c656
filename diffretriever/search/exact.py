"""Exact search in torch, block by block: the reference that every other engine is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from typing import Any

import torch

from ..files.compiling import numba_works
from ..model.batching import check_count, run_side_by_side
from ..model.scoring import (
    LEAST_LENGTH,
    ROW_TILE,
    PreparedQueries,
    cosines_of,
    maxsim,
    maxsim_of,
    mean_vectors,
    rows_at_once,
    sum_lengths,
)
from ..store.manifest import Settings
from ..store.segments import QueryVectors, Rows, Segment, existing, resident, segments_of
from .engine import Ranking
from .rough import longest_vectors, most_wrong, possible_best, rough_products_pay, rough_similarities
from .sparse import Postings, build_postings, join_rows, sparse_of
from .topk import MAX_POSITIONS, TopK
from .workspace import Workspace

# Numbers held at once in a block of vectors and in its similarities. On a CPU a thread's share should stay in its
# caches; with few queries the product is short, and larger blocks save more in calls than the caches would.
BLOCK_NUMBERS = 64 * 1024 * 1024
CPU_BLOCK_NUMBERS, CPU_FEW, CPU_FEW_BLOCK_NUMBERS = 384 * 1024, 32, 1536 * 1024
FEW_SIMILARITIES = 256 * 1024  # ranked at once where the products need no block of vectors
MOST_THREADS = 16  # of which a block takes account; memory stays bounded
RANGE_NUMBERS, RANGES_A_WORKER = 8 * 1024 * 1024, 8  # least numbers, and most ranges, that a thread ranks on its own
MAX_COLUMNS = 256  # query vectors multiplied with a block at once
FEW = 64  # up to so many passages for each chosen one, the index that is there is faster than one of the chosen
ROUGH_RANGE = 1024 * 1024  # passages whose rough scores are held at once
ROUGH_SHARE = 32  # passages for each one asked for, from which rough scores are worth their while
MOST_CHOSEN = 4  # where more than one passage in so many may be among the best, to score all takes no longer
MOST_IN_VAIN = 8  # more ranges where that was so than where it was not: so it will be for the next questions
COMPILED_FROM = 64 * 1024 * 1024  # numbers of a collection from which compiling pays: 10 ms less a query


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
        self.device = torch.device(device or "cpu")
        self.block_size = None if block_size is None else check_count("block_size", block_size)
        self._segments: list[Segment] = segments_of(passages, ids)
        self._offsets = torch.tensor([segment.offset for segment in self._segments], device="cpu")
        self.settings: Settings | None = None if isinstance(passages, Mapping) else passages.manifest
        if in_memory:
            on_cpu = self.device.type == "cpu"
            self._segments = [part.in_memory() if on_cpu else resident(part, self.device) for part in self._segments]
        self._length = sum(segment.length for segment in self._segments)
        if self._length >= MAX_POSITIONS:
            raise ValueError(f"one searcher holds at most {MAX_POSITIONS - 1} passages, got {self._length}.")
        self._postings: list[Postings] | None = None
        self._spare: list[Workspace] = []  # that no thread uses now
        self._in_vain = 0  # ranges whose rough scores chose too many, less those where they did not

    def __len__(self) -> int:
        return self._length

    def ids(self, positions: Sequence[int]) -> list[str]:
        """See `Engine.ids`."""
        return [segment.text_id(row) for segment, row in self.find(positions)]

    def texts(self, positions: Sequence[int]) -> list[str | None]:
        """See `Engine.texts`."""
        return [segment.text(row) for segment, row in self.find(positions)]

    def rank(self, queries: QueryVectors, kind: str, top_k: int) -> Ranking:
        """See `Engine.rank`; every slot is used.

        Raises:
            ValueError: the sides' dimensions differ, or a vector is not finite.
        """
        top_k = min(top_k, self._length)
        if kind == "sparse_max":
            return self._rank_sparse(queries, top_k)
        columns = 1 if kind == "single_dense" else queries.dense.shape[1]
        batch = max(1, MAX_COLUMNS // columns)
        groups = [self._prepare(part, kind) for part in queries.batches(batch)]
        best = [TopK(len(group), top_k, self.device) for group in groups]
        rank_range, ranges = partial(self._rank_range, groups, kind, top_k), self._ranges()
        if rows_at_once(groups[0]):
            lengths = self._lengths if kind == "single_dense" else None  # here: threads would each make their own
            rank_range = partial(self._rank_few, groups[0], lengths, top_k)
            worth_it = self._in_vain < MOST_IN_VAIN and top_k * ROUGH_SHARE < max(map(len, ranges), default=0)
            if worth_it and rough_products_pay(self._segments):
                rank_range = partial(self._rank_roughly_first, rank_range, groups[0], kind, self._longest, top_k)
        with closing(run_side_by_side(rank_range, ranges, self._workers())) as found:
            for _, parts in found:
                for kept, part in zip(best, parts, strict=True):
                    kept.merge(part)
        results = [kept.result() for kept in best]
        return torch.cat([positions for positions, _ in results]), torch.cat([scores for _, scores in results])

    def scores_at(self, queries: QueryVectors, kind: str, positions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Engine.scores_at`; the vectors of the chosen passages alone are read."""

        def dense_scores(query: QueryVectors, wanted: torch.Tensor) -> torch.Tensor:
            return self._dense_scores(kind, self._prepare(query, kind), wanted)[:, 0]

        scores_of = self._sparse_scores if kind == "sparse_max" else dense_scores
        pairs = zip(queries.batches(1), positions, strict=True)
        return [
            scores_of(query, wanted) if len(wanted) else torch.empty(0, dtype=torch.float32, device="cpu")
            for query, wanted in pairs
        ]

    def find(self, positions: Sequence[int]) -> Iterator[tuple[Segment, int]]:
        """Yield each position's segment and the row there; the positions may come in any order."""
        numbers = self._numbers(torch.tensor(positions, dtype=torch.int64, device="cpu")).tolist()
        for number, position in zip(numbers, positions, strict=True):
            segment = self._segments[number]
            yield segment, position - segment.offset

    def _rank_range(self, groups: Sequence[PreparedQueries], kind: str, top_k: int, positions: range) -> list[TopK]:
        """Rank consecutive passages for groups of queries."""
        best = [TopK(len(group), top_k, self.device) for group in groups]
        with self._workspace() as workspace:
            for segment, start, stop in self._blocks(positions, groups[0]):
                vectors, mask = self._read(segment, start, stop, workspace)
                if kind == "single_dense":
                    vectors, mask = mean_vectors(vectors, mask, workspace.take)
                for group, kept in zip(groups, best, strict=True):
                    kept.update(maxsim(vectors, mask, group, workspace.take), segment.offset + start)
        return best

    def _rank_few(
        self, queries: PreparedQueries, known: torch.Tensor | None, top_k: int, positions: range
    ) -> list[TopK]:
        """Rank consecutive passages for a few queries on a CPU; `known` is `_lengths` for means, else None."""
        best = TopK(len(queries), top_k)
        with self._workspace() as workspace:
            for segment, start, stop in self._blocks(positions, queries):
                lengths = None
                if known is not None:  # first: what it may have to read is then still near
                    lengths = self._lengths_between(known, segment, start, stop, workspace)
                rows, mask = slice(start, stop), self._mask(segment, start, stop)
                best.update(self._few_scores(segment, rows, mask, lengths, queries, workspace), segment.offset + start)
        return [best]

    def _few_scores(
        self,
        segment: Segment,
        rows: Rows,
        mask: torch.Tensor | None,
        lengths: torch.Tensor | None,
        queries: PreparedQueries,
        workspace: Workspace,
    ) -> torch.Tensor:
        """Return the scores of some passages with a few queries, float32 [p, Q]: cosines with lengths, else MaxSim."""
        if self._compiled is not None:
            return self._compiled(*segment.stored(rows), mask, lengths, queries)
        products = segment.similarities(rows, queries, workspace.take)
        count = len(rows) if isinstance(rows, torch.Tensor) else rows.stop - rows.start
        return _scores(products, mask, lengths, count, queries)

    def _few_scores_at(
        self,
        held: Sequence[tuple[Segment, torch.Tensor]],
        mask: torch.Tensor | None,
        lengths: torch.Tensor | None,
        queries: PreparedQueries,
        workspace: Workspace,
    ) -> torch.Tensor:
        """Return the same of rows of several segments, one after the other; `mask` and `lengths` are of all."""
        counts = [len(rows) for _, rows in held]
        masks = [None] * len(held) if mask is None else mask.split(counts)
        known = [None] * len(held) if lengths is None else lengths.split(counts)
        scores = [
            self._few_scores(segment, rows, there, length, queries, workspace).clone()
            for (segment, rows), there, length in zip(held, masks, known, strict=True)
        ]
        return torch.cat(scores)

    @cached_property
    def _compiled(self) -> Callable[..., torch.Tensor] | None:
        """What scores passages in one reading, where numba is installed and there are enough that compiling pays."""
        numbers = sum(part.length * part.block(0, 1).numel() for part in self._segments if part.length)
        if numbers < COMPILED_FROM or not numba_works():
            return None
        from .compiled import scores_of_stored, takes

        return scores_of_stored if all(takes(part) for part in self._segments) else None

    def _rank_roughly_first(
        self,
        rank_all: Callable[[range], list[TopK]],
        queries: PreparedQueries,
        kind: str,
        longest: torch.Tensor,
        top_k: int,
        positions: range,
    ) -> list[TopK]:
        """Rank consecutive passages of bfloat16: rough scores say which may be among the best, exact ones rank these.

        Args:
            rank_all: `_rank_few` of the same queries, where too many may be.
            queries, kind, top_k, positions: what is asked for.
            longest: `_longest`.
        """
        best = TopK(len(queries), top_k)
        for start in range(positions.start, positions.stop, ROUGH_RANGE):
            part = range(start, min(start + ROUGH_RANGE, positions.stop))
            chosen = possible_best(*self._rough_scores(queries, kind, longest, part), min(top_k, len(part))) + start
            if MOST_CHOSEN * len(chosen) < len(part):
                self._in_vain = max(self._in_vain - 1, -MOST_IN_VAIN)
                best.update_at(self._dense_scores(kind, queries, chosen), chosen)
            else:
                self._in_vain += 1
                best.merge(*rank_all(part))
        return [best]

    def _rough_scores(
        self, queries: PreparedQueries, kind: str, known: torch.Tensor, positions: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rough scores of consecutive passages, and the most that each may be off, both float32 [P, Q]."""
        scores, wrong, unit = [], [], most_wrong(queries)
        with self._workspace() as workspace:
            for segment, start, stop in self._blocks(positions, queries):
                block, mask = segment.block(start, stop), self._mask(segment, start, stop)
                longest = known[segment.offset + start : segment.offset + stop]
                if longest.isnan().any():
                    longest.copy_(longest_vectors(block, mask))
                room, lengths = longest[:, None] * unit, None
                if kind == "single_dense":
                    lengths = self._lengths_between(self._lengths, segment, start, stop, workspace)
                    room = room * (block.shape[1] / lengths.clamp(min=LEAST_LENGTH))[:, None]
                products = rough_similarities(block.flatten(0, 1), queries, workspace.take)
                scores.append(_scores(products, mask, lengths, stop - start, queries).clone())
                wrong.append(room)
        return torch.cat(scores), torch.cat(wrong)

    @cached_property
    def _lengths(self) -> torch.Tensor:
        """Of the sums of the passages' vectors, float32 [P]; NaN where not known yet."""
        return _not_known(self._length)

    @cached_property
    def _longest(self) -> torch.Tensor:
        """Of the longest of each passage's vectors, float32 [P]; NaN where not known yet."""
        return _not_known(self._length)

    def _lengths_between(
        self, known: torch.Tensor, segment: Segment, start: int, stop: int, workspace: Workspace
    ) -> torch.Tensor:
        """Return the lengths of the sums of passages' vectors, float32 [p]; they are computed once."""
        lengths = known[segment.offset + start : segment.offset + stop]
        if lengths.isnan().any():
            step = max(1, CPU_FEW_BLOCK_NUMBERS // segment.block(0, 1).numel())  # fewer than are ranked at once
            for first, part in zip(range(start, stop, step), lengths.split(step), strict=True):
                part.copy_(sum_lengths(*self._read(segment, first, min(first + step, stop), workspace)))
        return lengths

    def _lengths_at(
        self, wanted: torch.Tensor, held: Sequence[tuple[Segment, torch.Tensor]], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the same of the passages at rising positions."""
        known = self._lengths
        if known[wanted].isnan().any():
            vectors = torch.cat([segment.rows(rows).to(self.device) for segment, rows in held])
            known[wanted] = sum_lengths(vectors, mask)
        return known[wanted]

    def _workers(self) -> int:
        """Return how many ranges of passages are ranked at the same time."""
        return min(MOST_THREADS, torch.get_num_threads()) if self.device.type == "cpu" else 1

    def _ranges(self) -> list[range]:
        """Cut the passages into ranges, a thread each: torch's own would wait for each other after each operation."""
        workers = self._workers()
        if workers == 1:
            return [range(self._length)]
        _, num_vectors, width = self._segments[0].block(0, 1).shape
        size = max(RANGE_NUMBERS // (num_vectors * width), -(-self._length // (RANGES_A_WORKER * workers)))
        return [range(start, min(start + size, self._length)) for start in range(0, self._length, size)]

    def _prepare(self, queries: QueryVectors, kind: str) -> PreparedQueries:
        vectors, mask = queries.dense.to(self.device), queries.mask.to(self.device)
        if kind == "single_dense":
            return PreparedQueries.of(*mean_vectors(vectors, mask))
        return PreparedQueries.of(vectors, mask)

    def _dense_scores(self, kind: str, prepared: PreparedQueries, wanted: torch.Tensor) -> torch.Tensor:
        """Return the dense scores of Q queries with the passages at rising positions, float32 [C, Q]."""
        scores = torch.empty(len(wanted), len(prepared), dtype=torch.float32, device="cpu")
        step = self._step(self._segments[0], prepared)
        with self._workspace() as workspace:
            for part, found in zip(wanted.split(step), scores.split(step), strict=True):
                held = list(self._locate(part))
                mask = self._masks(held)
                if rows_at_once(prepared):  # as in a ranking, to the same last bit
                    lengths = self._lengths_at(part, held, mask) if kind == "single_dense" else None
                    made = self._few_scores_at(held, mask, lengths, prepared, workspace)
                else:
                    vectors = torch.cat([segment.rows(rows).to(self.device) for segment, rows in held])
                    if kind == "single_dense":
                        vectors, mask = mean_vectors(vectors, mask, workspace.take)
                    made = maxsim(vectors, mask, prepared, workspace.take)
                found.copy_(made)
        return scores

    def _sparse_scores(self, query: QueryVectors, wanted: torch.Tensor) -> torch.Tensor:
        """Return the sparse scores of one query with the passages at rising positions, float32 [C]."""
        (indices,), (values,) = query.require_sparse()
        if self._length <= FEW * len(wanted):
            return torch.cat([part.scores(indices, values) for part in self._parts()])[wanted]
        found = []
        for segment, rows in self._locate(wanted):
            terms, weights = sparse_of(segment)
            found.append((terms[rows], weights[rows]))
        # an index of these alone adds up in the same order as that of all passages, to the same last bit
        return Postings.build(*join_rows(found), offset=0, terms=indices[values != 0]).scores(indices, values)

    def _masks(self, held: Sequence[tuple[Segment, torch.Tensor]]) -> torch.Tensor | None:
        """Return which vectors of chosen rows exist, bool [C, K_p]; None where all do."""
        if all(segment.mask(0, 0) is None for segment, _ in held):
            return None
        masks = ((existing(segment, 0, segment.length), rows) for segment, rows in held)
        return torch.cat([mask[rows.to(mask.device)].to(self.device) for mask, rows in masks])

    def _locate(self, positions: torch.Tensor) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Yield each segment that holds some of the rising positions, and their rows there."""
        held, counts = torch.unique_consecutive(self._numbers(positions), return_counts=True)
        for number, inside in zip(held.tolist(), positions.split(counts.tolist()), strict=True):
            segment = self._segments[number]
            yield segment, inside - segment.offset

    def _numbers(self, positions: torch.Tensor) -> torch.Tensor:
        """Return which segment each position lies in, int64."""
        return torch.searchsorted(self._offsets, positions, right=True) - 1

    def _blocks(self, positions: range, queries: PreparedQueries) -> Iterator[tuple[Segment, int, int]]:
        """Yield (segment, first row, row behind the last) of blocks of consecutive passages."""
        for segment in self._segments:
            begin, end = (
                min(max(place - segment.offset, 0), segment.length) for place in (positions.start, positions.stop)
            )
            step = self._step(segment, queries, rows_at_once(queries) > 0)
            for start in range(begin, end, step):
                yield segment, start, min(start + step, end)

    def _read(
        self, segment: Segment, start: int, stop: int, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a block's vectors, float32 [p, K_p, H] in reused memory, and their mask, on the device."""
        vectors = segment.block(start, stop)
        if vectors.dtype != torch.float32 or vectors.device.type != self.device.type:
            vectors = workspace.take("vectors", tuple(vectors.shape)).copy_(vectors)
        return vectors, self._mask(segment, start, stop)

    def _mask(self, segment: Segment, start: int, stop: int) -> torch.Tensor | None:
        """Return which of a block's vectors exist, bool [p, K_p] on the device; None where all do."""
        mask = segment.mask(start, stop)
        return None if mask is None else mask.to(self.device)

    def _step(self, segment: Segment, queries: PreparedQueries, unread: bool = False) -> int:
        """Return how many passages make a block; `unread` where no block of their vectors is made."""
        if self.block_size is not None or not segment.length:
            return self.block_size or 1
        _, num_vectors, width = segment.block(0, 1).shape
        columns, budget, tile = len(queries.matrix), BLOCK_NUMBERS, rows_at_once(queries) or ROW_TILE
        if unread:
            budget, width = FEW_SIMILARITIES, columns
        elif self.device.type == "cpu":
            each = CPU_FEW_BLOCK_NUMBERS if columns < CPU_FEW else CPU_BLOCK_NUMBERS
            budget = each * min(MOST_THREADS, torch.get_num_threads())
        return max(1, budget // max(1, tile * num_vectors * max(width, columns))) * tile

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

    def _rank_sparse(self, queries: QueryVectors, top_k: int) -> Ranking:
        indices, values = queries.require_sparse()
        results = []
        for number in range(len(queries)):
            best = TopK(1, top_k)
            for part in self._parts():
                best.update(part.scores(indices[number], values[number])[:, None], part.offset)
            results.append(best.result())
        return torch.cat([positions for positions, _ in results]), torch.cat([scores for _, scores in results])

    def _parts(self) -> list[Postings]:
        if self._postings is None:
            self._postings = build_postings(self._segments)
        return self._postings


def _scores(
    products: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    count: int,
    queries: PreparedQueries,
) -> torch.Tensor:
    """Return the scores of `count` passages from their vectors' products: cosines with lengths, else MaxSim."""
    if lengths is not None:
        return cosines_of(products, mask, lengths, queries)
    return maxsim_of(products, mask, products.shape[1] // count, queries)


def _not_known(count: int) -> torch.Tensor:
    """Return float32 [P] of NaN, to be filled in."""
    with torch.inference_mode(False):  # see `Workspace.take`
        return torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")
