"""Upload of a store to Qdrant, resumable point by point."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...model.batching import check_count
from ...model.scoring import mean_vectors
from ...progress import progress_bar
from ...store.differences import tell_apart, tell_difference
from ...store.identity import check_sides
from ...store.segments import Segment, existing, segments_of
from ..sparse import sum_by_term
from .collection import Collection, CollectionRecord, Numbers, Point
from .engine import open_collection

POINTS, NUMBERS = 256, 1_000_000  # of points made at once: their vectors are Python's numbers, 32 bytes each


def upload(
    passages: Any,
    location: str,
    collection: str,
    *,
    ids: Sequence[str] | None = None,
    texts: bool = True,
    quantization: Any = None,
    hnsw: bool = False,
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
        location, collection: see `QdrantEngine`; they are made if they are not there.
        ids: the passages' ids, for an output of `encode_texts`.
        texts: also upload the texts, where the store holds them.
        quantization: "scalar" (int8) or "binary"; the engine then searches on these, and the full vectors are its
            second look. For a server also a `qdrant_client.models` quantisation config.
        hnsw: for a folder: build a graph for approximate dense search. A server builds its own by its own settings.
        batch_size: points a request at the most; None is 256. A request of more than 16 MiB is cut in several.
        api_key, timeout: see `QdrantCalls`.
        show_progress_bar: draw one, in passages.
        collection_options: for a server, further arguments of `create_collection`: shard_number, hnsw_config …

    Returns:
        How many passages were sent by this call.

    Raises:
        ValueError: there are no passages or they are queries, a collection of this name was made from other passages or
            with other settings or options, or a passage is too large for the server.
        ImportError, EngineError, EngineAwayError: as `QdrantEngine`; also a full engine.
    """
    check_sides(passages, None, "`passages`")
    segments = segments_of(passages, ids)
    record = describe(passages, segments)
    most = POINTS if batch_size is None else check_count("batch_size", batch_size)
    texts = texts and segments[0].text(0) is not None
    options = {"texts": texts, "quantization": quantization, "hnsw": hnsw, **collection_options}
    held = open_collection(location, collection, api_key, timeout)
    try:
        if held.exists():
            _refuse_other(held, record)
            held.refuse_other_options(options)
        else:
            held.create(record, options)
        with progress_bar(record.count, "passage", "upload", show_progress_bar) as bar:
            sent = _send_missing(held, segments, texts, most, bar)
        held.complete()
    finally:
        held.close()
    return sent


def _send_missing(collection: Collection, segments: Sequence[Segment], texts: bool, most: int, bar: Any) -> int:
    """Send the passages that the collection does not hold, at most so many a request; return how many."""
    present = collection.count()
    if present == sum(segment.length for segment in segments):
        return 0
    _, num_vectors, width = segments[0].block(0, 1).shape
    sent = 0
    for segment, start, stop in _ranges(segments, max(1, min(most, NUMBERS // ((num_vectors + 1) * width)))):
        rows = _missing(collection, segment.offset, start, stop) if present else list(range(start, stop))
        if rows:
            collection.add(_points(segment, rows, texts))
            sent += len(rows)
        bar.update(stop - start)
    return sent


def describe(passages: Any, segments: Sequence[Segment]) -> CollectionRecord:
    """Return what the collection records about its passages.

    Raises:
        ValueError: there are none.
    """
    count = sum(segment.length for segment in segments)
    if not count:
        raise ValueError("there are no passages to upload; an index holds at least one.")
    stored = not isinstance(passages, Mapping)
    texts, vectors = hashlib.sha256(), hashlib.sha256()
    for entry in passages.manifest.shards if stored else ():
        texts.update(entry.texts_sha256.encode())
        vectors.update(entry.header_sha256.encode())  # which has the hash of each of the shard's arrays
    return CollectionRecord(
        count,
        hidden_size=segments[0].block(0, 1).shape[2],
        sparse=all(segment.sparse is not None for segment in segments),
        texts_sha256=texts.hexdigest() if stored else None,
        settings=passages.manifest.settings if stored else None,
        vectors_sha256=vectors.hexdigest() if stored else None,
    )


def _refuse_other(collection: Collection, ours: CollectionRecord) -> None:
    there = collection.record()
    lines = []
    if there.settings and ours.settings and (differences := there.settings.differences(ours.settings)):
        lines.append(tell_apart(there.settings, ours.settings, differences))
    for name in ("hidden_size", "count", "sparse", "texts_sha256"):
        if getattr(there, name) != getattr(ours, name):
            lines.append(tell_difference(name, getattr(there, name), getattr(ours, name)))
    if None not in (there.vectors_sha256, ours.vectors_sha256) and there.vectors_sha256 != ours.vectors_sha256:
        lines.append(tell_difference("vectors_sha256", there.vectors_sha256, ours.vectors_sha256))
    if lines:
        where = f"{collection.place}: collection {collection.name!r} was made from other passages or another model:"
        raise ValueError("\n  ".join([where, *lines, "Choose another collection name, or delete that collection."]))


def _ranges(segments: Sequence[Segment], size: int) -> Iterator[tuple[Segment, int, int]]:
    for segment in segments:
        for start in range(0, segment.length, size):
            yield segment, start, min(start + size, segment.length)


def _missing(collection: Collection, offset: int, start: int, stop: int) -> list[int]:
    """Return which rows of a segment the collection does not hold yet."""
    there = collection.present([offset + row for row in range(start, stop)])
    return [row for row in range(start, stop) if offset + row not in there]


def _points(segment: Segment, rows: list[int], with_texts: bool) -> list[Point]:
    chosen = torch.tensor(rows, device="cpu")
    vectors = segment.rows(chosen).cpu()  # [n, K, H]
    exists = existing(segment, 0, segment.length).cpu()[chosen]  # [n, K]
    means = mean_vectors(vectors, exists)[0][:, 0]
    sparse = segment.sparse
    points = []
    for number, row in enumerate(rows):
        if not bool(torch.isfinite(vectors[number][exists[number]]).all()):
            raise ValueError(f"the vectors of {segment.text_id(row)!r:.80} hold NaN or infinite values.")
        named: dict[str, Numbers] = {}
        if bool(exists[number].any()):
            named = {"dense": means[number].tolist(), "multi": vectors[number][exists[number]].tolist()}
        if sparse is not None:
            named["sparse"] = sum_by_term(sparse[0][row], sparse[1][row])
        payload = {"id": segment.text_id(row)}
        text = segment.text(row) if with_texts else None
        if text is not None:
            payload["text"] = text
        points.append(Point(segment.offset + row, payload, named))
    return points
