"""The five scoring modes of DiffRetriever (paper §3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

DENSE_MODES = {"single_dense": "single_dense", "fusion_single_sparse_max": "single_dense"}
DENSE_MODES |= {"multi_dense": "multi_dense", "fusion_multi_sparse_max": "multi_dense"}
SCORING_MODES = ("single_dense", "multi_dense", "sparse_max", "fusion_single_sparse_max", "fusion_multi_sparse_max")
BLOCK_ELEMENTS = 64 * 1024 * 1024  # similarities held at once


def score(
    queries: Mapping[str, Any], passages: Mapping[str, Any], mode: str = "multi_dense", fusion_weight: float = 0.5
) -> torch.Tensor:
    """Score every query against every passage.

    Args:
        queries: output of `encode` or `encode_texts`: `repr_hidden` [Q, K_q, H], for the sparse modes also
            `sparse_indices` and `sparse_values` [Q, T]. `repr_mask` [Q, K_q], if there, says which vectors exist.
        passages: the same with P and K_p.
        mode: one of SCORING_MODES.
        fusion_weight: the dense scores' share in the fusion modes.

    Returns:
        float32 [Q, P], higher is more relevant.

    Raises:
        ValueError: unknown mode, missing fields, dimensions that do not go together.
    """
    if mode not in SCORING_MODES:
        raise ValueError(f"scoring mode {mode!r} is not known; the modes are {', '.join(SCORING_MODES)}.")
    if not 0.0 <= fusion_weight <= 1.0:
        raise ValueError(f"`fusion_weight` must lie between 0 and 1, got {fusion_weight}.")
    for side, name in ((queries, "queries"), (passages, "passages")):
        if not isinstance(side, Mapping):
            raise ValueError(f"`{name}` must be what encode or encode_texts returned, got {type(side).__name__}.")
    if mode == "sparse_max":
        return _sparse_of(queries, passages)
    query_vectors, query_mask = _vectors(queries, "queries")
    passage_vectors, passage_mask = _vectors(passages, "passages")
    if query_vectors.shape[2] != passage_vectors.shape[2]:
        raise ValueError(
            f"queries have {query_vectors.shape[2]} dimensions, passages {passage_vectors.shape[2]}; "
            "they were made by different models."
        )
    dense_score = single_dense if DENSE_MODES[mode] == "single_dense" else multi_dense
    dense = dense_score(query_vectors, passage_vectors, query_mask, passage_mask)
    if dense.isnan().any():
        raise ValueError("`repr_hidden` of the queries or the passages holds NaN.")
    if mode == DENSE_MODES[mode]:
        return dense
    sparse = _sparse_of(queries, passages)
    if sparse.shape != dense.shape:
        raise ValueError(
            f"the sparse vectors are of {sparse.shape[0]} queries and {sparse.shape[1]} passages, the dense ones of "
            f"{dense.shape[0]} and {dense.shape[1]}."
        )
    return fuse(dense, sparse, fusion_weight)


def _vectors(side: Mapping[str, Any], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    vectors = side.get("repr_hidden")
    if not isinstance(vectors, torch.Tensor) or vectors.dim() != 3:
        shape = list(vectors.shape) if isinstance(vectors, torch.Tensor) else None
        raise ValueError(f"`{name}` needs `repr_hidden` of shape [texts, K, H]; got {shape}.")
    mask = side.get("repr_mask")
    if mask is None:
        mask = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    if mask.shape != vectors.shape[:2]:
        raise ValueError(
            f"`repr_mask` of `{name}` has shape {list(mask.shape)}; `repr_hidden` asks for {list(vectors.shape[:2])}."
        )
    return vectors.float(), mask.bool()


def _sparse_of(queries: Mapping[str, Any], passages: Mapping[str, Any]) -> torch.Tensor:
    sides = []
    for side, name in ((queries, "queries"), (passages, "passages")):
        indices, values = side.get("sparse_indices"), side.get("sparse_values")
        if not isinstance(indices, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise ValueError(f"`{name}` has no sparse vectors; encode it with compute_sparse=True.")
        if indices.dim() != 2 or indices.shape != values.shape:
            raise ValueError(
                f"`{name}`: sparse_indices {list(indices.shape)} and sparse_values {list(values.shape)} must both be "
                "[texts, T]."
            )
        sides += [indices.long(), values.float()]
    scores = sparse_max(*sides)
    if scores.isnan().any():
        raise ValueError("`sparse_values` of the queries or the passages hold NaN.")
    return scores


def single_dense(
    queries: torch.Tensor, passages: torch.Tensor, query_mask: torch.Tensor, passage_mask: torch.Tensor
) -> torch.Tensor:
    """Cosine of the mean vectors.

    Args:
        queries: float32 [Q, K_q, H]; passages: float32 [P, K_p, H].
        query_mask: bool [Q, K_q]; passage_mask: bool [P, K_p]. A text without any vector scores -inf.

    Returns:
        float32 [Q, P]
    """
    means = []
    for vectors, mask in ((queries, query_mask), (passages, passage_mask)):
        kept = torch.where(mask[..., None], vectors, 0.0)
        means.append(F.normalize(kept.sum(dim=1), dim=-1))  # [N, H]; the mean's length does not matter
    scores = means[0] @ means[1].T
    exists = query_mask.any(dim=1)[:, None] & passage_mask.any(dim=1)[None, :]
    return scores.masked_fill(~exists, -torch.inf)


def multi_dense(
    queries: torch.Tensor, passages: torch.Tensor, query_mask: torch.Tensor, passage_mask: torch.Tensor
) -> torch.Tensor:
    """MaxSim, paper Eq. 2: the mean over the query's vectors of the best similarity among the passage's.

    Args and returns as for `single_dense`. A missing passage vector is -inf in the maximum, a missing query vector is
    left out of the mean; a text without any vector scores -inf.
    """
    num_queries, k_q, _ = queries.shape
    num_passages, k_p, _ = passages.shape
    scores = queries.new_empty(num_queries, num_passages)
    step = max(1, BLOCK_ELEMENTS // max(1, num_queries * k_q * k_p))
    flat_queries = torch.where(query_mask[..., None], queries, 0.0).flatten(0, 1)  # [Q·K_q, H]
    per_query = query_mask.sum(dim=1).clamp(min=1)[:, None]  # [Q, 1]
    for start in range(0, num_passages, step):
        block, mask = passages[start : start + step], passage_mask[start : start + step]
        kept = torch.where(mask[..., None], block, 0.0)
        similarity = (flat_queries @ kept.flatten(0, 1).T).view(num_queries, k_q, len(block), k_p)
        best = similarity.masked_fill(~mask, -torch.inf).amax(dim=-1)  # [Q, K_q, p]
        total = torch.where(query_mask[:, :, None], best, 0.0).sum(dim=1)
        scores[:, start : start + step] = total / per_query
    return scores.masked_fill(~query_mask.any(dim=1)[:, None], -torch.inf)


def sparse_max(
    query_indices: torch.Tensor, query_values: torch.Tensor, passage_indices: torch.Tensor, passage_values: torch.Tensor
) -> torch.Tensor:
    """Dot product of the sparse vectors, paper Eq. 3.

    Args:
        query_indices: int64 [Q, T]; query_values: float32 [Q, T]. passage_indices, passage_values: [P, T'].

    Returns:
        float32 [Q, P]
    """
    if not query_indices.numel() or not passage_indices.numel():
        return query_values.new_zeros(len(query_indices), len(passage_indices))
    terms = torch.unique(query_indices)  # sorted; only the queries' terms can meet
    query_columns = torch.searchsorted(terms, query_indices)
    query_matrix = query_values.new_zeros(len(query_indices), len(terms)).scatter_add_(1, query_columns, query_values)
    columns = torch.searchsorted(terms, passage_indices).clamp_(max=len(terms) - 1)
    kept = torch.where(terms[columns] == passage_indices, passage_values, 0.0)
    scores = query_values.new_empty(len(query_indices), len(passage_indices))
    step = max(1, BLOCK_ELEMENTS // max(1, len(terms)))
    for start in range(0, len(passage_indices), step):
        part = slice(start, start + step)
        matrix = kept.new_zeros(len(kept[part]), len(terms)).scatter_add_(1, columns[part], kept[part])
        scores[:, part] = query_matrix @ matrix.T
    return scores


def fuse(dense: torch.Tensor, sparse: torch.Tensor, weight: float = 0.5) -> torch.Tensor:
    """Hybrid score, paper Eq. 4: min-max normalise each query's candidate scores, then interpolate.

    Args:
        dense, sparse: float32 [Q, P], the same candidates.
        weight: the dense share.

    Returns:
        float32 [Q, P] in [0, 1]

    >>> fuse(torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 5.0]]))
    tensor([[0.0000, 0.5000]])
    """
    return weight * _min_max(dense) + (1.0 - weight) * _min_max(sparse)


def _min_max(scores: torch.Tensor) -> torch.Tensor:
    """Scale each row's finite scores to [0, 1]; a row of equal scores becomes 0, a missing score 0."""
    if not scores.numel():
        return scores
    finite = torch.isfinite(scores)
    low = scores.masked_fill(~finite, torch.inf).amin(dim=1, keepdim=True)
    high = scores.masked_fill(~finite, -torch.inf).amax(dim=1, keepdim=True)
    spread = high - low
    scaled = (scores - low) / torch.where(spread > 0, spread, 1.0)
    return torch.where(finite, scaled, 0.0)
