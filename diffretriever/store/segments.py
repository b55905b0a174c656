"""Where vectors come from: a store's shards, or what `encode_texts` returned, as segments of consecutive texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ..model.scoring import Memory, PreparedQueries, similarities, sparse_vectors_of, vectors_of

Rows = slice | torch.Tensor  # consecutive texts, or any, int64 [n]
Stored = tuple[torch.Tensor, torch.Tensor | None]  # [n, K, H] as stored, and what each vector is multiplied with [n, K]


class Segment(Protocol):
    """Consecutive texts of a collection; a store's `Shard` is one."""

    @property
    def offset(self) -> int:
        """Position of the first text in the collection."""

    @property
    def length(self) -> int:
        """Number of texts."""

    @property
    def sparse(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Token ids (int) and weights (float), [length, T] each; None where the texts have none."""

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Vectors [stop - start, K, H] of consecutive rows, in the stored floating dtype."""

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Vectors float32 [len(rows), K, H] of any rows."""

    def stored(self, rows: Rows) -> Stored:
        """The vectors or their codes as they are stored, [n, K, …], and a scale for each vector, [n, K], or None."""

    def similarities(self, rows: Rows, queries: PreparedQueries, memory: Memory) -> torch.Tensor:
        """Dot products of the vectors, as they are stored, with those of a few queries on a CPU, float32 [C, n·K].

        Args:
            rows: which n texts.
            queries: of which `rows_at_once` says that they are few.
            memory: for the results, valid until that is used again.

        Raises:
            ValueError: the sides' dimensions differ.
        """

    def in_memory(self) -> Segment:
        """The same texts with their vectors in memory, in the form in which they are stored."""

    def mask(self, start: int, stop: int) -> torch.Tensor | None:
        """Which of the vectors exist, bool [stop - start, K]; None where all do."""

    def text_id(self, row: int) -> str:
        """One text's id."""

    def text(self, row: int) -> str | None:
        """One text, or None where the texts are not stored."""


@dataclass
class TensorSegment:
    """A segment held in tensors, as `encode_texts` returns them."""

    vectors: torch.Tensor  # float [n, K, H]
    vector_mask: torch.Tensor | None = None  # bool [n, K]
    sparse: tuple[torch.Tensor, torch.Tensor] | None = None
    offset: int = 0
    ids: Sequence[str] | None = None  # None numbers them
    source: Segment | None = None  # where ids and texts are

    @property
    def length(self) -> int:
        """Number of texts."""
        return len(self.vectors)

    def block(self, start: int, stop: int) -> torch.Tensor:
        """See `Segment.block`."""
        return self.vectors[start:stop]

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Segment.rows`."""
        return self.vectors[rows.to(self.vectors.device)].float()

    def stored(self, rows: Rows) -> Stored:
        """See `Segment.stored`."""
        return self.vectors[rows], None

    def similarities(self, rows: Rows, queries: PreparedQueries, memory: Memory) -> torch.Tensor:
        """See `Segment.similarities`."""
        return similarities(self.vectors[rows].flatten(0, 1), queries, memory)

    def in_memory(self) -> TensorSegment:
        """See `Segment.in_memory`."""
        return replace(self, vectors=self.vectors.to("cpu", copy=True))

    def mask(self, start: int, stop: int) -> torch.Tensor | None:
        """See `Segment.mask`."""
        return None if self.vector_mask is None else self.vector_mask[start:stop]

    def text_id(self, row: int) -> str:
        """See `Segment.text_id`."""
        if self.source is not None:
            return self.source.text_id(row)
        return str(self.offset + row) if self.ids is None else self.ids[row]

    def text(self, row: int) -> str | None:
        """See `Segment.text`; vectors alone have none."""
        return None if self.source is None else self.source.text(row)


def segments_of(passages: Any, ids: Sequence[str] | None = None, name: str = "passages") -> list[Segment]:
    """Return the segments of a store, or of an `encode_texts` output.

    Args:
        passages: a store, or a mapping with `repr_hidden` [P, K, H] and perhaps `repr_mask` [P, K],
            `sparse_indices` and `sparse_values` [P, T].
        ids: the texts' ids, for an output of `encode_texts`; None numbers them.
        name: "queries" or "passages", for messages.

    Raises:
        ValueError: it is neither, the mapping's tensors or the ids do not go together, or ids are given for a store.
    """
    if not isinstance(passages, Mapping):
        if not hasattr(passages, "shards"):
            raise ValueError(
                f"`{name}` must be a store or an output of encode_texts, got {type(passages).__name__}; open a store's "
                "folder with open_store(folder)."
            )
        if ids is not None:
            raise ValueError("a store knows its passages' ids; leave `ids` out.")
        return list(passages.shards())
    vectors, mask, sparse = _tensors_of(passages, name)
    if ids is not None:
        ids = _distinct(ids, len(vectors))
    sparse = None if sparse is None else (sparse[0].cpu(), sparse[1].detach().cpu())
    return [TensorSegment(vectors.detach(), mask, sparse, ids=ids)]


def _distinct(ids: Sequence[str], count: int) -> list[str]:
    """Return ids, one a passage, as a list, whatever they came in."""
    ids = [ids] if isinstance(ids, str) else list(ids)
    if len(ids) != count:
        raise ValueError(f"`ids` has {len(ids)} entries for {count} passages.")
    first = {text_id: number for number, text_id in reversed(list(enumerate(ids)))}
    for number, text_id in enumerate(ids):
        if first[text_id] != number:
            raise ValueError(f"`ids`: {text_id!r:.80} is the id of the passages {first[text_id]} and {number}.")
    return ids


def resident(segment: Segment, device: torch.device) -> TensorSegment:
    """Return the segment with its vectors in an accelerator's memory, in the dtype of its blocks."""
    vectors = segment.block(0, segment.length).to(device, copy=True)
    mask = segment.mask(0, segment.length)
    mask = None if mask is None else mask.to(device)
    return TensorSegment(vectors, mask, segment.sparse, segment.offset, source=segment)


def _tensors_of(
    side: Mapping[str, Any], name: str
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return vectors [N, K, H], their mask [N, K] or None, and the sparse pair or None of an encoder's output.

    Raises:
        ValueError: a field is missing or has another shape than its neighbours; `name` says whose.
    """
    vectors, mask = vectors_of(side, name)
    sparse = sparse_vectors_of(side, name)
    if sparse is not None and len(sparse[0]) != len(vectors):
        raise ValueError(f"`{name}` has sparse vectors of {len(sparse[0])} texts, and dense ones of {len(vectors)}.")
    return vectors, mask, sparse


@dataclass
class QueryVectors:
    """Queries ready for search, on the CPU."""

    dense: torch.Tensor  # float32 [Q, K_q, H]
    mask: torch.Tensor  # bool [Q, K_q]
    sparse: tuple[torch.Tensor, torch.Tensor] | None  # int64 and float32 [Q, T]
    ids: list[str] | None = None  # those of a store

    def __len__(self) -> int:
        return len(self.dense)

    def batches(self, size: int) -> Iterator[QueryVectors]:
        """Yield the queries in groups of at most `size`."""
        for start in range(0, len(self), max(1, size)):
            part = slice(start, start + max(1, size))
            sparse = None if self.sparse is None else (self.sparse[0][part], self.sparse[1][part])
            ids = None if self.ids is None else self.ids[part]
            yield QueryVectors(self.dense[part], self.mask[part], sparse, ids)

    def require_sparse(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sparse pair.

        Raises:
            ValueError: the queries have none.
        """
        if self.sparse is None:
            raise ValueError("`queries` has no sparse vectors; encode it with compute_sparse=True.")
        return self.sparse


def query_vectors(queries: Any) -> QueryVectors:
    """Bring queries, an `encode_texts` output or a store of queries, into one form.

    Raises:
        ValueError: they are neither, or fields are missing, do not go together or are not finite.
    """
    if isinstance(queries, Mapping):
        vectors, mask, sparse = _tensors_of(queries, "queries")
        ids = None
    else:
        vectors, mask, sparse = _read_all(segments_of(queries, name="queries"))
        ids = queries.ids()
    dense = vectors.detach().float().cpu()
    mask = torch.ones(dense.shape[:2], dtype=torch.bool, device="cpu") if mask is None else mask.cpu()
    if not bool(torch.isfinite(dense[mask]).all()):
        raise ValueError("`repr_hidden` of the queries holds NaN or infinite values.")
    if sparse is not None:
        sparse = (sparse[0].long().cpu(), sparse[1].float().cpu())
        if not bool(torch.isfinite(sparse[1]).all()):
            raise ValueError("`sparse_values` of the queries hold NaN or infinite values.")
    return QueryVectors(dense, mask, sparse, ids)


def existing(segment: Segment, start: int, stop: int) -> torch.Tensor:
    """Return which vectors of consecutive rows exist, bool [stop - start, K], where all do, too."""
    mask = segment.mask(start, stop)
    return (
        torch.ones(stop - start, segment.block(0, 1).shape[1], dtype=torch.bool, device="cpu") if mask is None else mask
    )


def _read_all(
    segments: Sequence[Segment],
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return vectors [N, K, H], which of them exist [N, K], and the sparse pair or None."""
    vectors = torch.cat([segment.block(0, segment.length) for segment in segments])
    mask = torch.cat([existing(segment, 0, segment.length) for segment in segments])
    pairs = [segment.sparse for segment in segments]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        return vectors, mask, None
    return vectors, mask, (torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found]))
