"""The five scoring modes of DiffRetriever (paper §3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

FUSED = {"fusion_single_sparse_max": "single_dense", "fusion_multi_sparse_max": "multi_dense"}  # and their dense side
SCORING_MODES = ("single_dense", "multi_dense", "sparse_max", *FUSED)
EVEN_FUSION = 0.5  # the dense scores' share where nothing else is asked for (paper §3.3)
BLOCK_ELEMENTS = 64 * 1024 * 1024  # similarities held at once
# A matrix product may round an element differently in its ragged edge than inside, and copies of a passage must tie:
# passages, queries and dimensions are filled up to whole tiles.
ROW_TILE, COLUMN_TILE, WIDTH_TILE = 16, 4, 16
# numpy's BLAS multiplies small matrices as they lie; torch's first copies them into an order of its own, which for a
# few columns takes as long as the product. So many columns, numbers of a result and multiplications are small.
SMALL_COLUMNS, SMALL_RESULT, SMALL_PRODUCT = 16, 1024, 1_000_000
LEAST_LENGTH = 1e-12  # as of torch's own `normalize`: a sum of zero stays zero
WIDENED_NUMBERS = 512 * 1024  # that wait for their product: they should not leave the caches

# Gives memory to write a result into, by the result's name and shape; None where each result has memory of its own.
Memory = Callable[[str, tuple[int, ...]], torch.Tensor]


def score(
    queries: Mapping[str, Any],
    passages: Mapping[str, Any],
    mode: str = "multi_dense",
    fusion_weight: float | None = None,
) -> torch.Tensor:
    """Score every query against every passage.

    Args:
        queries: output of `encode` or `encode_texts`: `repr_hidden` [Q, K_q, H], for the sparse modes also
            `sparse_indices` and `sparse_values` [Q, T]. `repr_mask` [Q, K_q], if there, says which vectors exist.
        passages: the same with P and K_p.
        mode: one of SCORING_MODES.
        fusion_weight: the dense scores' share in the fusion modes; None is half, in `model.score` the release's own.

    Returns:
        float32 [Q, P], higher is more relevant.

    Raises:
        ValueError: unknown mode, missing fields, dimensions that do not go together, sides that are swapped.
    """
    check_mode(mode)
    weight = fusion_weight_of(None, fusion_weight)
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
    return fuse(dense, sparse, weight)


def check_mode(mode: str) -> None:
    """Raise ValueError where a mode is not one of SCORING_MODES."""
    if mode not in SCORING_MODES:
        raise ValueError(f"scoring mode {mode!r} is not known; the modes are {', '.join(SCORING_MODES)}.")


def check_weight(weight: float) -> None:
    """Raise ValueError where a fusion's weight lies outside 0 to 1."""
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"`fusion_weight` must lie between 0 and 1, got {weight}.")


def fusion_weight_of(config: Any, asked: float | None) -> float:
    """Return the dense scores' share in the fusion modes: what is asked for, else the release's own, else half.

    Args:
        config: of the model; one without the field recommends none.
        asked: None where nothing is.

    Raises:
        ValueError: it lies outside 0 to 1.
    """
    if asked is None:
        asked = getattr(config, "recommended_fusion_weight", None)
    weight = EVEN_FUSION if asked is None else asked
    check_weight(weight)
    return weight


def check_width(queries: int, passages: int) -> None:
    """Raise ValueError where the two sides' vectors have not the same number of dimensions."""
    if queries != passages:
        raise ValueError(f"queries have {queries} dimensions, passages {passages}; they were made by different models.")


def as_tensor(values: Any) -> Any:
    """Return a numpy array as a tensor that shares its memory, and anything else as it is."""
    if isinstance(values, torch.Tensor) or not hasattr(values, "__array__"):
        return values
    try:
        return torch.as_tensor(values, device="cpu")
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
    with torch.autocast(query_vectors.device.type, enabled=False):  # which would round the scores
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
    with torch.autocast(sides[0].device.type, enabled=False):
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


