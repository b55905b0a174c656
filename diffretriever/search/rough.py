"""Rough dot products in bfloat16 where the processor has a unit for them, and by how much they may be wrong.

AMX multiplies stored bfloat16 as it lies, where float32 products need it widened. But the query's vectors are rounded
before, and each product after. How far that may be off is known, and so are the passages that may be among the best:
these alone are then scored exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model.scoring import Memory, PreparedQueries, check_width
from ..store.segments import Segment

ROUNDING = 2.0**-8  # of a number to bfloat16: at most this share of it
SUMMING = 4 * 2.0**-24  # of float32 sums, times the numbers added: of both products, with room for what follows them


def rough_products_pay(segments: Sequence[Segment]) -> bool:
    """Return whether the stored vectors are bfloat16, and this processor multiplies these faster than float32."""
    fast = getattr(torch.cpu, "_is_amx_tile_supported", bool)() and torch.backends.mkldnn.is_available()
    return fast and all(part.block(0, 1).dtype == torch.bfloat16 for part in segments if part.length)


def rough_similarities(rows: torch.Tensor, queries: PreparedQueries, memory: Memory) -> torch.Tensor:
    """Return the rough dot products of passage vectors with those of a few queries, float32 [C, N].

    Args:
        rows: bfloat16 [N, H] on the CPU.
        queries: of which `rows_at_once` says that they are few.
        memory: for the results, valid until that is used again.

    Raises:
        ValueError: the sides' dimensions differ.
    """
    check_width(queries.width, rows.shape[1])
    columns = len(queries.matrix)  # whole tiles, so that two bfloat16 fill each float32 below
    products = memory("rough", (len(rows), columns // 2)).view(torch.bfloat16)
    torch.mm(rows, queries.matrix[:, : queries.width].bfloat16().T, out=products)
    return memory("similarity", (columns, len(rows))).copy_(products.T)


def most_wrong(queries: PreparedQueries) -> torch.Tensor:
    """Return the most by which rough and exact MaxSim differ, for passage vectors of length 1, float32 [Q].

    Of q·p the rounded query vector loses at most |q - q'| |p| (Cauchy-Schwarz), the product's rounding at most
    `ROUNDING` |q'| |p|. A maximum is at most as wrong as what it is taken of, a mean as the mean of
    that.
    """
    vectors = queries.matrix[: queries.num_vectors * len(queries), : queries.width]
    rounded = vectors.bfloat16().float()
    lost = torch.linalg.vector_norm(vectors - rounded, dim=1) * 1.01  # itself rounded
    kept = torch.linalg.vector_norm(rounded, dim=1) * (ROUNDING + SUMMING * max(16, queries.width))
    return (lost + kept).view(queries.num_vectors, -1).sum(dim=0) / queries.counts.clamp(min=1)


def longest_vectors(vectors: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return a length that none of each text's vectors exceeds, float32 [N].

    Args:
        vectors: bfloat16 [N, K, H]; the lengths are rounded as they are, which takes half the time of exact ones.
        mask: bool [N, K], which vectors exist; None where all do.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=-1).float() * (1 + 2 * ROUNDING)
    return (lengths if mask is None else lengths.masked_fill_(~mask, 0.0)).amax(dim=1)


def possible_best(scores: torch.Tensor, wrong: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the rows that may be among the best by the exact scores, int64, rising.

    Args:
        scores: rough, float32 [P, Q].
        wrong: the most by which each may be off, float32 [P, Q].
        top_k: at most P.

    >>> possible_best(torch.tensor([[0.9], [0.5], [0.8], [0.1]]), torch.full((4, 1), 0.1), top_k=1)
    tensor([0, 2])
    """
    floor = (scores - wrong).topk(top_k, dim=0).values[-1]  # top_k passages have exact scores that are no lower
    return (~(scores + wrong < floor)).any(dim=1).nonzero().flatten()  # NaN is among them, and is refused there
