"""The five scoring modes of DiffRetriever (paper §3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

FUSED = {"fusion_single_sparse_max": "single_dense", "fusion_multi_sparse_max": "multi_dense"}  # and their dense side
SCORING_MODES = ("single_dense", "multi_dense", "sparse_max", *FUSED)
BLOCK_ELEMENTS = 64 * 1024 * 1024  # similarities held at once
# A matrix product may round an element differently in its ragged edge than inside, and copies of a passage must tie:
# passages, queries and dimensions are filled up to whole tiles.
ROW_TILE, COLUMN_TILE, WIDTH_TILE = 16, 4, 16
# numpy's BLAS multiplies small matrices as they lie; torch's first copies them into an order of its own, which for a
# few columns takes as long as the product. So many columns, numbers of a result and multiplications are small.
SMALL_COLUMNS, SMALL_RESULT, SMALL_PRODUCT = 8, 1024, 1_000_000

# Gives memory to write a result into, by the result's name and shape; None where each result has memory of its own.
Memory = Callable[[str, tuple[int, ...]], torch.Tensor]


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
        ValueError: unknown mode, missing fields, dimensions that do not go together, sides that are swapped.
    """
    check_mode(mode)
    check_weight(fusion_weight)
    for side, name in ((queries, "queries"), (passages, "passages")):
        if not isinstance(side, Mapping):
            raise ValueError(f"`{name}` must be what encode or encode_texts returned, got {type(side).__name__}.")
    if getattr(queries, "side", None) == "passage" and getattr(passages, "side", None) == "query":
        raise ValueError("`queries` are encoded passages (is_query=False) and `passages` queries; swap the two.")
    if mode == "sparse_max":
        return _sparse_scores(queries, passages)
    dense = _dense_scores(queries, passages, FUSED.get(mode, mode))
    if mode not in FUSED:
        return dense
    sparse = _sparse_scores(queries, passages)
    if sparse.shape != dense.shape:
        raise ValueError(
            f"the sparse vectors are of {sparse.shape[0]} queries and {sparse.shape[1]} passages, the dense ones of "
            f"{dense.shape[0]} and {dense.shape[1]}."
        )
    return fuse(dense, sparse, fusion_weight)


def check_mode(mode: str) -> None:
    """Raise ValueError where a mode is not one of SCORING_MODES."""
    if mode not in SCORING_MODES:
        raise ValueError(f"scoring mode {mode!r} is not known; the modes are {', '.join(SCORING_MODES)}.")


def check_weight(weight: float) -> None:
    """Raise ValueError where a fusion's weight lies outside 0 to 1."""
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"`fusion_weight` must lie between 0 and 1, got {weight}.")


def check_width(queries: int, passages: int) -> None:
    """Raise ValueError where the two sides' vectors have not the same number of dimensions."""
    if queries != passages:
        raise ValueError(f"queries have {queries} dimensions, passages {passages}; they were made by different models.")


def as_tensor(values: Any) -> Any:
    """Return a numpy array as a tensor that shares its memory, and anything else as it is."""
    if isinstance(values, torch.Tensor) or not hasattr(values, "__array__"):
        return values
    try:
        return torch.as_tensor(values)
    except TypeError:  # numbers that torch does not have
        return values