def mean_vectors(
    vectors: torch.Tensor, mask: torch.Tensor | None = None, memory: Memory | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the normalised mean of each text's vectors, [N, 1, H], and which texts have any, bool [N, 1].

    Args:
        vectors: float32 [N, K, H].
        mask: bool [N, K]; None where all exist, and None is then returned for the texts.
        memory: for the means; without it gradients flow.
    """
    kept = vectors if mask is None else torch.where(mask[..., None], vectors, 0.0)
    out = None if memory is None else memory("means", (len(vectors), vectors.shape[2]))
    sums = torch.sum(kept, dim=1, out=out)
    means = F.normalize(sums, dim=-1, out=out)[:, None]  # the mean's length does not matter to the cosine
    return means, None if mask is None else mask.any(dim=1, keepdim=True)


@dataclass(eq=False)  # one is itself alone
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
        vectors: float32 [p, K_p, H]; of any dtype for a few queries on a CPU with `memory`.
        mask: bool [p, K_p], which vectors exist; None where all do.
        queries: Q of them.
        memory: for the results along the way and the scores, float32; without it gradients flow.

    Returns:
        float32 [p, Q]; -inf where a side has no vector. With `memory`, valid until that is used again.

    Raises:
        ValueError: the sides' dimensions differ.
    """
    check_width(queries.width, vectors.shape[2])
    if memory is not None and rows_at_once(queries):
        return maxsim_of(similarities(vectors.flatten(0, 1), queries, memory), mask, vectors.shape[1], queries)
    count, k_p, width = vectors.shape
    rows, columns = _whole_tiles(vectors.reshape(-1, width), memory), len(queries.matrix)
    out = None if memory is None else memory("similarity", (len(rows), columns))
    similarity = torch.mm(rows, queries.matrix.T, out=out)[: count * k_p]
    if mask is not None:
        similarity.masked_fill_(~mask.reshape(-1, 1), -torch.inf)
    out = None if memory is None else memory("best", (count, columns))
    best = torch.amax(similarity.view(count, k_p, columns), dim=1, out=out)
    best = best[:, : queries.num_vectors * len(queries)].view(count, queries.num_vectors, len(queries))
    if queries.exists is not None:
        best = torch.where(queries.exists, best, 0.0)
    out = None if memory is None else memory("scores", (count, len(queries)))
    return _mean(torch.sum(best, dim=1, out=out), queries)


def maxsim_of(similarity: torch.Tensor, mask: torch.Tensor | None, k_p: int, queries: PreparedQueries) -> torch.Tensor:
    """MaxSim of a block of passages from the similarities with a few queries.

    Passages lie in a row's last dimension, so that the maximum and the mean over few vectors run over many passages.

    Args:
        similarity: float32 [C, p·K_p], as from `similarities`; changed where vectors are missing.
        mask, queries: as for `maxsim`.
        k_p: vectors a passage.

    Returns:
        As `maxsim`.
    """
    if mask is not None:
        similarity.masked_fill_(~mask.reshape(1, -1), -torch.inf)
    best = F.max_pool1d(similarity[None], k_p)[0]  # [C, p], in a third of the time that `amax` takes
    first, *others = best[: queries.num_vectors * len(queries)].view(queries.num_vectors, len(queries), -1)
    if queries.exists is not None:
        for vector, there in zip((first, *others), queries.exists, strict=True):
            vector.masked_fill_(~there[:, None], 0.0)
    for vector in others:  # one after the other: torch's own sum of many depends on where a passage lies
        first += vector
    return _mean(first.T, queries)


def cosines_of(
    similarity: torch.Tensor, mask: torch.Tensor | None, lengths: torch.Tensor, queries: PreparedQueries
) -> torch.Tensor:
    """Cosines of a few queries' means with those of a block of passages, from the similarities with all vectors.

    A product with a sum is the sum of the products, so no mean is made.

    Args:
        similarity: float32 [C, p·K_p], as from `similarities`; changed.
        mask: bool [p, K_p], which vectors exist; None where all do.
        lengths: float32 [p], of the sums of each passage's vectors, as from `sum_lengths`.
        queries: means, as from `mean_vectors`.

    Returns:
        float32 [p, Q]; -inf where a side has no vector.
    """
    passages = similarity[: len(queries)].unflatten(1, (len(lengths), -1))  # [Q, p, K_p]
    if mask is not None:
        passages.masked_fill_(~mask, 0.0)
    first, *others = passages.unbind(dim=2)
    for vector in others:  # one after the other: torch's own sum of many depends on where a passage lies
        first += vector
    first /= lengths.clamp(min=LEAST_LENGTH)
    if mask is not None:
        first.masked_fill_(~mask.any(dim=1), -torch.inf)
    return _mean(first.T, queries)


def sum_lengths(vectors: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the length of the sum of each text's vectors, float32 [N].

    Args:
        vectors: float32 [N, K, H].
        mask: bool [N, K]; None where all exist.
    """
    kept = vectors if mask is None else torch.where(mask[..., None], vectors, 0.0)
    return torch.linalg.vector_norm(kept.sum(dim=1) if kept.shape[1] > 1 else kept[:, 0], dim=-1)


def rows_at_once(queries: PreparedQueries) -> int:
    """Return how many passage vectors make a small matrix for a few queries on a CPU; 0 where they are not few."""
    columns, width = queries.matrix.shape
    if not 0 < columns <= SMALL_COLUMNS or queries.matrix.device.type != "cpu":
        return 0
    return min(SMALL_RESULT // columns, SMALL_PRODUCT // (columns * width)) // ROW_TILE * ROW_TILE


def similarities(rows: torch.Tensor, queries: PreparedQueries, memory: Memory) -> torch.Tensor:
    """Return the dot products of passage vectors with those of a few queries on a CPU, float32 [C, N].

    Args:
        rows: [N, H] of any dtype; what is not float32 is widened a few small matrices at a time.
        queries: of which `rows_at_once` says that they are few.
        memory: for the results, valid until that is used again.

    Raises:
        ValueError: the sides' dimensions differ.
    """
    check_width(queries.width, rows.shape[1])
    columns, width = queries.matrix.shape
    tile = rows_at_once(queries)
    tiles = -(-len(rows) // tile)
    at_once = min(tiles, max(1, WIDENED_NUMBERS // (tile * width)))
    out = memory("similarity", (columns, tiles * tile))
    matrix, products = queries.matrix.numpy(), out.view(columns, tiles, tile).numpy().transpose(1, 0, 2)
    widened = memory("widened", (at_once * tile, width))
    widened[:, queries.width :] = 0.0
    filled, matrices = widened[:, : queries.width], widened.numpy().reshape(-1, tile, width).transpose(0, 2, 1)
    as_they_lie = rows.dtype == torch.float32 and rows.device.type == "cpu" and width == queries.width
    for first, part in zip(range(0, tiles, at_once), rows.split(max(1, at_once * tile)), strict=False):
        if len(part) < len(widened):  # the last, perhaps
            widened[len(part) : (tiles - first) * tile] = 0.0
            filled[: len(part)] = part
            products[first:] = matrix @ matrices[: tiles - first]
        elif as_they_lie:
            products[first : first + at_once] = matrix @ part.numpy().reshape(-1, tile, width).transpose(0, 2, 1)
        else:
            filled.copy_(part)
            products[first : first + at_once] = matrix @ matrices
    return out[:, : len(rows)]


def _mean(sums: torch.Tensor, queries: PreparedQueries) -> torch.Tensor:
    """Divide the sums over each query's vectors, float32 [p, Q], in place."""
    sums /= queries.counts.clamp(min=1.0)
    if queries.exists is not None:
        sums.masked_fill_(queries.counts == 0, -torch.inf)
    return sums


def _whole_tiles(rows: torch.Tensor, memory: Memory | None) -> torch.Tensor:
    """Return the rows [N, H], filled up with zeros to whole tiles."""
    count, width = rows.shape
    below, beside = -count % ROW_TILE, -width % WIDTH_TILE
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
