"""One process's share in making a store: claim, encode, write, check, conclude."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..files.claims import Claims
from ..files.durable import remove_temporaries
from ..store.manifest import MANIFEST_FILE, Manifest, Settings
from ..store.plan import CLAIMS_FOLDER, PLAN_FILE, SHARD_NAME, Plan, Text
from ..store.shard_file import DamagedShardError, ShardFile, write_shard
from ..store.store import ShardContents, Store, check_entry, entry_of, shard_tensors
from .prepare import POLL, PreparedShard, ShardSource, claim_name

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
            self._bar = tqdm(total=self._total, initial=there, disable=not self._show, unit=self._unit, desc="encode")
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
        model: from `AutoModel.from_pretrained`.
        read: begins to read the corpus anew.
        plan: what the store is to become.
        tokens_per_batch: padding included.
        folder: of the store, with the plan or a manifest in it.
        lease: seconds, as for `Claims`.
        show_progress_bar: draw one.
        tell: takes messages for the user.
    """

    def __init__(
        self,
        model: Any,
        read: Callable[[], Iterable[Text]],
        plan: Plan,
        tokens_per_batch: int,
        folder: Path,
        lease: float,
        show_progress_bar: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._model, self._plan, self._folder, self._tell = model, plan, folder, tell
        self._claims = Claims(folder / CLAIMS_FOLDER, lease)
        self._source = ShardSource(model, read, plan, tokens_per_batch, folder, self._claims, tell)
        unit = "query" if plan.settings.side == "query" else "passage"
        self._progress = Progress(plan.survey.count, unit, show_progress_bar)
        self._written: set[int] = set()
        self._writing: Future[None] | None = None

    def finish(self) -> Store:
        """Encode what is missing, check everything and write the manifest.

        Returns:
            The finished store.

        Raises:
            As `encode_store`.
        """
        finished = False
        with self._claims:
            try:
                if not ((self._folder / MANIFEST_FILE).is_file() and self._is_whole()):
                    remove_temporaries(self._folder)
                    self._encode_missing()
                    self._conclude()
                finished = True
            finally:
                self._source.stopped.set()
                self._progress.close(finished)
        return Store.open(self._folder)

    def _is_whole(self) -> bool:
        """Check a finished store; where it is damaged, make it unfinished again and return False."""
        manifest = Manifest.read(self._folder)
        for number in self._damaged(set(range(len(manifest.shards))), manifest):
            self._source.distrust(number, f"{SHARD_NAME.format(number)} is encoded again.")
        if self._source.missing():
            self._plan.write(self._folder)
            (self._folder / MANIFEST_FILE).unlink(missing_ok=True)
            return False
        self._tell(f"{self._folder}: the store was finished before; all bytes match their hashes.")
        self._clean()
        return True

    def _encode_missing(self) -> None:
        """Encode shards until none is left, preparing the next and writing the last one meanwhile."""
        with ThreadPoolExecutor(1, "prepare") as preparer, ThreadPoolExecutor(1, "write") as writer:
            try:
                coming = preparer.submit(self._source.next_shard)
                while (shard := coming.result()) is not None:
                    others = self._source.done - {shard.number}
                    self._progress.reach(sum(self._plan.shard_count(number) for number in others))
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
        settings, count = self._plan.settings, len(shard.ids)
        dense = torch.empty(count, settings.num_masks, settings.hidden_size)  # float32 [n, K, H]
        indices = torch.empty(count, settings.sparse_top_k, dtype=torch.int32)
        values = torch.empty(count, settings.sparse_top_k)
        coming: Future[PreparedShard | None] | None = None
        done = 0
        encoded = self._model.map_batches(lambda rows: encode_batch(self._model, shard, rows, settings), shard.batches)
        with closing(encoded) as results:
            for rows, out in results:
                if coming is None and 2 * done >= count:
                    coming = preparer.submit(self._source.next_shard)
                place = torch.tensor(rows)
                dense[place] = out["repr_hidden"].cpu().float()
                indices[place] = out["sparse_indices"].cpu().to(torch.int32)
                values[place] = out["sparse_values"].cpu().float()
                done += len(rows)
                self._progress.add(len(rows), sum(len(shard.prepared[row].sequence) for row in rows))
                if self._writing is not None and self._writing.done():
                    self._await_write()  # a full disk is said now, not a shard later
        texts = shard.texts if settings.options["keep_texts"] else None
        contents = ShardContents(shard.ids, dense, indices, values, texts)
        return contents, coming or preparer.submit(self._source.next_shard)

    def _await_write(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, number: int, contents: ShardContents) -> None:
        tensors = shard_tensors(contents, self._plan.settings.dtype)
        write_shard(self._folder / SHARD_NAME.format(number), tensors, self._plan.metadata(number))
        self._written.add(number)
        self._source.written(number)
        self._claims.release(claim_name(number))

    def _conclude(self) -> None:
        """Check all shards and write the manifest, or wait for the process that does."""
        while not (self._folder / MANIFEST_FILE).is_file():
            if not self._claims.take(FINISH):
                time.sleep(POLL)
                continue
            if (self._folder / MANIFEST_FILE).is_file():  # written between our look and our claim
                return
            while damaged := self._damaged(set(range(self._source.total)) - self._written):
                for number in damaged:
                    self._source.distrust(number, f"{SHARD_NAME.format(number)} is encoded again.")
                self._source.stopped.clear()
                self._encode_missing()
            self._write_manifest()
            self._clean()

    def _damaged(self, numbers: set[int], manifest: Manifest | None = None) -> list[int]:
        """Read shards whole and return those whose bytes are not what was written; say why."""
        damaged = []
        for number in sorted(numbers):
            try:
                if manifest is None:
                    file = ShardFile(self._folder / SHARD_NAME.format(number))
                else:
                    file = check_entry(self._folder, manifest.shards[number])
                file.verify()
            except DamagedShardError as error:
                self._tell(str(error))
                damaged.append(number)
        return damaged

    def _write_manifest(self) -> None:
        names = [SHARD_NAME.format(number) for number in range(self._source.total)]
        entries = tuple(entry_of(ShardFile(self._folder / name)) for name in names)
        values = {entry.name: getattr(self._plan.settings, entry.name) for entry in fields(Settings)}
        Manifest(**values, shards=entries).write(self._folder)

    def _clean(self) -> None:
        """Leave nothing but the manifest and the shards."""
        (self._folder / PLAN_FILE).unlink(missing_ok=True)
        remove_temporaries(self._folder)
        self._claims.sweep()


def encode_batch(model: Any, shard: PreparedShard, rows: list[int], settings: Settings) -> Any:
    """Encode some rows of a shard as one batch.

    Returns:
        The output of `model.encode_prepared`.

    Raises:
        ValueError: the model's output is not finite, and the message names the text; or the batch is too large for the
            device.
    """
    prepared = [shard.prepared[row] for row in rows]
    try:
        return model.encode_prepared(prepared, settings.side == "query", sparse_top_k=settings.sparse_top_k)
    except torch.OutOfMemoryError as error:
        size = [len(rows), max(len(text.sequence) for text in prepared)]
        raise ValueError(
            f"a batch of {size} tokens does not fit into memory; give a smaller --tokens-per-batch"
        ) from error
    except ValueError as error:
        if len(rows) == 1:
            raise ValueError(f"text {shard.ids[rows[0]]!r} could not be encoded: {error}") from error
        for row in rows:  # find the text to blame
            encode_batch(model, shard, [row], settings)
        raise
