"""MaxSim of a block of passages, laid out so that the matrix product takes nearly all of the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..store.segments import QueryVectors

# A matrix product may round an element differently in its ragged edge than inside, and copies of a passage must tie:
# passages, queries and dimensions are filled up to whole tiles.
ROW_TILE, COLUMN_TILE, WIDTH_TILE = 16, 4, 16


class Workspace:
    """Memory that the blocks share, so that none is mapped and faulted in again for each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a float32 tensor of this shape; what `name` held before is overwritten."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = torch.empty(size, device=self._device)
        return held[:size].view(shape)


@dataclass
class PreparedQueries:
    """Queries as the right side of a matrix product."""

    matrix: torch.Tensor  # float32 [C, H], the first vectors of all Q queries, then the second …; whole tiles
    exists: torch.Tensor | None  # bool [K_q, Q], None where all vectors exist
    counts: torch.Tensor  # float32 [Q], existing vectors of each query
    num_vectors: int  # K_q
    width: int  # H

    def __len__(self) -> int:
        return len(self.counts)

    @classmethod
    def of(cls, queries: QueryVectors, kind: str, device: torch.device) -> PreparedQueries:
        """Prepare queries for "single_dense" (one mean vector each) or "multi_dense"."""
        vectors, mask = queries.dense.to(device), queries.mask.to(device)
        if kind == "single_dense":
            vectors, found = mean_vectors(vectors, mask)
            mask = mask.any(dim=1, keepdim=True) if found is None else found
        kept = torch.where(mask[..., None], vectors, 0.0)  # [Q, K_q, H]
        matrix = kept.transpose(0, 1).flatten(0, 1)  # [K_q·Q, H]
        matrix = F.pad(matrix, (0, -matrix.shape[1] % WIDTH_TILE, 0, -len(matrix) % COLUMN_TILE)).contiguous()
        exists = None if bool(mask.all()) else mask.T.contiguous()
        return cls(matrix, exists, mask.sum(dim=1).float(), vectors.shape[1], vectors.shape[2])


def mean_vectors(vectors: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the normalised mean of each text's vectors, float32 [N, 1, H], and which texts have any, bool [N, 1].

    Args:
        vectors: float32 [N, K, H].
        mask: bool [N, K], None where all exist.
    """
    kept = vectors if mask is None else torch.where(mask[..., None], vectors, 0.0)
    means = F.normalize(kept.sum(dim=1), dim=-1)[:, None]  # the mean's length does not matter to the cosine
    return means, None if mask is None else mask.any(dim=1, keepdim=True)


def maxsim(
    vectors: torch.Tensor, mask: torch.Tensor | None, queries: PreparedQueries, workspace: Workspace
) -> torch.Tensor:
    """MaxSim, paper Eq. 2: the mean over the query's vectors of the best similarity among the passage's.

    The similarities have the queries in their last dimension: the maximum over K_p then runs over whole rows, many
    queries at a time, and costs a few per cent of the product (over the last dimension it cost 15).

    Args:
        vectors: float32 [p, K_p, H].
        mask: bool [p, K_p], which vectors exist; None where all do.
        queries: prepared, Q of them with K_q vectors each.
        workspace: for the similarities.

    Returns:
        float32 [p, Q], valid until the workspace is used again; -inf where a side has no vector.

    Raises:
        ValueError: the sides' dimensions differ.
    """
    count, k_p, width = vectors.shape
    if width != queries.width:
        raise ValueError(
            f"queries have {queries.width} dimensions, passages {width}; they were made by different models."
        )
    rows = _whole_tiles(vectors.reshape(-1, width), workspace)
    columns = len(queries.matrix)
    products = workspace.take("similarity", (len(rows), columns))
    torch.mm(rows, queries.matrix.T, out=products)
    similarity = products[: count * k_p]
    if mask is not None:
        similarity.masked_fill_(~mask.reshape(-1, 1), -torch.inf)
    best = workspace.take("best", (count, columns))
    torch.amax(similarity.view(count, k_p, columns), dim=1, out=best)
    by_vector = best[:, : queries.num_vectors * len(queries)].view(count, queries.num_vectors, -1)  # [p, K_q, Q]
    if queries.exists is not None:
        by_vector = torch.where(queries.exists, by_vector, 0.0)
    scores = workspace.take("scores", (count, len(queries)))
    torch.sum(by_vector, dim=1, out=scores)
    scores /= queries.counts.clamp(min=1.0)
    if queries.exists is not None:
        scores.masked_fill_(queries.counts == 0, -torch.inf)
    return scores


def _whole_tiles(rows: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """Return the rows [N, H], filled up with zeros to whole tiles."""
    count, width = rows.shape
    full = (count + -count % ROW_TILE, width + -width % WIDTH_TILE)
    if full == (count, width):
        return rows
    padded = workspace.take("padded", full)
    padded[count:] = 0.0
    padded[:, width:] = 0.0
    padded[:count, :width] = rows
    return padded
