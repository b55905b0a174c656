"""Which shard is to be encoded next, when several processes share a store."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator

from ..files.claims import Claims
from ..store.plan import Text
from ..store.shard_file import DamagedShardError
from .job import EncodingJob, PreparedShard

POLL = 0.5  # seconds between two looks at what other processes do


class ShardSource:
    """Hands out the shards that are still to be made, one at a time, to whichever process claims them first.

    Args:
        job: what is to be encoded.
        claims: this process's.

    Attributes:
        stopped: set to have `next_shard` wait no longer.
    """

    def __init__(self, job: EncodingJob, claims: Claims) -> None:
        self._job, self._claims = job, claims
        self._stream: Iterator[tuple[int, list[Text]]] = iter(())
        self._read_whole = job.surveyed
        self._done: set[int] = set()
        self._broken: set[int] = set()
        self._last_wanted = -1
        self.stopped = threading.Event()
        self.missing()

    def missing(self) -> list[int]:
        """Look at the folder and return the numbers of the shards that are not there."""
        files = set(os.listdir(self._job.folder))
        waiting = [number for number in range(self._job.plan.shards) if number not in self._done]
        for number in waiting:
            path = self._job.shard_path(number)
            if path.name in files and number not in self._broken and self._is_there(number):
                self._done.add(number)
        return [number for number in waiting if number not in self._done]

    @property
    def texts_there(self) -> int:
        """Texts in the shards known to be there."""
        plan = self._job.plan
        last = plan.shards - 1
        short = plan.shard_size - plan.shard_count(last) if last in self._done else 0
        return len(self._done) * plan.shard_size - short

    def _is_there(self, number: int) -> bool:
        try:
            return self._job.plan.open_shard(self._job.folder, number) is not None
        except DamagedShardError as error:
            self.distrust(number, f"{error} It is encoded again.")
            return False

    def distrust(self, number: int, reason: str) -> None:
        """Have a shard made again although its file is there."""
        self._job.tell(reason)
        self._broken.add(number)
        self._done.discard(number)

    def written(self, number: int) -> None:
        """Take note that this process has written a shard."""
        self._broken.discard(number)
        self._done.add(number)

    def next_shard(self) -> PreparedShard | None:
        """Claim and prepare a shard; wait while others have claimed all that is left.

        Returns:
            None when all shards are there or being written by this process, or the source was stopped.

        Raises:
            ValueError: the corpus is not what it was when the store was begun.
        """
        reserved: int | None = None
        while not self.stopped.is_set():
            for number, chunk in self._stream:
                if number == reserved or (number not in self._done and self._claim(number)):
                    return self._job.prepare(number, chunk)
                if number >= self._last_wanted or self.stopped.is_set():
                    break
            missing = self._missing_elsewhere()
            if not missing:
                return None
            reserved = self._wait(missing)
            self._last_wanted = missing[-1]
            self._stream = self._read()
        return None

    def _read(self) -> Iterator[tuple[int, list[Text]]]:
        yield from self._job.read_shards()
        self._read_whole = True

    def read_rest(self) -> None:
        """Read what this process has not read of the corpus, to know it for the plan's to its end.

        Raises:
            ValueError: it is another.
        """
        for stream in (self._stream, self._read()):
            if not self._read_whole:
                deque(stream, maxlen=0)

    def _claim(self, number: int) -> bool:
        if not self._claims.take(claim_name(number)):
            return False
        if number in self._broken or not self._is_there(number):
            return True
        self._done.add(number)  # finished by another process between our look and our claim
        self._claims.release(claim_name(number))
        return False

    def _wait(self, missing: list[int]) -> int | None:
        """Wait until one of the missing shards is ours or all are there."""
        while missing and not self.stopped.is_set():
            for number in missing:
                if self._claim(number):
                    return number
            self.stopped.wait(POLL)
            missing = self._missing_elsewhere()
        return None

    def _missing_elsewhere(self) -> list[int]:
        """Return the missing shards that this process has not claimed and is not about to write."""
        return [number for number in self.missing() if not self._claims.holds(claim_name(number))]


def claim_name(number: int) -> str:
    """Return the name of a shard's claim."""
    return f"shard-{number:06d}"