def vectors_of(side: Mapping[str, Any], name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return one side's vectors, floating [N, K, H], and which of them exist, bool [N, K]; None where all do.

    Args:
        side: output of `encode` or `encode_texts`.
        name: "queries" or "passages", for messages.

    Raises:
        ValueError: there are none, or their shape or their mask's is another.
    """
    vectors = as_tensor(side.get("repr_hidden"))
    if not isinstance(vectors, torch.Tensor) or vectors.dim() != 3 or not vectors.is_floating_point():
        found = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, torch.Tensor) else None
        raise ValueError(f"`{name}` needs `repr_hidden`, floating numbers of shape [texts, K, H]; got {found}.")
    mask = as_tensor(side.get("repr_mask"))
    if mask is not None and mask.shape != vectors.shape[:2]:
        raise ValueError(
            f"`repr_mask` of `{name}` has shape {list(mask.shape)}; `repr_hidden` asks for {list(vectors.shape[:2])}."
        )
    return vectors, None if mask is None else mask.bool()


def sparse_vectors_of(side: Mapping[str, Any], name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return one side's sparse vectors, token ids and weights [N, T] each; None where it has none.

    Args and errors as for `vectors_of`.
    """
    indices, values = as_tensor(side.get("sparse_indices")), as_tensor(side.get("sparse_values"))
    if not isinstance(indices, torch.Tensor) or not isinstance(values, torch.Tensor):
        return None
    if indices.dim() != 2 or indices.shape != values.shape:
        raise ValueError(
            f"`{name}`: sparse_indices {list(indices.shape)} and sparse_values {list(values.shape)} must both be "
            "[texts, T]."
        )
    return indices, values


def _dense_scores(queries: Mapping[str, Any], passages: Mapping[str, Any], kind: str) -> torch.Tensor:
    query_vectors, query_mask = vectors_of(queries, "queries")
    passage_vectors, passage_mask = vectors_of(passages, "passages")
    dense_score = single_dense if kind == "single_dense" else multi_dense
    scores = dense_score(query_vectors.float(), passage_vectors.float(), query_mask, passage_mask)
    if scores.isnan().any():
        raise ValueError("`repr_hidden` of the queries or the passages holds NaN.")
    return scores


def _sparse_scores(queries: Mapping[str, Any], passages: Mapping[str, Any]) -> torch.Tensor:
    sides = []
    for side, name in ((queries, "queries"), (passages, "passages")):
        found = sparse_vectors_of(side, name)
        if found is None:
            raise ValueError(f"`{name}` has no sparse vectors; encode it with compute_sparse=True.")
        sides += [found[0].long(), found[1].float()]
    scores = sparse_max(*sides)
    if scores.isnan().any():
        raise ValueError("`sparse_values` of the queries or the passages hold NaN.")
    return scores


def single_dense(
    queries: torch.Tensor,
    passages: torch.Tensor,
    query_mask: torch.Tensor | None = None,
    passage_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cosine of the mean vectors.

    Args:
        queries: float32 [Q, K_q, H]; passages: float32 [P, K_p, H].
        query_mask: bool [Q, K_q]; passage_mask: bool [P, K_p]; None where all vectors exist. A text without any vector
            scores -inf.

    Returns:
        float32 [Q, P]
    """
    query_means, queries_exist = mean_vectors(queries, query_mask)
    passage_means, passages_exist = mean_vectors(passages, passage_mask)
    return multi_dense(query_means, passage_means, queries_exist, passages_exist)


def multi_dense(
    queries: torch.Tensor,
    passages: torch.Tensor,
    query_mask: torch.Tensor | None = None,
    passage_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """MaxSim, paper Eq. 2: the mean over the query's vectors of the best similarity among the passage's.

    Args and returns as for `single_dense`. A missing passage vector is -inf in the maximum, a missing query vector is
    left out of the mean; a text without any vector scores -inf.
    """
    prepared = PreparedQueries.of(queries, query_mask)
    num_passages, k_p, _ = passages.shape
    step = max(1, BLOCK_ELEMENTS // max(1, len(prepared.matrix) * k_p))
    scores = []
    for start in range(0, max(1, num_passages), step):
        part = slice(start, start + step)
        scores.append(maxsim(passages[part], None if passage_mask is None else passage_mask[part], prepared))
    return torch.cat(scores).T.contiguous()


def mean_vectors(vectors: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the normalised mean of each text's vectors, [N, 1, H], and which texts have any, bool [N, 1].

    Args:
        vectors: float32 [N, K, H].
        mask: bool [N, K]; None where all exist, and None is then returned for the texts.
    """
    kept = vectors if mask is None else torch.where(mask[..., None], vectors, 0.0)
    means = F.normalize(kept.sum(dim=1), dim=-1)[:, None]  # the mean's length does not matter to the cosine
    return means, None if mask is None else mask.any(dim=1, keepdim=True)


@dataclass
class PreparedQueries:
    """Q queries with K_q vectors each, as the right side of a matrix product."""

    matrix: torch.Tensor  # float32 [C, H], the first vectors of all queries, then the second …; whole tiles
    exists: torch.Tensor | None  # bool [K_q, Q], None where all vectors exist
    counts: torch.Tensor  # float32 [Q], existing vectors of each query
    num_vectors: int  # K_q
    width: int  # H

    def __len__(self) -> int:
        return self.counts.shape[0]

    @classmethod
    def of(cls, vectors: torch.Tensor, mask: torch.Tensor | None = None) -> PreparedQueries:
        """Prepare vectors, float32 [Q, K_q, H]; `mask` as for `single_dense`."""
        num_queries, num_vectors, width = vectors.shape
        if mask is None or bool(mask.all()):
            kept, exists, counts = vectors, None, vectors.new_full((num_queries,), num_vectors)
        else:
            kept = torch.where(mask[..., None], vectors, 0.0)
            exists, counts = mask.T.contiguous(), mask.sum(dim=1).to(vectors.dtype)
        matrix = kept.transpose(0, 1).flatten(0, 1)  # [K_q·Q, H]
        matrix = F.pad(matrix, (0, -width % WIDTH_TILE, 0, -len(matrix) % COLUMN_TILE)).contiguous()
        return cls(matrix, exists, counts, num_vectors, width)


def maxsim(
    vectors: torch.Tensor, mask: torch.Tensor | None, queries: PreparedQueries, memory: Memory | None = None
) -> torch.Tensor:
    """MaxSim of a block of passages (see `multi_dense`), laid out so that the matrix product takes nearly all the time.

    The similarities have the queries in their last dimension: the maximum over K_p then runs over whole rows, many
    queries at a time, and costs a few per cent of the product (over the last dimension it cost 15).

    Args:
        vectors: float32 [p, K_p, H].
        mask: bool [p, K_p], which vectors exist; None where all do.
        queries: Q of them.
        memory: for the results along the way and the scores, float32; without it gradients flow.

    Returns:
        float32 [p, Q]; -inf where a side has no vector. With `memory`, valid until that is used again.

    Raises:
        ValueError: the sides' dimensions differ.
    """
    count, k_p, width = vectors.shape
    check_width(queries.width, width)
    tile = rows_at_once(k_p, queries)
    if tile and memory is not None:
        best = _best_of_few(vectors, mask, queries, tile, memory)
    else:
        best = _best(vectors, mask, queries, memory)
    if queries.exists is not None:
        best = torch.where(queries.exists, best, 0.0)
    out = None if memory is None else memory("scores", (*best.shape[:2], len(queries)))
    scores = torch.sum(best, dim=2, out=out).flatten(0, 1)[:count]
    scores /= queries.counts.clamp(min=1.0)
    if queries.exists is not None:
        scores.masked_fill_(queries.counts == 0, -torch.inf)
    return scores


def rows_at_once(k_p: int, queries: PreparedQueries) -> int:
    """Return how many passage vectors make a small matrix for a few queries on a CPU; 0 where they are not few.

    Args:
        k_p: vectors a passage; a small matrix holds whole passages and whole tiles.
        queries: which multiply them.
    """
    columns, width = queries.matrix.shape
    if not 0 < columns <= SMALL_COLUMNS or queries.matrix.device.type != "cpu":
        return 0
    unit = math.lcm(ROW_TILE, k_p)
    return min(SMALL_RESULT // columns, SMALL_PRODUCT // (columns * width)) // unit * unit


def _best(
    vectors: torch.Tensor, mask: torch.Tensor | None, queries: PreparedQueries, memory: Memory | None
) -> torch.Tensor:
    """Return each query vector's best similarity with a passage, [p, 1, K_q, Q]; arguments as for `maxsim`."""
    count, k_p, width = vectors.shape
    rows, columns = _whole_tiles(vectors.reshape(-1, width), ROW_TILE, memory), len(queries.matrix)
    out = None if memory is None else memory("similarity", (len(rows), columns))
    similarity = torch.mm(rows, queries.matrix.T, out=out)[: count * k_p]
    if mask is not None:
        similarity.masked_fill_(~mask.reshape(-1, 1), -torch.inf)
    out = None if memory is None else memory("best", (count, columns))
    best = torch.amax(similarity.view(count, k_p, columns), dim=1, out=out)
    return best[:, : queries.num_vectors * len(queries)].view(count, 1, queries.num_vectors, len(queries))


def _best_of_few(
    vectors: torch.Tensor, mask: torch.Tensor | None, queries: PreparedQueries, tile: int, memory: Memory
) -> torch.Tensor:
    """Return the same for a few queries on a CPU, [n, u, K_q, Q]: n small matrices of u passages, the last filled up.

    Passages lie in a row's last dimension, so that the maximum and the sum over few vectors run over many passages.
    """
    _, k_p, width = vectors.shape
    rows = _whole_tiles(vectors.reshape(-1, width), tile, memory)
    matrices = rows.view(-1, tile, rows.shape[1]).numpy().transpose(0, 2, 1)  # [n, H, tile]
    similarity = torch.from_numpy(queries.matrix.numpy() @ matrices)  # [n, C, tile]
    if mask is not None:
        missing = F.pad(~mask.flatten(), (0, len(rows) - mask.numel()))
        similarity.masked_fill_(missing.view(-1, 1, tile), -torch.inf)
    number, columns, _ = similarity.shape
    best = torch.amax(
        similarity.view(number, columns, -1, k_p), dim=3, out=memory("best", (number, columns, tile // k_p))
    )
    kept = best[:, : queries.num_vectors * len(queries)]
    return kept.view(number, queries.num_vectors, len(queries), -1).permute(0, 3, 1, 2)


def _whole_tiles(rows: torch.Tensor, tile: int, memory: Memory | None) -> torch.Tensor:
    """Return the rows [N, H], filled up with zeros to whole tiles."""
    count, width = rows.shape
    below, beside = -count % tile, -width % WIDTH_TILE
    if not below and not beside:
        return rows
    if memory is None:
        return F.pad(rows, (0, beside, 0, below))
    padded = memory("padded", (count + below, width + beside))
    padded[count:] = 0.0
    padded[:, width:] = 0.0
    padded[:count, :width] = rows
    return padded


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
        dense, sparse: float32 [Q, P] or [P], the same candidates; a score that is not finite is missing and counts 0.
        weight: the dense share.

    Returns:
        The same shape, in [0, 1].

    >>> fuse(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([5.0, 5.0, 5.0]))
    tensor([0.0000, 0.5000, 0.2500])
    """
    return weight * _min_max(dense) + (1.0 - weight) * _min_max(sparse)


def _min_max(scores: torch.Tensor) -> torch.Tensor:
    """Scale the finite scores along the last dimension to [0, 1]; equal scores become 0, missing ones too."""
    if not scores.numel():
        return scores
    finite = torch.isfinite(scores)
    low = scores.masked_fill(~finite, torch.inf).amin(dim=-1, keepdim=True)
    high = scores.masked_fill(~finite, -torch.inf).amax(dim=-1, keepdim=True)
    spread = high - low
    scaled = (scores - low) / torch.where(spread > 0, spread, 1.0)
    return torch.where(finite, scaled, 0.0)
