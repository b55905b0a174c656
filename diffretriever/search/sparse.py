"""Exact sparse search through an inverted index (paper Eq. 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..store.segments import Segment

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
    def build(cls, indices: torch.Tensor, values: torch.Tensor, offset: int) -> Postings:
        """Invert sparse vectors.

        Args:
            indices: token ids, int [P, T].
            values: weights, float [P, T]; 0 marks an unused slot.
            offset: the first passage's position in the collection.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        used = values != 0  # NaN counts as used, so that it is seen below
        weights = values[used].float()
        if not bool(torch.isfinite(weights).all()):
            row = int((~torch.isfinite(values)).any(dim=1).nonzero()[0, 0])
            raise ValueError(
                f"`sparse_values` of the passage at position {offset + row} hold NaN or infinite values. "
                "Encode that text again."
            )
        passages = torch.arange(len(indices), dtype=torch.int32)[:, None].expand(indices.shape)[used]
        terms, order = torch.sort(indices[used].int(), stable=True)
        distinct, counts = torch.unique_consecutive(terms, return_counts=True)
        starts = torch.zeros(len(distinct) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=starts[1:])
        return cls(offset, len(indices), distinct, starts, passages[order], weights[order])

    def scores(self, indices: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write the dot products of one query with every passage.

        Args:
            indices: int64 [T]; values: float32 [T]; 0 marks an unused slot.
            out: float32 [length], overwritten.
        """
        out.zero_()
        if not len(self.terms):
            return
        used = values != 0
        wanted, weights = indices[used], values[used].tolist()
        places = torch.searchsorted(self.terms, wanted.int()).clamp_(max=len(self.terms) - 1)
        known = self.terms[places] == wanted
        begins, ends = self.starts[places].tolist(), self.starts[places + 1].tolist()
        for weight, begin, end, there in zip(weights, begins, ends, known.tolist(), strict=True):
            if there:
                out.index_add_(0, self.passages[begin:end], self.weights[begin:end], alpha=weight)


def build_postings(segments: list[Segment]) -> list[Postings]:
    """Invert a collection's sparse vectors in parts of at most CHUNK passages.

    Raises:
        ValueError: the passages have no sparse vectors, or one that is not finite.
    """
    parts = []
    for offset, indices, values in _chunks(segments):
        parts.append(Postings.build(indices, values, offset))
    return parts


def _chunks(segments: list[Segment]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (offset, indices, values), small segments joined and large ones split."""
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    held_length = offset = 0
    for segment in segments:
        if segment.sparse is None:
            raise ValueError("the passages have no sparse vectors; encode them with sparse vectors to use this mode.")
        for start in range(0, segment.length, CHUNK):
            indices, values = (tensor[start : start + CHUNK] for tensor in segment.sparse)
            if held and held_length + len(indices) > CHUNK:
                yield (offset, *_join(held))
                held, held_length = [], 0
            if not held:
                offset = segment.offset + start
            held.append((indices, values))
            held_length += len(indices)
    if held:
        yield (offset, *_join(held))


def _join(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    width = max(indices.shape[1] for indices, _ in pairs)
    padded = [[F.pad(tensor, (0, width - tensor.shape[1])) for tensor in pair] for pair in pairs]
    return torch.cat([indices for indices, _ in padded]), torch.cat([values for _, values in padded])
