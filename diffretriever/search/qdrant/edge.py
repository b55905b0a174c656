"""A collection in a folder: Qdrant's own engine in this process (qdrant-edge-py).

FOLDER/COLLECTION holds `diffretriever.json`, what `upload` recorded, and `engine`, the engine's own files. The engine's
write-ahead log is locked by the process that has it open, and keeps what was put in when that process is killed. All of
the engine's errors are of the type Exception, a broken file may be a panic, and their words alone tell them apart.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...files.durable import TEMPORARY, write_json
from ...files.fields import fill
from ...files.install import install_hint
from ...files.lines import read_object
from ...files.removal import remove_folder
from ..engine import Ranking
from ..modes import QUANTIZATIONS
from .calls import EngineAwayError, EngineError
from .collection import VECTOR_NAMES, CollectionRecord, Numbers, Point, count_numbers, made_otherwise, read_record

INSTALL = f"a folder needs qdrant-edge-py, Qdrant's engine in the process: {install_hint('retrieval')}"
RECORD, ENGINE = "diffretriever.json", "engine"
LAST_WRITTEN = f"{ENGINE}/edge_config.json"  # when the engine makes its files
QUERIES_AT_ONCE = 16
ALWAYS, NEVER = 1, 0  # kilobytes of vectors from which the engine builds its index; 0: never
SCANNED = 10_000  # kilobytes of vectors below which it reads them all, graph or not; Qdrant's own default
OVERSAMPLING = {"scalar": 2.0, "binary": 4.0}  # candidates by quantised vectors for each result, scored again in full
FULL_WORDS = (
    "No space left",
    "Not enough space",
    "os error 28",
    "StorageFull",
    "File too large",
    "FileTooLarge",
    "QuotaExceeded",
)
ROOM = 256 << 20  # bytes: the engine's log and the first pages of its files
LOGGED = 100_000_000  # numbers put in between two flushes, each of which empties the engine's log: 400 MB


@dataclass(frozen=True)
class Choices:
    """What a collection was made with: see `upload`.

    Raises:
        ValueError: there is no such quantisation.
    """

    texts: bool
    quantization: str | None = None
    hnsw: bool = False

    def __post_init__(self) -> None:
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            known = ", ".join(QUANTIZATIONS)
            raise ValueError(f"quantization {self.quantization!r:.80} is not known; it is one of {known}.")


class EdgeCollection:
    """See `Collection`.

    Args:
        folder: of one or more collections.
        name: the collection's.
        search_params: `qdrant_edge.SearchParams`; None is exact search, or search through the graph or the quantised
            vectors where the collection was made with these.

    Raises:
        ImportError: qdrant-edge-py is not installed.
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: Path, name: str, search_params: Any = None) -> None:
        try:
            import qdrant_edge
        except ImportError as error:
            raise ImportError(INSTALL) from error
        self.edge: Any = qdrant_edge
        self.place, self.name = str(folder), name
        self._folder, self._own = folder, folder / name
        self._params, self._shard, self._logged = search_params, None, 0
        refuse_foreign(folder)

    def close(self) -> None:
        """See `Collection`."""
        shard, self._shard = self._shard, None
        if shard is not None:
            try:
                if self._logged:
                    self._told(shard.flush)
            finally:
                self._told(shard.close)

    # ------------------------------------------------------------------------------------------ what it says of itself

    def exists(self) -> bool:
        """See `Collection`."""
        return all((self._own / name).is_file() for name in (RECORD, LAST_WRITTEN))

    def record(self) -> CollectionRecord:
        """See `Collection`."""
        content = self._content()
        return read_record(content.get("passages"), str(self._own / RECORD))

    def _content(self) -> dict[str, Any]:
        if not self.exists():
            if not self._folder.is_dir():
                raise FileNotFoundError(
                    f"{self.place}: no Qdrant collections here; make one with `diffretriever index`."
                )
            names = sorted(file.parent.name for file in self._folder.glob(f"*/{RECORD}"))
            raise ValueError(
                f"{self.place}: no collection {self.name!r}; there is {', '.join(names) or 'none'}. Make it with "
                "`diffretriever index`."
            )
        return read_object(self._own / RECORD)

    def refuse_other_options(self, options: Mapping[str, Any]) -> None:
        """See `Collection`."""
        there, ours = self._choices(), _chosen(options)
        if there.texts != ours.texts:
            raise ValueError(made_otherwise(self.place, self.name, ours.texts))
        for name, value in asdict(ours).items():
            if value and value != (found := getattr(there, name)):
                raise ValueError(
                    f"{self.place}: collection {self.name!r} was made with another {name}: {found!r}, not {value!r}. "
                    "Leave the option out, choose another collection name, or remove that collection."
                )

    def _choices(self) -> Choices:
        return fill(Choices, self._content().get("options"), f"{self._own / RECORD}: options")

    # ------------------------------------------------------------------------------------------ points

    def create(self, record: CollectionRecord, options: Mapping[str, Any]) -> None:
        """See `Collection`; a collection that was begun when the process was killed is made anew."""
        chosen = _chosen(options)
        self._own.mkdir(parents=True, exist_ok=True)
        write_json(self._own / RECORD, {"passages": asdict(record), "options": asdict(chosen)})
        remove_folder(self._own / ENGINE)
        self._shard = self._told(self.edge.EdgeShard.create, str(self._own / ENGINE), self._config(record, chosen))

    def _config(self, record: CollectionRecord, chosen: Choices) -> Any:
        edge = self.edge
        in_memory = {"memory": edge.Memory.Pinned}
        quantised = {
            "scalar": partial(edge.ScalarQuantizationConfig, type=edge.ScalarType.Int8, quantile=0.99, **in_memory),
            "binary": partial(edge.BinaryQuantizationConfig, **in_memory),
        }
        shared: dict[str, Any] = {"size": record.hidden_size, "distance": edge.Distance.Dot}
        if chosen.quantization:
            shared["quantization_config"] = quantised[chosen.quantization]()
        # Without edges there is no graph: the quantised vectors are then read one after another.
        graph = edge.HnswIndexConfig(m=16 if chosen.hnsw else 0, ef_construct=100, full_scan_threshold=SCANNED)
        indexed = chosen.hnsw or chosen.quantization
        compare = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
        half = edge.VectorStorageDatatype.Float16 if record.half else None
        return edge.EdgeConfig(
            vectors={
                "dense": edge.EdgeVectorParams(**shared),
                "multi": edge.EdgeVectorParams(**shared, multivector_config=compare, datatype=half),
            },
            sparse_vectors={"sparse": edge.EdgeSparseVectorParams()},
            hnsw_config=graph,
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=ALWAYS if indexed else NEVER),
        )

    def add(self, points: Sequence[Point]) -> None:
        """See `Collection`."""
        numbers = sum(count_numbers(vector) for point in points for vector in point.vectors.values())
        # its files are mapped, and a full disk would end the process
        if shutil.disk_usage(self._own).free < ROOM + 8 * numbers:
            raise EngineAwayError(
                f"{self.place}: less than {ROOM >> 20} MiB are free on this disk. Make room and run the same command "
                "again; what was uploaded is kept."
            )
        made = []
        for point in points:
            vectors = {name: self._vector(vector) for name, vector in point.vectors.items()}
            made.append(self.edge.Point(point.number, vectors, dict(point.payload)))
        self._logged += len(points) + numbers
        self._told(self._opened().update, self.edge.UpdateOperation.upsert_points(made))
        if self._logged >= LOGGED:
            self._flush()

    def complete(self) -> None:
        """See `Collection`: build the graph, or quantise, where that was chosen."""
        shard = self._opened()
        remove_folder(self._own / ENGINE / "temp_segments")  # of a process that was killed while it built
        self._told(shard.optimize)
        self._flush()

    def _flush(self) -> None:
        self._told(self._opened().flush)
        self._logged = 0

    def count(self) -> int:
        """See `Collection`."""
        return int(self._told(self._opened().count, self.edge.CountRequest(exact=True)))

    def present(self, numbers: Sequence[int]) -> set[int]:
        """See `Collection`."""
        points = self._told(self._opened().retrieve, list(numbers), with_payload=False, with_vector=False)
        return {point.id for point in points}

    def payload(self, name: str, numbers: Sequence[int]) -> dict[int, Any]:
        """See `Collection`."""
        points = self._told(self._opened().retrieve, list(numbers), with_payload=[name], with_vector=False)
        return {point.id: (point.payload or {}).get(name) for point in points}

    # ------------------------------------------------------------------------------------------ search

    def search(
        self, queries: Sequence[Numbers], kind: str, limit: int, among: Sequence[int] | None = None
    ) -> list[Ranking]:
        """See `Collection`."""
        edge, condition, params = self.edge, None, self._params or self._usual_params()
        if among is not None:
            condition = edge.Filter(must=[edge.HasIdCondition(set(among))])
            params = edge.SearchParams(exact=True, quantization=edge.QuantizationSearchParams(ignore=True))
        requests = [
            edge.QueryRequest(
                limit=limit,
                query=edge.Query.Nearest(self._vector(query), using=VECTOR_NAMES[kind]),
                filter=condition,
                params=params,
            )
            for query in queries
        ]
        return [
            (
                torch.tensor([point.id for point in answer], dtype=torch.int64, device="cpu"),
                torch.tensor([point.score for point in answer], dtype=torch.float32, device="cpu"),
            )
            for start in range(0, len(requests), QUERIES_AT_ONCE)
            for answer in self._told(
                self._opened().query_batch, edge.QueryBatchRequest(requests[start : start + QUERIES_AT_ONCE])
            )
        ]

    def _usual_params(self) -> Any:
        """Return how this collection is searched: through what it was made with."""
        chosen, again = self._choices(), None
        if chosen.quantization:
            again = self.edge.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING[chosen.quantization])
        self._params = self.edge.SearchParams(exact=not (chosen.hnsw or chosen.quantization), quantization=again)
        return self._params

    def _vector(self, vector: Numbers) -> Any:
        if isinstance(vector, Mapping):
            return self.edge.SparseVector(list(vector), list(vector.values()))
        return vector

    # ------------------------------------------------------------------------------------------ the engine's errors

    def _opened(self) -> Any:
        """Return the engine, with the folder open for this process alone."""
        if self._shard is None:
            self._shard = self._told(self.edge.EdgeShard.load, str(self._own / ENGINE), opening=True)
        return self._shard

    def _told(self, work: Callable[..., Any], *arguments: Any, opening: bool = False, **options: Any) -> Any:
        """Call the engine; what it raises is told in our words."""
        try:
            return work(*arguments, **options)
        except BaseException as error:  # what is written in Rust panics, too
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise self._error(error, opening) from error

    def _error(self, error: BaseException, opening: bool) -> Exception:
        words = " ".join(f"{error}".split())[:200]
        if "WouldBlock" in words:
            return EngineAwayError(
                f"{self.place}: the folder is in use by another process ({words}); wait for it, or run a Qdrant server "
                "and give its address."
            )
        if "ermission denied" in words:
            return PermissionError(
                errno.EACCES, "the engine must be able to write in its folder, to search, too", self.place
            )
        if any(full in words for full in FULL_WORDS):
            return EngineAwayError(
                f"{self.place}: the engine cannot write here ({words}). Make room and run the same command again; what "
                "was uploaded is kept."
            )
        if opening:
            return ValueError(
                f"{self._own}: the engine's files are damaged or somebody else's ({words}); remove this folder and run "
                "`diffretriever index` again."
            )
        return EngineError(f"{self.place}: the engine refused what was asked for ({words}).")


def _chosen(options: Mapping[str, Any]) -> Choices:
    """Return the options of `upload` that a folder's collection is made with; ValueError: there are others."""
    names = [field.name for field in fields(Choices)]
    if others := options.keys() - set(names):
        raise ValueError(f"{', '.join(sorted(others))}: for Qdrant servers; a folder has no such option.")
    return Choices(**{name: options[name] for name in names})


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds anything but collections of ours.

    Raises:
        ValueError: the message names what it holds.
    """
    if not folder.exists():
        return
    if (folder / "meta.json").is_file() and (folder / "collection").is_dir():
        raise ValueError(
            f"{folder}: was made by qdrant-client's local mode, which is no longer read. Run `diffretriever index` "
            "with the store and another folder, then remove this one."
        )
    for entry in sorted(folder.iterdir()):
        if (
            entry.is_symlink()
            or not entry.is_dir()
            or not ((entry / RECORD).is_file() or all(file.name.startswith(TEMPORARY) for file in entry.iterdir()))
        ):
            raise ValueError(f"{folder}: holds {entry.name!r}, which is no collection of ours; choose another folder.")
