"""Exact sparse search through an inverted index (paper Eq. 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..store.segments import Segment

NO_SPARSE = "the passages have no sparse vectors; encode them with sparse vectors to use this mode."
CHUNK = 262_144  # passages an index part holds: bounds the memory of building, and a query's scores


@dataclass
class Postings:
    """The postings of consecutive passages, sorted by term."""

    offset: int  # position of the first passage in the collection
    length: int
    terms: torch.Tensor  # int32 [distinct terms], rising
    starts: torch.Tensor  # int64 [distinct terms + 1], where each term's postings begin
    passages: torch.Tensor  # int32 [postings], numbers within this part
    weights: torch.Tensor  # float32 [postings]

    @classmethod
    def build(
        cls, indices: torch.Tensor, values: torch.Tensor, offset: int, terms: torch.Tensor | None = None
    ) -> Postings:
        """Invert sparse vectors.

        Args:
            indices: token ids, int [P, T].
            values: weights, float [P, T]; 0 marks an unused slot.
            offset: the first passage's position in the collection.
            terms: token ids, the only ones to keep; None keeps all.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        used = values != 0  # NaN counts as used, so that it is seen below
        if terms is not None:
            used &= torch.isin(indices, terms.to(indices.dtype))
        weights = values[used].float()
        if not bool(torch.isfinite(weights).all()):
            row = int((~torch.isfinite(values)).any(dim=1).nonzero()[0, 0])
            raise ValueError(
                f"`sparse_values` of the passage at position {offset + row} hold NaN or infinite values. "
                "Encode that text again."
            )
        passages = torch.arange(len(indices), dtype=torch.int32, device="cpu")[:, None].expand(indices.shape)[used]
        by_term, order = torch.sort(indices[used].int(), stable=True)
        distinct, counts = torch.unique_consecutive(by_term, return_counts=True)
        starts = torch.zeros(len(distinct) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(counts, 0, out=starts[1:])
        return cls(offset, len(indices), distinct, starts, passages[order], weights[order])

    def scores(self, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return the dot products of one query with every passage, float32 [length].

        Args:
            indices: int64 [T]; values: float32 [T]; 0 marks an unused slot.
        """
        out = torch.zeros(self.length, dtype=torch.float32, device="cpu")
        if not len(self.terms):
            return out
        used = values != 0
        wanted, weights = indices[used], values[used].tolist()
        places = torch.searchsorted(self.terms, wanted.int()).clamp_(max=len(self.terms) - 1)
        known = self.terms[places] == wanted
        begins, ends = self.starts[places].tolist(), self.starts[places + 1].tolist()
        for weight, begin, end, there in zip(weights, begins, ends, known.tolist(), strict=True):
            if there:
                out.index_add_(0, self.passages[begin:end], self.weights[begin:end], alpha=weight)
        return out


def build_postings(segments: list[Segment]) -> list[Postings]:
    """Invert a collection's sparse vectors in parts of at most CHUNK passages.

    Raises:
        ValueError: the passages have no sparse vectors, or one that is not finite.
    """
    return [Postings.build(indices, values, offset) for offset, indices, values in _chunks(segments)]


def _chunks(segments: list[Segment]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (offset, indices, values), small segments joined and large ones split."""
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    held_length = offset = 0
    for segment in segments:
        pair = sparse_of(segment)
        for start in range(0, segment.length, CHUNK):
            indices, values = (tensor[start : start + CHUNK] for tensor in pair)
            if held and held_length + len(indices) > CHUNK:
                yield (offset, *join_rows(held))
                held, held_length = [], 0
            if not held:
                offset = segment.offset + start
            held.append((indices, values))
            held_length += len(indices)
    if held:
        yield (offset, *join_rows(held))


def sparse_of(segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a segment's sparse vectors, token ids and weights [n, T].

    Raises:
        ValueError: it has none.
    """
    if segment.sparse is None:
        raise ValueError(NO_SPARSE)
    return segment.sparse


def join_rows(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack token ids and weights [n, T] of several segments, at least one, whose T may differ."""
    if len(pairs) == 1:
        return pairs[0]
    width = max(indices.shape[1] for indices, _ in pairs)
    padded = [[F.pad(tensor, (0, width - tensor.shape[1])) for tensor in pair] for pair in pairs]
    return torch.cat([indices for indices, _ in padded]), torch.cat([values for _, values in padded])


def sum_by_term(indices: torch.Tensor, values: torch.Tensor) -> dict[int, float]:
    """Return {term: weight} of one sparse vector's used slots, each term once, as other engines want them.

    >>> sum_by_term(torch.tensor([7, 3, 7, 0]), torch.tensor([1.0, 2.0, 0.5, 0.0]))
    {7: 1.5, 3: 2.0}
    """
    weights: dict[int, float] = {}
    for term, value in zip(indices.tolist(), values.tolist(), strict=True):
        if value != 0.0:
            weights[term] = weights.get(term, 0.0) + value
    return weights
