"""Shards of a corpus made ready for the model: claimed, tokenised and cut into batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.claims import Claims
from ..model.batching import batches_by_length
from ..model.tokenization_helpers import PreparedText
from ..store.manifest import Settings
from ..store.plan import SHARD_NAME, Plan, Text, cut
from ..store.shard_file import DamagedShardError, ShardFile, texts_digest

POLL = 0.5  # seconds between two looks at what other processes do


@dataclass
class PreparedShard:
    """One shard's texts as the model reads them.

    Args:
        number: of the shard.
        ids: n ids.
        texts: n texts.
        prepared: n texts, tokenised, with their content words unless the whole vocabulary is let in.
        batches: row numbers of each batch, longest first.
    """

    number: int
    ids: list[str]
    texts: list[str]
    prepared: list[PreparedText]
    batches: list[list[int]]


def prepare_shard(
    model: Any, number: int, chunk: list[Text], settings: Settings, tokens_per_batch: int
) -> PreparedShard:
    """Tokenise one shard's texts and find their content words."""
    ids, texts = [text.id for text in chunk], [text.text for text in chunk]
    prepared = model.texts.prepare(texts, settings.side == "query", settings.options["content_filter"])
    # a row's batch depends on the lengths alone, so that whichever process encodes a shard gets the same vectors
    batches = list(batches_by_length([len(text.sequence) for text in prepared], tokens_per_batch))
    return PreparedShard(number, ids, texts, prepared, batches)


class ShardSource:
    """Hands out the shards that are still to be made, one at a time, to whichever process claims them first.

    Args:
        model: tokenises.
        read: begins to read the corpus anew.
        plan: what the store is to become.
        tokens_per_batch: padding included.
        folder: the store's.
        claims: this process's.
        tell: takes messages for the user.

    Attributes:
        done: numbers of the shards known to be there.
    """

    def __init__(
        self,
        model: Any,
        read: Callable[[], Iterable[Text]],
        plan: Plan,
        tokens_per_batch: int,
        folder: Path,
        claims: Claims,
        tell: Callable[[str], None],
    ) -> None:
        self._model, self._read, self._plan, self._tokens_per_batch = model, read, plan, tokens_per_batch
        self._folder, self._claims, self._tell = folder, claims, tell
        self._stream: Iterator[tuple[int, list[Text]]] = iter(())
        self._broken: set[int] = set()
        self._last_wanted = -1
        self.stopped = threading.Event()
        self.done: set[int] = set()
        self.missing()

    @property
    def total(self) -> int:
        """Shards of the whole store."""
        return len(self._plan.survey.digests)

    def missing(self) -> list[int]:
        """Look at the folder and return the numbers of the shards that are not there."""
        for number in range(self.total):
            if number not in self.done and number not in self._broken and self._is_there(number):
                self.done.add(number)
        return [number for number in range(self.total) if number not in self.done]

    def _is_there(self, number: int) -> bool:
        path = self._folder / SHARD_NAME.format(number)
        if not path.exists():
            return False
        try:
            found = ShardFile(path).metadata
        except DamagedShardError as error:
            self.distrust(number, f"{error} It is encoded again.")
            return False
        expected = self._plan.metadata(number)
        strange = [name for name, value in expected.items() if found.get(name) != value]
        if strange:
            self.distrust(number, f"{path}: not of this store ({', '.join(strange)} differ). It is encoded again.")
        return not strange

    def distrust(self, number: int, reason: str) -> None:
        """Have a shard made again although its file is there."""
        self._tell(reason)
        self._broken.add(number)
        self.done.discard(number)

    def written(self, number: int) -> None:
        """Take note that this process has written a shard."""
        self._broken.discard(number)
        self.done.add(number)

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
                if number == reserved or (number not in self.done and self._claim(number)):
                    self._check(number, chunk)
                    return prepare_shard(self._model, number, chunk, self._plan.settings, self._tokens_per_batch)
                if number >= self._last_wanted or self.stopped.is_set():
                    break
            if reserved is not None and not self.stopped.is_set():
                raise ValueError(f"{self._folder}: the corpus has become shorter since the store was begun.")
            missing = self._missing_elsewhere()
            if not missing:
                return None
            reserved = self._wait(missing)
            self._last_wanted = missing[-1]
            self._stream = cut(self._read(), self._plan.shard_size)
        return None

    def _claim(self, number: int) -> bool:
        if not self._claims.take(claim_name(number)):
            return False
        if number in self._broken or not self._is_there(number):
            return True
        self.done.add(number)  # finished by another process between our look and our claim
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

    def _check(self, number: int, chunk: list[Text]) -> None:
        digest = texts_digest([text.id for text in chunk], [text.text for text in chunk])
        if digest != self._plan.survey.digests[number]:
            raise ValueError(
                f"{self._folder}: texts {number * self._plan.shard_size} and on changed after the store was begun; "
                "encode a changed corpus into another folder."
            )


def claim_name(number: int) -> str:
    """Return the name of a shard's claim."""
    return f"shard-{number:06d}"
