"""The candidates that a query is ranked against: passages of all processes, gathered with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F


def world() -> tuple[int, int]:
    """Return this process's number, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is the sum of what every process asks of this one's rows."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)  # [processes, N, ...]

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Join the rows of all processes, in the processes' order; they may have different numbers of rows.

    The gradient flows back to the process that a row came from. Averaged over processes, as DistributedDataParallel
    does, it is the gradient of the mean of the processes' losses.

    Args:
        rows: [N, ...]; N may differ between processes, the rest may not.

    Returns:
        [sum of N, ...], and where this process's own rows begin.
    """
    process, processes = world()
    if processes == 1:
        return rows, 0
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(processes)]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(sizes) - len(rows)))
    if rows.is_floating_point():
        gathered: torch.Tensor = _Gather.apply(padded)
    else:
        gathered = torch.stack(_plain_gather(padded))
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]), sum(sizes[:process])


def gather_ids(ids: torch.Tensor) -> torch.Tensor:
    """Do as `gather_rows` for lists of token ids padded with -1, whose width may differ, too: int64 [N, W]."""
    _, processes = world()
    if processes == 1:
        return ids
    width = torch.tensor([ids.shape[1]], device=ids.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    return gather_rows(F.pad(ids, (0, int(width) - ids.shape[1]), value=-1))[0]


def _plain_gather(rows: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return parts


def known_positives(
    query_hashes: torch.Tensor, positive_hashes: torch.Tensor, passage_hashes: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Say which candidates answer a query without being its target: they must not count as its negatives.

    Args:
        query_hashes: int64 [Q], of the queries' texts.
        positive_hashes: int64 [Q, N], of all passages that answer each query, padded with -1.
        passage_hashes: int64 [P, 2], of each passage's text and of the query that it is the positive of (-1: none).
        targets: int64 [Q], each query's own positive.

    Returns:
        bool [Q, P].
    """
    same_text = (positive_hashes[:, :, None] == passage_hashes[None, None, :, 0]).any(dim=1)
    same_query = query_hashes[:, None] == passage_hashes[None, :, 1]
    found = same_text | same_query
    return found.scatter(1, targets[:, None], False)
