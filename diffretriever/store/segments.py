"""Where vectors come from: a store's shards, or what `encode_texts` returned, as segments of consecutive texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Segment(Protocol):
    """Consecutive texts of a collection."""

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
        """Vectors float32 [len(rows), K, H] of any rows, on the CPU."""

    def mask(self, start: int, stop: int) -> torch.Tensor | None:
        """Which of the vectors exist, bool [stop - start, K]; None where all do."""

    def text(self, row: int) -> str | None:
        """One text, or None where the texts are not stored."""


@dataclass
class TensorSegment:
    """A segment held in tensors, as `encode_texts` returns them."""

    vectors: torch.Tensor  # float [n, K, H]
    vector_mask: torch.Tensor | None = None  # bool [n, K]
    sparse: tuple[torch.Tensor, torch.Tensor] | None = None
    offset: int = 0
    source: Segment | None = None  # where the texts are

    @property
    def length(self) -> int:
        """Number of texts."""
        return len(self.vectors)

    def block(self, start: int, stop: int) -> torch.Tensor:
        """See `Segment.block`."""
        return self.vectors[start:stop]

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Segment.rows`."""
        return self.vectors[rows.to(self.vectors.device)].float().cpu()

    def mask(self, start: int, stop: int) -> torch.Tensor | None:
        """See `Segment.mask`."""
        return None if self.vector_mask is None else self.vector_mask[start:stop]

    def text(self, row: int) -> str | None:
        """See `Segment.text`; vectors alone have none."""
        return None if self.source is None else self.source.text(row)


@dataclass
class ShardSegment:
    """A segment read from a store's shard when it is needed; the system's page cache decides what stays in memory."""

    shard: Any  # diffretriever.retrieval.store.Shard, or a compressed one

    @property
    def offset(self) -> int:
        """Position of the first text in the store."""
        return int(self.shard.offset)

    @property
    def length(self) -> int:
        """Number of texts."""
        return len(self.shard)

    @property
    def sparse(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `Segment.sparse`."""
        return self.shard.sparse_indices, self.shard.sparse_values

    def block(self, start: int, stop: int) -> torch.Tensor:
        """See `Segment.block`."""
        return self.shard.repr_hidden[start:stop] if self.shard.repr_scale is None else self.shard.dense(start, stop)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Segment.rows`."""
        vectors = self.shard.repr_hidden[rows].float()
        return vectors if self.shard.repr_scale is None else vectors * self.shard.repr_scale[rows][..., None]

    def mask(self, start: int, stop: int) -> torch.Tensor | None:
        """A store's texts have all their vectors."""
        return None

    def text(self, row: int) -> str | None:
        """See `Segment.text`."""
        return str(self.shard.text(row)) if "texts_offsets" in self.shard.file else None


def segments_of(passages: Any) -> list[Segment]:
    """Return the segments of a store, or of an `encode_texts` output.

    Args:
        passages: a store, or a mapping with `repr_hidden` [P, K, H] and perhaps `repr_mask` [P, K],
            `sparse_indices` and `sparse_values` [P, T].

    Raises:
        ValueError: the mapping's tensors do not go together.
    """
    if not isinstance(passages, Mapping):
        # a compressed shard is a segment itself
        return [shard if hasattr(shard, "block") else ShardSegment(shard) for shard in passages.shards()]
    vectors, mask, sparse = checked_tensors(passages, "passages")
    return [TensorSegment(vectors, mask, sparse)]


def resident(segment: Segment, device: torch.device) -> TensorSegment:
    """Return the segment with its vectors in the device's memory, in their stored floating dtype."""
    vectors = segment.block(0, segment.length).to(device, copy=True)
    mask = segment.mask(0, segment.length)
    return TensorSegment(vectors, None if mask is None else mask.to(device), segment.sparse, segment.offset, segment)


def checked_tensors(
    side: Mapping[str, Any], name: str
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return vectors [N, K, H], their mask [N, K] or None, and the sparse pair or None of an encoder's output.

    Raises:
        ValueError: a field is missing or has another shape than its neighbours; `name` says whose.
    """
    vectors = side.get("repr_hidden")
    if not isinstance(vectors, torch.Tensor) or vectors.dim() != 3 or not vectors.is_floating_point():
        shape = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, torch.Tensor) else None
        raise ValueError(f"`{name}` needs a floating `repr_hidden` of shape [texts, K, H]; got {shape}.")
    mask = side.get("repr_mask")
    if mask is not None and mask.shape != vectors.shape[:2]:
        raise ValueError(
            f"`repr_mask` of `{name}` has shape {list(mask.shape)}; `repr_hidden` asks for {list(vectors.shape[:2])}."
        )
    indices, values = side.get("sparse_indices"), side.get("sparse_values")
    if indices is None or values is None:
        return vectors, None if mask is None else mask.bool(), None
    if indices.dim() != 2 or indices.shape != values.shape or len(indices) != len(vectors):
        raise ValueError(
            f"`{name}`: sparse_indices {list(indices.shape)} and sparse_values {list(values.shape)} must both be "
            f"[{len(vectors)}, T], a row for each of the texts in repr_hidden."
        )
    return vectors, None if mask is None else mask.bool(), (indices, values)


@dataclass
class QueryVectors:
    """Queries ready for search, on the CPU."""

    dense: torch.Tensor  # float32 [Q, K_q, H]
    mask: torch.Tensor  # bool [Q, K_q]
    sparse: tuple[torch.Tensor, torch.Tensor] | None  # int64 and float32 [Q, T]

    def __len__(self) -> int:
        return len(self.dense)

    def batches(self, size: int) -> Iterator[QueryVectors]:
        """Yield the queries in groups of at most `size`."""
        for start in range(0, len(self), max(1, size)):
            part = slice(start, start + max(1, size))
            sparse = None if self.sparse is None else (self.sparse[0][part], self.sparse[1][part])
            yield QueryVectors(self.dense[part], self.mask[part], sparse)

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
        ValueError: fields are missing, do not go together, or are not finite.
    """
    if isinstance(queries, Mapping):
        vectors, mask, sparse = checked_tensors(queries, "queries")
    else:
        vectors, sparse = _read_all(segments_of(queries))
        mask = None
    if mask is None:
        mask = torch.ones(vectors.shape[:2], dtype=torch.bool)
    dense = vectors.detach().float().cpu()
    mask = mask.cpu()
    if not bool(torch.isfinite(dense[mask]).all()):
        raise ValueError("`repr_hidden` of the queries holds NaN or infinite values.")
    if sparse is not None:
        sparse = (sparse[0].long().cpu(), sparse[1].float().cpu())
        if not bool(torch.isfinite(sparse[1]).all()):
            raise ValueError("`sparse_values` of the queries hold NaN or infinite values.")
    return QueryVectors(dense, mask, sparse)


def _read_all(segments: Sequence[Segment]) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    vectors = torch.cat([segment.block(0, segment.length) for segment in segments])
    pairs = [segment.sparse for segment in segments]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        return vectors, None
    return vectors, (torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found]))
