"""Upload of a store to Qdrant, resumable point by point."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...model.batching import check_count
from ...model.scoring import mean_vectors
from ...progress import progress_bar
from ...store.differences import tell_apart, tell_difference
from ...store.identity import check_sides
from ...store.segments import Segment, existing, segments_of
from ..modes import QUANTIZATIONS
from ..sparse import sum_by_term
from .calls import EngineAwayError, QdrantCalls, RequestTooLargeError
from .engine import NUMBER_BYTES, REQUEST_BYTES, SERVER_BYTES, CollectionRecord, collection_record
from .location import check_collection

POINTS, NUMBERS = 256, 1_000_000  # of points made at once: their vectors are Python's numbers, 32 bytes each


def upload(
    passages: Any,
    location: str,
    collection: str,
    *,
    ids: Sequence[str] | None = None,
    texts: bool = True,
    quantization: Any = None,
    batch_size: int | None = None,
    api_key: str | None = None,
    timeout: float = 60.0,
    show_progress_bar: bool = False,
    **collection_options: Any,
) -> int:
    """Put passages into a Qdrant collection; called again after an interruption it sends only what is missing.

    A point's id is the passage's position, its payload holds the passage's own id and, if wanted, its text. Named
    vectors: `dense` (the normalised mean), `multi` (compared by max_sim) and `sparse`.

    Args:
        passages: a store, or an output of `encode_texts`.
        location: a server's or cluster's address, or a folder for the embedded engine.
        collection: its name; it is made if it is not there.
        ids: the passages' ids, for an output of `encode_texts`.
        texts: also upload the texts, where the store holds them.
        quantization: "scalar" (int8), "binary", or a `qdrant_client.models` quantisation config; a Qdrant server then
            searches on these and the full vectors are its second look. The embedded engine ignores it.
        batch_size: points a request at the most; None is 256. A request of more than 16 MiB, texts included, is cut in
            several; a server takes 32 MiB.
        api_key, timeout: see `QdrantCalls`.
        show_progress_bar: draw one, in passages.
        collection_options: further arguments of `create_collection`: shard_number, replication_factor, hnsw_config …

    Returns:
        How many passages were sent by this call.

    Raises:
        ImportError: qdrant-client is not installed.
        ValueError: there are no passages or they are queries, a collection of this name was made from other passages or
            with other settings or options, or a passage is too large for the server.
        EngineError, EngineAwayError: as `QdrantCalls`; also a full engine.
    """
    check_sides(passages, None, "`passages`")
    segments = segments_of(passages, ids)
    record = describe(passages, segments)
    most = POINTS if batch_size is None else check_count("batch_size", batch_size)
    wanted = {"quantization_config": quantization_config(quantization), **collection_options}
    check_collection(collection)
    calls = QdrantCalls(location, api_key, timeout, make=True)
    try:
        if calls(calls.client.collection_exists, collection):
            _refuse_other(calls, collection, record)
            _refuse_options(calls, collection, wanted)
            _refuse_texts(calls, collection, texts and segments[0].text(0) is not None)
        else:
            _create(calls, collection, record, wanted)
        with progress_bar(record.count, "passage", "upload", show_progress_bar) as bar:
            return _send_missing(_Sender(calls, collection), segments, texts, most, bar)
    finally:
        calls.close()


def _send_missing(sender: _Sender, segments: Sequence[Segment], texts: bool, most: int, bar: Any) -> int:
    """Send the passages that the collection does not hold, at most so many a request; return how many."""
    calls, collection = sender.calls, sender.collection
    present = calls(calls.client.count, collection, exact=True).count
    if present == sum(segment.length for segment in segments):
        return 0
    _, num_vectors, width = segments[0].block(0, 1).shape
    sent = 0
    for segment, start, stop in _ranges(segments, max(1, min(most, NUMBERS // ((num_vectors + 1) * width)))):
        rows = _missing(calls, collection, segment.offset, start, stop, present)
        if rows:
            sender.send(_points(segment, rows, texts))
            sent += len(rows)
        bar.update(stop - start)
    return sent


@dataclass
class _Sender:
    """Sends points in requests that the server takes.

    Args:
        limit: bytes of a request; lowered where the server, or a proxy before it, takes less.
    """

    calls: QdrantCalls
    collection: str
    limit: int = REQUEST_BYTES

    def send(self, points: Sequence[Any]) -> None:
        """Send points, in several requests where one would be too large."""
        held: list[Any] = []
        size = 0
        for point in points:
            each = json_bytes(point)
            if held and size + each > self.limit:
                self._upsert(held, size)
                held, size = [], 0
            held.append(point)
            size += each
        self._upsert(held, size)

    def _upsert(self, points: list[Any], size: int) -> None:
        try:
            self.calls(self.calls.client.upsert, self.collection, points=points, wait=True)
        except (RequestTooLargeError, EngineAwayError) as error:
            # a server may also close the connection while a request that is too large comes in
            if isinstance(error, EngineAwayError) and size <= SERVER_BYTES:
                raise
            if len(points) == 1:
                raise ValueError(
                    f"{self.calls.location}: passage {points[0].payload['id']!r:.80} alone is a request of "
                    f"{size / 2**20:.1f} MiB, more than the server takes ({error}). Upload without texts (--no-texts), "
                    "or raise the server's service.max_request_size_mb."
                ) from error
            self.limit = min(self.limit, max(1, size // 2))
            self.send(points)


def json_bytes(point: Any) -> int:
    """Return an upper bound of a point's bytes in a request."""
    numbers = 0
    for vector in point.vector.values():
        if hasattr(vector, "indices"):
            numbers += 2 * len(vector.indices)
        else:
            numbers += sum(map(len, vector)) if vector and isinstance(vector[0], list) else len(vector)
    # characters outside ASCII are longer as escapes than as UTF-8
    return 256 + NUMBER_BYTES * numbers + len(json.dumps(point.payload))


