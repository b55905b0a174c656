"""Batches of similar length, run side by side on a CPU, and their results put back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

Batch = TypeVar("Batch")
Result = TypeVar("Result")
MOST_WORKERS = 8  # each holds the states of a batch


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


def count_workers(model: nn.Module) -> int:
    """Return how many batches to run side by side: on a CPU one for each thread of torch, up to a limit; else 1.

    Threads that share an operation wait for each other at its end, and a batch has hundreds of small ones; threads that
    each have a batch do not. What keeps a state of its own during a forward pass (autocast; compiled, offloaded and
    quantised models) takes one batch at a time.

    Args:
        model: about to encode.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or getattr(model, "hf_quantizer", None) is not None:
        return 1
    for module in model.modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or hasattr(module, "_hf_hook"):
            return 1
    return min(MOST_WORKERS, torch.get_num_threads())


def run_side_by_side(
    work: Callable[[Batch], Result], batches: Sequence[Batch], workers: int
) -> Generator[tuple[Batch, Result], None, None]:
    """Run `work` on every batch, some of them at the same time, each with its share of torch's threads.

    Args:
        work: called with one batch at a time, in some thread.
        batches: whatever `work` takes.
        workers: how many at the same time.

    Yields:
        Each batch and its result, in the batches' order; few results wait at any time.

    Raises:
        Whatever `work` raises; batches that have not begun are dropped.

    >>> [result for _, result in run_side_by_side(len, [[3, 1], [2]], workers=2)]
    [2, 1]
    """
    workers = min(workers, len(batches))
    if workers < 2:
        for batch in batches:
            yield batch, work(batch)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),))
    waiting: deque[tuple[Batch, Future[Result]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(work, batch)))
            if len(waiting) > 2 * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # torch gives the workers' number to every thread begun after them


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
