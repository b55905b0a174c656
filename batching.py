"""Batches of similar length, and their results put back in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch


def batches_by_length(
    lengths: Sequence[int], tokens_per_batch: int, batch_size: int | None = None
) -> Iterator[list[int]]:
    """Group rows of similar length, longest first, so that a batch padded to its longest row keeps the budget.

    Args:
        lengths: tokens of each row.
        tokens_per_batch: at most so many tokens a batch, padding included; a longer row is a batch of its own.
        batch_size: at most so many rows a batch.

    Yields:
        Row numbers; each row once.

    >>> list(batches_by_length([3, 9, 4, 8], tokens_per_batch=18))
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // max(1, lengths[order[start]]))
        size = min(size, batch_size or size)
        yield order[start : start + size]
        start += size


class OrderedResults:
    """Collects the tensors of batches on the CPU, in the order of the texts.

    Args:
        total: how many texts will come, if known: then each result is written once, to its place.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._blocks: list[dict[str, torch.Tensor]] = []
        self._window: dict[str, torch.Tensor] = {}
        self.count = 0  # texts in closed windows

    def put(self, rows: Sequence[int], window_size: int, results: Mapping[str, torch.Tensor]) -> None:
        """Store the results of a batch; `rows` are the texts' numbers in the current window."""
        place = torch.tensor(rows)
        for name, values in results.items():
            if name not in self._window:
                size = window_size if self._total is None else self._total
                self._window[name] = torch.empty((size, *values.shape[1:]), dtype=values.dtype)
            offset = 0 if self._total is None else self.count
            self._window[name][place + offset] = values.cpu()

    def close_window(self, window_size: int) -> None:
        """Say that all texts of the window are there."""
        self.count += window_size
        if self._total is None:
            self._blocks.append(self._window)
            self._window = {}

    def result(self) -> dict[str, torch.Tensor]:
        """Return {name: tensor [N, …]}; blocks are freed as they are copied."""
        if self._total is not None:
            return self._window
        names = list(self._blocks[0]) if self._blocks else []
        whole = {
            name: torch.empty((self.count, *self._blocks[0][name].shape[1:]), dtype=self._blocks[0][name].dtype)
            for name in names
        }
        start = 0
        while self._blocks:
            block = self._blocks.pop(0)
            size = len(block[names[0]])
            for name in names:
                whole[name][start : start + size] = block.pop(name)
            start += size
        return whole
