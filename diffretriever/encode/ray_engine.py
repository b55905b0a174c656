"""From a corpus to a store on a Ray cluster: Ray reads and splits the corpus, its actors encode and write shards."""

from __future__ import annotations

import logging
import os
import signal
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data.corpus import source_files
from ..files.claims import Claims, living_owners
from ..files.durable import remove_temporaries
from ..files.install import install_hint
from ..files.removal import remove_file
from ..store.manifest import MANIFEST_FILE, Manifest, Settings, ShardEntry
from ..store.plan import CLAIMS_FOLDER, SHARD_NAME, Plan, Survey, join_surveys
from ..store.store import Store
from .cut_texts import TrainedCut
from .encode_store import check_folder, check_options, check_same, tell_user
from .encoding_run import FINISH, Progress, clean, finished_before, refuse_unknown_model, refusing_to_vanish
from .job import read_texts
from .ray_tasks import CorpusParts, Row, ShardEncoder, check_shards, describe

CHECKED_AT_ONCE = 64  # shards a task
RETRIES = "\nFailed to "  # begins what Ray appends to the words of an error


def encode_on_ray(
    load: Callable[[], Any],
    source: str | Path,
    folder: str | Path,
    model: str,
    is_query: bool = False,
    dtype: str = "float16",
    shard_size: int | None = None,
    tokens_per_batch: int | None = None,
    sparse_top_k: int | None = None,
    content_filter: bool = True,
    keep_texts: bool = True,
    address: str | None = None,
    actors: int | None = None,
    show_progress_bar: bool = False,
    tell: Callable[[str], None] = tell_user,
) -> Store:
    """Encode a corpus or queries into a store as `encode_store` does, on a cluster of Ray's.

    Shards that are there are checked, those that are missing encoded, whoever dies on the way; the store is the same to
    the byte. All machines of the cluster see the corpus and the store's folder under the same paths.

    Args:
        load: returns the model; called once in each actor. It is pickled.
        source, folder, is_query, dtype, shard_size, tokens_per_batch, sparse_top_k, content_filter, keep_texts: as
            `encode_store`.
        model: its name, to be recorded.
        address: of the cluster, as `ray.init` takes it. None is the one that this process is connected to, that
            RAY_ADDRESS names or that runs here, else a new one of this machine alone, for this run.
        actors: processes that hold the model; None is one for each of the cluster's GPUs, or CPUs where it has none.
        show_progress_bar, tell: as `encode_store`.

    Returns:
        The finished store.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: no cluster at this address.
        FileNotFoundError, ValueError, OSError: as `encode_store`; or a machine does not see the store's folder.
    """
    options: dict[str, Any] = {"content_filter": content_filter, "keep_texts": keep_texts, "sparse_top_k": sparse_top_k}
    options |= {"shard_size": shard_size, "tokens_per_batch": tokens_per_batch}
    check_options(dtype, options)
    folder = Path(folder).absolute()
    check_folder(folder)
    files = _files(str(source), is_query)
    with Claims(folder / CLAIMS_FOLDER) as claims, connection(address) as ray:
        if not claims.take(FINISH):
            owners = " and ".join(living_owners(folder / CLAIMS_FOLDER))
            raise ValueError(f"{folder}: the store is being written (locked) by {owners}. Wait for it, or end it.")
        cluster = Cluster(ray, actors)
        settings, options, trained = cluster.call(describe, load, folder, is_query, dtype, options)
        parts = CorpusParts(str(source), files, is_query, folder, options["shard_size"])
        run = RayRun(cluster, parts, replace(settings, model=model), tell)
        run.begin()
        with refusing_to_vanish(folder):
            run.finish((load, parts, dtype, options), trained, show_progress_bar)
            clean(folder, claims, run.plan)
    return Store.open(folder)


def _files(source: str, is_query: bool) -> tuple[str, ...]:
    if source.startswith("hf:"):
        return (source,)
    return tuple(str(file.absolute()) for file in source_files(source, "queries" if is_query else "corpus"))


