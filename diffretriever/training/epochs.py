"""Which training items stand in which batch: batches of similar length, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, groups: Sequence[int] = (), pool: int = 32
) -> np.ndarray:
    """Split the items into batches of similar length, in random order; what does not fill a batch is left out.

    Args:
        lengths: one length an item, in any unit.
        batch_size: items in a batch.
        seed, epoch: fix the order.
        groups: sizes of runs of items that share no batch with the others; none: one group.
        pool: batches that are sorted together; the larger, the less padding and the less chance.

    Returns:
        int64 [batches, batch_size], item numbers; none occurs twice.
    """
    rng = np.random.default_rng([seed, epoch])
    sizes = np.asarray(lengths)
    found = []
    for first, end in pairwise(np.cumsum([0, *(groups or [len(sizes)])])):
        order = first + rng.permutation(end - first)[: (end - first) // batch_size * batch_size]
        for start in range(0, len(order), batch_size * pool):
            part = order[start : start + batch_size * pool]
            order[start : start + batch_size * pool] = part[np.argsort(sizes[part], kind="stable")]
        found.append(order.reshape(-1, batch_size))
    batches = np.concatenate(found)
    return batches[rng.permutation(len(batches))]


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """One process's micro-batches of an epoch, as lists of (epoch, item number).

    Every process takes each `processes`-th item of a global batch, so that lengths are alike everywhere and a step
    sees the same items whatever the number of processes.

    Args:
        lengths: one length an item.
        batch_size: queries a step, over all processes and micro-batches.
        seed: fixes the order.
        accumulation: micro-batches a step.
        process, processes: which process this is, and of how many.
        groups: as for `epoch_batches`.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, accumulation: int = 1, process: int = 0,
        processes: int = 1, groups: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.accumulation, self.process, self.processes = accumulation, process, processes
        self.groups = groups or [len(lengths)]
        self.epoch = 0

    def __len__(self) -> int:
        return sum(group // self.batch_size for group in self.groups) * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in epoch_batches(self.lengths, self.batch_size, self.seed, self.epoch, self.groups):
            for number in range(self.accumulation):
                mine = batch[number :: self.accumulation][self.process :: self.processes]
                yield [(self.epoch, int(item)) for item in mine]


class EpochLoader(DataLoader[Any]):
    """A DataLoader that tells its sampler the epoch, as transformers' Trainer asks."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)