def describe(passages: Any, segments: Sequence[Segment]) -> CollectionRecord:
    """Return what the collection records about its passages.

    Raises:
        ValueError: there are none.
    """
    count = sum(segment.length for segment in segments)
    if not count:
        raise ValueError("there are no passages to upload; an index holds at least one.")
    stored = not isinstance(passages, Mapping)
    digest = hashlib.sha256()
    for entry in passages.manifest.shards if stored else ():
        digest.update(entry.texts_sha256.encode())
    return CollectionRecord(
        count,
        hidden_size=segments[0].block(0, 1).shape[2],
        sparse=all(segment.sparse is not None for segment in segments),
        texts_sha256=digest.hexdigest() if stored else None,
        settings=passages.manifest.settings if stored else None,
    )


def _refuse_other(calls: QdrantCalls, collection: str, ours: CollectionRecord) -> None:
    there = collection_record(calls, collection)
    lines = []
    if there.settings and ours.settings and (differences := there.settings.differences(ours.settings)):
        lines.append(tell_apart(there.settings, ours.settings, differences))
    for name in ("hidden_size", "count", "sparse", "texts_sha256"):
        if getattr(there, name) != getattr(ours, name):
            lines.append(tell_difference(name, getattr(there, name), getattr(ours, name)))
    if lines:
        where = f"{calls.location}: collection {collection!r} was made from other passages or another model:"
        raise ValueError("\n  ".join([where, *lines, "Choose another collection name, or delete that collection."]))


def _refuse_options(calls: QdrantCalls, collection: str, wanted: Mapping[str, Any]) -> None:
    """Refuse options that a collection was made without: they would do nothing now."""
    config = calls(calls.client.get_collection, collection).config
    for name, value in wanted.items():
        if value is None or (not calls.is_server and name != "quantization_config"):
            continue  # the embedded engine takes no other option
        holder = config.params.vectors["multi"] if name == "quantization_config" else config.params
        elsewhere = getattr(config, "optimizer_config" if name == "optimizers_config" else name, None)
        there, ours = _plain(getattr(holder, name, None) or elsewhere), _plain(value)
        if not _contains(there, ours):
            raise ValueError(
                f"{calls.location}: collection {collection!r} was made with another {name}: {there!r:.200}, not "
                f"{ours!r:.200}. Leave the option out, choose another collection name, or delete that collection."
            )


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True) if hasattr(value, "model_dump") else value


