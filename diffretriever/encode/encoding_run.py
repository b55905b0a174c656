"""One process's share in making a store: claim, encode, write, check, conclude."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.claims import Claims
from ..files.durable import remove_temporaries
from ..files.removal import remove_file
from ..progress import progress_bar
from ..store.manifest import MANIFEST_FILE, Manifest, ShardEntry
from ..store.plan import CLAIMS_FOLDER, PLAN_FILE, Plan
from ..store.shard_file import ShardFile
from ..store.store import ShardContents, Store, damaged_shards, entry_of
from .cut_texts import TrainedCut
from .job import EncodingJob, PreparedShard
from .shard_source import POLL, ShardSource, claim_name

FINISH = "finish"  # the claim on the last step


class Progress:
    """A bar over all texts of the store, whoever encodes them; the rate is this run's.

    Args:
        total: texts in the store.
        unit: "passage" or "query".
        show: whether to draw it.
    """

    def __init__(self, total: int, unit: str, show: bool) -> None:
        self._total, self._unit, self._show = total, unit, show
        self._bar: Any = None
        self._there = 0  # texts counted so far, this run's and others'
        self._tokens, self._begun = 0, time.perf_counter()

    def reach(self, there: int) -> None:
        """Count what earlier runs and other processes have done: `there` texts are in finished shards."""
        if self._bar is None:  # what was there before is no part of the speed
            self._bar = progress_bar(self._total, self._unit, "encode", self._show, there)
            self._there, self._begun = there, time.perf_counter()
        elif there > self._there:
            self._bar.update(there - self._there)
            self._there = there

    def add(self, texts: int, tokens: int) -> None:
        """Count what this process has encoded."""
        self._there += texts
        self._tokens += tokens
        took = time.perf_counter() - self._begun
        self._bar.set_postfix_str(f"{self._tokens / took:.0f} tokens/s", refresh=False)
        self._bar.update(texts)

    def close(self, finished: bool) -> None:
        """End the bar."""
        if self._bar is not None:
            if finished:
                self.reach(self._total)
            self._bar.close()


class EncodingRun:
    """One process's share in making a store.

    Args:
        job: what is to be encoded.
        show_progress_bar: draw one.
    """

    def __init__(self, job: EncodingJob, show_progress_bar: bool) -> None:
        self._job = job
        self._claims = Claims(job.folder / CLAIMS_FOLDER)
        self._source = ShardSource(job, self._claims)
        self._progress = Progress(job.plan.survey.count, "query" if job.is_query else "passage", show_progress_bar)
        self._written: set[int] = set()
        self._encoded = self._cut = 0  # texts, and those of them that were cut
        self._writing: Future[None] | None = None

    def finish(self) -> Store:
        """Encode what is missing, check everything and write the manifest.

        Returns:
            The finished store.

        Raises:
            As `encode_store`.
        """
        finished = False
        with refusing_to_vanish(self._job.folder), self._claims:
            try:
                if not ((self._job.folder / MANIFEST_FILE).is_file() and self._is_whole()):
                    remove_temporaries(self._job.folder)
                    self._encode_missing()
                    self._source.read_rest()
                    self._conclude()
                    trained = TrainedCut.of(self._job.model, self._job.is_query)
                    if trained is not None and (warning := trained.warning(self._cut, self._encoded)):
                        self._job.tell(f"{self._job.folder}: {warning}")
                finished = True
            finally:
                self._source.stopped.set()
                self._progress.close(finished)
        return Store.open(self._job.folder)

    def _is_whole(self) -> bool:
        """Check a finished store; where it is damaged, make it unfinished again and return False."""
        self._source.read_rest()
        self._distrust_damaged({entry.file: entry for entry in Manifest.read(self._job.folder).shards})
        if self._source.missing():
            refuse_unknown_model(self._job.folder, self._job.plan)
            self._job.plan.write(self._job.folder)
            remove_file(self._job.folder / MANIFEST_FILE)
            return False
        self._job.tell(finished_before(self._job.folder))
        try:
            clean(self._job.folder, self._claims, self._job.plan)
        except OSError as error:  # what a killed process left does no harm where nothing can be removed
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
        return True

    def _encode_missing(self) -> None:
        """Encode shards until none is left, preparing the next and writing the last one meanwhile."""
        if self._source.missing():
            refuse_unknown_model(self._job.folder, self._job.plan)
        with ThreadPoolExecutor(1, "prepare") as preparer, ThreadPoolExecutor(1, "write") as writer:
            try:
                coming = preparer.submit(self._source.next_shard)
                while (shard := coming.result()) is not None:
                    self._progress.reach(self._source.texts_there)
                    contents, coming = self._encode_shard(shard, preparer)
                    self._await_write()
                    self._writing = writer.submit(self._write, shard.number, contents)
                self._await_write()
            finally:
                self._source.stopped.set()  # a preparer that waits for others stops waiting

    def _encode_shard(
        self, shard: PreparedShard, preparer: ThreadPoolExecutor
    ) -> tuple[ShardContents, Future[PreparedShard | None]]:
        """Return one shard's vectors, and the shard to come: claimed only when half of this one is done."""
        count = len(shard.texts)
        coming: Future[PreparedShard | None] | None = None
        done = 0

        def after_batch(rows: Sequence[int]) -> None:
            nonlocal coming, done
            if coming is None and 2 * done >= count:
                coming = preparer.submit(self._source.next_shard)
            done += len(rows)
            self._progress.add(len(rows), sum(len(shard.prepared[row].sequence) for row in rows))
            if self._writing is not None and self._writing.done():
                self._await_write()  # a full disk is said now, not a shard later

        contents = self._job.encode_shard(shard, after_batch)
        self._encoded += count
        self._cut += sum(text.cut for text in shard.prepared)
        return contents, coming or preparer.submit(self._source.next_shard)

    def _await_write(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, number: int, contents: ShardContents) -> None:
        self._job.write(number, contents)
        self._written.add(number)
        self._source.written(number)
        self._claims.release(claim_name(number))

    def _conclude(self) -> None:
        """Check all shards and write the manifest, or wait for the process that does."""
        manifest = self._job.folder / MANIFEST_FILE
        while not manifest.is_file():
            if not self._claims.take(FINISH):
                time.sleep(POLL)
                continue
            if manifest.is_file():  # written between our look and our claim
                return
            others = [number for number in range(self._job.plan.shards) if number not in self._written]
            while self._distrust_damaged({self._job.shard_path(number).name: None for number in others}):
                self._source.stopped.clear()
                self._encode_missing()
            paths = map(self._job.shard_path, range(self._job.plan.shards))
            Manifest.of(self._job.plan.settings, (entry_of(ShardFile(path)) for path in paths)).write(self._job.folder)
            clean(self._job.folder, self._claims, self._job.plan)

    def _distrust_damaged(self, shards: Mapping[str, ShardEntry | None]) -> bool:
        """Have shards made again whose bytes are not what was written; returns whether there are any."""
        damaged = damaged_shards(self._job.folder, shards)
        for number in range(self._job.plan.shards):
            if error := damaged.get(self._job.shard_path(number).name):
                self._source.distrust(number, f"{error} It is encoded again.")
        return bool(damaged)


@contextmanager
def refusing_to_vanish(folder: Path) -> Iterator[None]:
    """Say of a store that is deleted under our hands just that, whatever fails for it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if (folder / PLAN_FILE).exists() or (folder / MANIFEST_FILE).exists():
            raise
        raise FileNotFoundError(
            f"{folder}: the store was deleted while it was being made, and what was encoded with it. Run the same "
            "command again to begin anew."
        ) from error


def refuse_unknown_model(folder: Path, plan: Plan) -> None:
    """Raise ValueError for a store that does not tell its model's parts: new vectors might not go with its own."""
    if not plan.settings.model_parts:
        raise ValueError(
            f"{folder}: the store was begun by an earlier version of diffretriever, which did not record "
            "the model's parts, so that more shards might not go with those that are there. Finish it with that "
            "version, or encode into another folder."
        )


def finished_before(folder: Path) -> str:
    """Return what to say of a store that was whole already."""
    return f"{folder}: the store was finished before; all bytes match their hashes."


def clean(folder: Path, claims: Claims, plan: Plan) -> None:
    """Leave nothing but the manifest and the shards."""
    remove_file(folder / PLAN_FILE)
    remove_temporaries(folder)
    claims.sweep({FINISH, *map(claim_name, range(plan.shards))})