@contextmanager
def connection(address: str | None) -> Iterator[Any]:
    """Connect to a cluster, or start one; what is started is ended.

    Yields:
        The module ray.

    Raises:
        ImportError, ConnectionError: as `encode_on_ray`.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of the driver; a cluster has its own log files
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"--engine ray needs Ray; {install_hint('ray')}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    stop = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL  # None: a C library's
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address, include_dashboard=None if address else False, **options)
    except ConnectionError as error:
        hint = "If it runs, it may ask for a token, as those of `ray start` do: set RAY_AUTH_MODE=token here, too"
        raise ConnectionError(f"{error}. {hint} (docs/scale.md).") from error
    try:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, stop)  # Ray would end the process its way
        yield ray
    finally:
        ray.shutdown()


class Cluster:
    """What runs where on a cluster.

    Args:
        ray: the module, connected.
        actors: as `encode_on_ray`.
    """

    def __init__(self, ray: Any, actors: int | None) -> None:
        self._ray = ray
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        self._resources: dict[str, float] = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        self._actors = actors or gpus or max(1, int(there.get("CPU", 1)))
        self._context = ray.data.DataContext.get_current().copy()
        self._context.enable_progress_bars = False
        self._context.raise_original_map_exception = True  # else its words are lost in Ray's own
        self._context.target_max_block_size = 1  # bytes: each row goes on at once, not when there are 128 MB of them

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function where an actor would run, in a process that ends with it."""
        remote = self._ray.remote(**self._resources, max_calls=1)(function)
        with plain_errors(self._ray):
            return self._ray.get(remote.remote(*arguments))

    def each(self, rows: Sequence[Row], function: Callable[[Row], Any], many: bool) -> Iterator[Row]:
        """Yield what a function makes of rows, a task each, in any order.

        Args:
            rows: not too large.
            function: returns a row, or yields some.
            many: whether it yields them.
        """
        if not rows:
            return
        with plain_errors(self._ray), self._ray.data.DataContext.current(self._context):
            table = self._ray.data.from_items(list(rows), override_num_blocks=len(rows))
            yield from (table.flat_map(function) if many else table.map(function)).iter_rows()

    def encode(
        self, rows: Sequence[Row], read: Callable[[Row], Iterator[Row]], encoder: tuple[Any, ...]
    ) -> Iterator[Row]:
        """Yield what the actors say of each shard.

        Args:
            rows: parts of the corpus.
            read: yields a part's shards.
            encoder: arguments of `ShardEncoder`, one of which each actor holds.
        """
        data = self._ray.data
        with plain_errors(self._ray), data.DataContext.current(self._context):
            table = data.from_items(list(rows), override_num_blocks=len(rows))
            # readers take no CPU: actors may have them all, and would wait for ever for who waits for one
            readers = data.TaskPoolStrategy(size=min(len(rows), 1 + self._actors // 4))
            table = table.flat_map(read, compute=readers, num_cpus=0)
            pool = data.ActorPoolStrategy(size=self._actors, max_tasks_in_flight_per_actor=2)
            table = table.map(ShardEncoder, fn_constructor_args=encoder, compute=pool, **self._resources)
            yield from table.iter_rows()


@contextmanager
def plain_errors(ray: Any) -> Iterator[None]:
    """Raise what our own code raised in a process of Ray's, without what Ray wraps it in."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while isinstance(cause, ray.exceptions.RayError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        if cause.args and isinstance(cause.args[0], str):
            cause.args = (cause.args[0].partition(RETRIES)[0], *cause.args[1:])
        raise cause from error


class RayRun:
    """The driver's share in making a store.

    Args:
        cluster: where the rest is done.
        parts: of the corpus.
        settings: of the model.
        tell: takes messages for the user.
    """

    def __init__(self, cluster: Cluster, parts: CorpusParts, settings: Settings, tell: Callable[[str], None]) -> None:
        self._cluster, self._parts, self._settings, self._tell = cluster, parts, settings, tell
        self._folder = parts.folder
        self._entries: dict[int, ShardEntry] = {}
        self.plan: Plan

    def begin(self) -> None:
        """Read the corpus and write the plan, unless the folder has one; find the shards that are there.

        Raises:
            ValueError: it is of another model; ids occur twice; no text at all.
        """
        others = [{"file": number} for number in range(len(self._parts.files) - 1)]
        counts = {row["file"]: int(row["count"]) for row in self._cluster.each(others, self._parts.count, many=False)}
        self._rows = self._parts.rows([counts[number] for number in range(len(others))])
        plan = Plan.read(self._folder)
        if plan is None:
            Plan(self._settings, self._survey(), self._parts.shard_size).write(self._folder)
            plan = Plan.read(self._folder)
            assert plan is not None
        check_same(self._folder, plan.settings, self._settings)
        self.plan = plan

    def _survey(self) -> Survey:
        found: dict[int, tuple[str, array[int]]] = {}
        for row in self._cluster.each(self._rows, self._parts.survey, many=True):
            hashes = array("q")
            hashes.frombytes(row["hashes"])
            found[row["number"]] = row["digest"], hashes
        read = partial(read_texts, self._parts.source, self._parts.is_query)
        return join_surveys((found.pop(number) for number in sorted(found)), read, self._parts.source)

    def finish(self, encoder: tuple[Any, ...], trained: TrainedCut | None, show_progress_bar: bool) -> None:
        """Have the missing shards encoded and write the manifest.

        Args:
            encoder: as `Cluster.encode` takes it.
            trained: how often the model's training cut texts.
            show_progress_bar: draw one.

        Raises:
            As `encode_on_ray`.
        """
        self._check_shards()
        there = bytes(number in self._entries for number in range(self.plan.shards))
        read = partial(self._parts.missing, there=there)
        manifest = self._folder / MANIFEST_FILE
        if all(there):
            deque(self._cluster.each(self._rows, read, many=True), maxlen=0)  # it is the plan's corpus to its end
            if manifest.is_file():
                self._tell(finished_before(self._folder))
                return
        else:
            refuse_unknown_model(self._folder, self.plan)
            self.plan.write(self._folder)
            remove_file(manifest)
            remove_temporaries(self._folder)
            cut, encoded = self._encode(read, encoder, show_progress_bar)
            if trained is not None and (warning := trained.warning(cut, encoded)):
                self._tell(f"{self._folder}: {warning}")
        entries = (self._entries[number] for number in range(self.plan.shards))
        Manifest.of(self.plan.settings, entries).write(self._folder)

    def _encode(
        self, read: Callable[[Row], Iterator[Row]], encoder: tuple[Any, ...], show_progress_bar: bool
    ) -> tuple[int, int]:
        """Have shards encoded; returns how many texts were cut, and how many were encoded."""
        progress = Progress(self.plan.survey.count, "query" if self._parts.is_query else "passage", show_progress_bar)
        progress.reach(sum(entry.count for entry in self._entries.values()))
        cut = encoded = 0
        finished = False
        try:
            for row in self._cluster.encode(self._rows, read, encoder):
                self._entries[row["number"]] = _entry(row)
                progress.add(row["count"], row["tokens"])
                cut, encoded = cut + row["cut"], encoded + row["encoded"]
            finished = True
        finally:
            progress.close(finished)
        return cut, encoded

    def _check_shards(self) -> None:
        """Find the shards that are there and whole; of the others, say what is wrong."""
        files = set(os.listdir(self._folder))
        there = [number for number in range(self.plan.shards) if SHARD_NAME.format(number) in files]
        rows = [{"numbers": there[at : at + CHECKED_AT_ONCE]} for at in range(0, len(there), CHECKED_AT_ONCE)]
        try:
            written: Sequence[ShardEntry] | None = Manifest.read(self._folder).shards
        except FileNotFoundError:
            written = None
        for row in self._cluster.each(rows, partial(check_shards, folder=self._folder), many=True):
            number, error = row["number"], row["error"]
            if not error:
                entry = _entry(row)
                if written is None or written[number] == entry:
                    self._entries[number] = entry
                    continue
                error = f"{self._folder / entry.file}: the shard is not the one that the manifest names."
            self._tell(f"{error} It is encoded again.")


def _entry(row: Row) -> ShardEntry:
    return ShardEntry(**{field.name: row[field.name] for field in fields(ShardEntry)})