def _contains(there: Any, wanted: Any) -> bool:
    """Return whether all that is wanted is there; a server fills in what was left open."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        return all(_contains(there.get(name), value) for name, value in wanted.items())
    return bool(there == wanted)


def _refuse_texts(calls: QdrantCalls, collection: str, texts: bool) -> None:
    """Refuse to go on with texts in a collection that has none, or without in one that has them."""
    found, _ = calls(calls.client.scroll, collection, limit=1, with_payload=["text"], with_vectors=False)
    if found and ("text" in (found[0].payload or {})) != texts:
        state, option = ("without", "with --no-texts") if texts else ("with", "without --no-texts")
        raise ValueError(
            f"{calls.location}: collection {collection!r} was made {state} texts. Go on {option}, choose another "
            "collection name, or delete that collection."
        )


def _create(calls: QdrantCalls, collection: str, record: CollectionRecord, wanted: Mapping[str, Any]) -> None:
    from qdrant_client import models

    options = dict(wanted)
    half = record.settings is not None and record.settings.dtype == "float16"
    shared: dict[str, Any] = {"size": record.hidden_size, "distance": models.Distance.DOT}
    shared["quantization_config"] = options.pop("quantization_config")
    vectors = {
        "dense": models.VectorParams(**shared),
        "multi": models.VectorParams(
            **shared,
            datatype=models.Datatype.FLOAT16 if half else None,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
        ),
    }
    calls(
        calls.client.create_collection,
        collection,
        vectors_config=vectors,
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
        metadata={"diffretriever": asdict(record)},
        **options,
    )


def quantization_config(quantization: Any) -> Any:
    """Return Qdrant's config for "scalar" or "binary"; a config is returned as it is.

    Raises:
        ValueError: another word.
    """
    from qdrant_client import models

    if quantization == "scalar":
        scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
        return models.ScalarQuantization(scalar=scalar)
    if quantization == "binary":
        return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
    if isinstance(quantization, str):
        raise ValueError(f"quantization {quantization!r} is not known; it is one of {', '.join(QUANTIZATIONS)}.")
    return quantization


def _ranges(segments: Sequence[Segment], size: int) -> Iterator[tuple[Segment, int, int]]:
    for segment in segments:
        for start in range(0, segment.length, size):
            yield segment, start, min(start + size, segment.length)


def _missing(calls: QdrantCalls, collection: str, offset: int, start: int, stop: int, present: int) -> list[int]:
    """Return which rows of a segment the collection does not hold yet."""
    if not present:
        return list(range(start, stop))
    wanted = [offset + row for row in range(start, stop)]
    points = calls(calls.client.retrieve, collection, ids=wanted, with_payload=False, with_vectors=False)
    there = {point.id for point in points}
    return [row for row in range(start, stop) if offset + row not in there]


def _points(segment: Segment, rows: list[int], with_texts: bool) -> list[Any]:
    from qdrant_client import models

    chosen = torch.tensor(rows)
    vectors = segment.rows(chosen).cpu()  # [n, K, H]
    exists = existing(segment, 0, segment.length)[chosen]
    means = mean_vectors(vectors, exists)[0][:, 0]
    sparse = segment.sparse
    points = []
    for number, row in enumerate(rows):
        if not bool(torch.isfinite(vectors[number][exists[number]]).all()):
            raise ValueError(f"the vectors of {segment.text_id(row)!r:.80} hold NaN or infinite values.")
        named: dict[str, Any] = {}
        if bool(exists[number].any()):
            named = {"dense": means[number].tolist(), "multi": vectors[number][exists[number]].tolist()}
        if sparse is not None:
            weights = sum_by_term(sparse[0][row], sparse[1][row])
            named["sparse"] = models.SparseVector(indices=list(weights), values=list(weights.values()))
        payload = {"id": segment.text_id(row)}
        text = segment.text(row) if with_texts else None
        if text is not None:
            payload["text"] = text
        points.append(models.PointStruct(id=segment.offset + row, vector=named, payload=payload))
    return points
