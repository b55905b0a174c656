"""What Ray's processes do for a store: read parts of the corpus, check shards, encode shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..data.corpus import Passage, Query
from ..store.identity import describe_model
from ..store.manifest import Settings
from ..store.plan import Plan, Text, cut, survey_shard
from ..store.shard_file import DamagedShardError
from ..store.store import entry_of
from .cut_texts import TrainedCut
from .encode_store import check_same, fill_in
from .job import EncodingJob, read_texts

Row = dict[str, Any]  # of a table of Ray's


@dataclass(frozen=True)
class CorpusParts:
    """A corpus cut at its files: a part has the shards that begin in its file, and reads on where one ends in the next.

    Args:
        source: for messages.
        files: in their order, each something that `read_texts` reads.
        is_query: the side.
        folder: of the store.
        shard_size: texts a shard.
    """

    source: str
    files: tuple[str, ...]
    is_query: bool
    folder: Path
    shard_size: int

    def count(self, row: Row) -> Row:
        """Return how many texts a file has."""
        return {"file": row["file"], "count": sum(1 for _ in read_texts(self.files[row["file"]], self.is_query))}

    def rows(self, counts: list[int]) -> list[Row]:
        """Return the parts: number of the file, texts of it to pass over, first shard, and first shard behind.

        Args:
            counts: texts of each file but the last; the last part goes to the end.
        """
        rows: list[Row] = []
        offset = 0
        for file, count in enumerate([*counts, None]):
            first = -(-offset // self.shard_size)
            stop = -1 if count is None else -(-(offset + count) // self.shard_size)
            if stop != first:
                rows.append({"file": file, "skip": first * self.shard_size - offset, "first": first, "stop": stop})
            offset += count or 0
        return rows

    def survey(self, row: Row) -> Iterator[Row]:
        """Yield what `survey_shard` says of each shard of a part."""
        for number, texts in cut(self._texts(row), self.shard_size, row["first"]):
            digest, hashes = survey_shard(texts)
            yield {"number": number, "digest": digest, "hashes": hashes.tobytes()}

    def missing(self, row: Row, there: bytes) -> Iterator[Row]:
        """Read a part, and yield the shards of it that are to be encoded, their ids and texts.

        Args:
            row: of `rows`.
            there: for each shard, whether it need not be encoded.

        Raises:
            ValueError: the corpus is not the plan's.
        """
        plan = read_plan(self.folder)
        numbers = range(row["first"], plan.shards if row["stop"] < 0 else row["stop"])
        for number, texts in plan.shards_of(self._texts(row), self.source, self.folder, numbers):
            if not there[number]:
                yield {"number": number, "ids": [text.id for text in texts], "texts": [text.text for text in texts]}

    def _texts(self, row: Row) -> Iterator[Text]:
        read = chain.from_iterable(read_texts(file, self.is_query) for file in self.files[row["file"] :])
        stop = None if row["stop"] < 0 else row["skip"] + (row["stop"] - row["first"]) * self.shard_size
        return islice(read, row["skip"], stop)


def read_plan(folder: Path) -> Plan:
    """Return the plan that the driver has written.

    Raises:
        FileNotFoundError: it is not to be seen here.
    """
    plan = Plan.read(folder)
    if plan is None:
        raise FileNotFoundError(
            f"{folder}: a machine of the cluster does not see the store that is made there; they must share the "
            "folder, under one path."
        )
    return plan


def check_shards(row: Row, folder: Path) -> Iterator[Row]:
    """Read shards whole; yield for each its entry in the manifest, or what is wrong with it."""
    plan = read_plan(folder)
    for number in row["numbers"]:
        try:
            found = intact_entry(plan, folder, int(number))
            yield {"number": number, "error": "", **(found or {})}
        except DamagedShardError as error:
            yield {"number": number, "error": str(error)}


def intact_entry(plan: Plan, folder: Path, number: int) -> Row | None:
    """Return a shard's entry in the manifest, its fields by name; None where the shard is not there.

    Raises:
        DamagedShardError: a byte of it has changed, or it is of another store.
    """
    file = plan.open_shard(folder, number)
    if file is None:
        return None
    file.verify()
    return asdict(entry_of(file))


def describe(
    load: Callable[[], Any], folder: Path, is_query: bool, dtype: str, options: dict[str, Any]
) -> tuple[Settings, dict[str, Any], TrainedCut | None]:
    """Return the settings of the store that this model makes, the options with no size left open, and cuts."""
    model = load()
    fill_in(options, Plan.read(folder), model)
    return describe_model(model, is_query, dtype, options), options, TrainedCut.of(model, is_query)


class ShardEncoder:
    """A model in one of Ray's processes, which encodes shards and writes them into the store.

    Args:
        load: returns the model.
        parts: of the corpus.
        dtype: of the stored vectors.
        options: as `describe` returned them.
    """

    def __init__(self, load: Callable[[], Any], parts: CorpusParts, dtype: str, options: dict[str, Any]) -> None:
        plan, model = read_plan(parts.folder), load()
        check_same(parts.folder, plan.settings, describe_model(model, parts.is_query, dtype, options))
        self._job = EncodingJob(
            model, parts.source, parts.folder, plan, options["tokens_per_batch"], surveyed=True, tell=print
        )

    def __call__(self, row: Row) -> Row:
        """Encode one of the rows that `CorpusParts.missing` yields.

        Returns:
            The shard's entry in the manifest, and what was done for it: texts encoded, texts cut, tokens.
        """
        number, job = int(row["number"]), self._job
        done = {"number": number, "encoded": 0, "cut": 0, "tokens": 0}
        try:
            found = intact_entry(job.plan, job.folder, number)
        except DamagedShardError:
            found = None
        if found is None:  # else a process wrote it and died before it could say so
            kind = Query if job.is_query else Passage
            shard = job.prepare(number, [kind(*text) for text in zip(row["ids"], row["texts"], strict=True)])
            job.write(number, job.encode_shard(shard, lambda rows: None))
            done["encoded"] = len(shard.texts)
            done["cut"] = sum(text.cut for text in shard.prepared)
            done["tokens"] = sum(len(text.sequence) for text in shard.prepared)
            file = job.plan.open_shard(job.folder, number)
            assert file is not None
            found = asdict(entry_of(file))
        return {**done, **found}
