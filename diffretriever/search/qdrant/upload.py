"""Upload of a store to Qdrant, resumable point by point."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm.auto import tqdm

from ...files.fields import fill
from ...model.scoring import mean_vectors
from ...store.differences import tell_apart, tell_difference
from ...store.manifest import Settings
from ...store.segments import Segment, segments_of
from ..modes import QUANTIZATIONS
from ..sparse import sum_by_term
from .calls import QdrantCalls
from .engine import collection_metadata

POINTS, NUMBERS = 256, 1_000_000  # of one request; a number is about 20 bytes of JSON, and servers take 32 MB


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
        batch_size: points a request; None is 256, or fewer where these would be too long for a server.
        api_key, timeout: see `QdrantCalls`.
        show_progress_bar: draw one, in passages.
        collection_options: further arguments of `create_collection`: shard_number, replication_factor, hnsw_config …

    Returns:
        How many passages were sent by this call.

    Raises:
        ImportError: qdrant-client is not installed.
        ValueError: a collection of this name was made from other passages or with other settings.
        EngineError: the engine is away or full.
    """
    segments = segments_of(passages, ids)
    about = describe(passages, segments)
    calls = QdrantCalls(location, api_key, timeout)
    try:
        if calls(calls.client.collection_exists, collection):
            _refuse_other(calls, collection, about)
        else:
            _create(calls, collection, about, quantization, collection_options)
        size = batch_size or default_batch_size(segments)
        with tqdm(total=about["count"], disable=not show_progress_bar, unit="passage", desc="upload") as bar:
            return _send_missing(calls, collection, segments, texts, size, bar)
    finally:
        calls.close()


def default_batch_size(segments: Sequence[Segment]) -> int:
    """Return how many points fit into one request: their vectors, and the mean of each point's."""
    _, num_vectors, width = segments[0].block(0, 1).shape
    return max(1, min(POINTS, NUMBERS // ((num_vectors + 1) * width)))


def _send_missing(
    calls: QdrantCalls, collection: str, segments: Sequence[Segment], texts: bool, batch_size: int, bar: Any
) -> int:
    """Send the passages that the collection does not hold; return how many."""
    present = calls(calls.client.count, collection, exact=True).count
    if present == sum(segment.length for segment in segments):
        return 0
    sent = 0
    for segment, start, stop in _ranges(segments, batch_size):
        rows = _missing(calls, collection, segment.offset, start, stop, present)
        if rows:
            points = _points(segment, rows, texts)
            calls(calls.client.upsert, collection, points=points, wait=True)
            sent += len(points)
        bar.update(stop - start)
    return sent


def describe(passages: Any, segments: Sequence[Segment]) -> dict[str, Any]:
    """Return what the collection records about its passages, to refuse others later."""
    stored = not isinstance(passages, Mapping)
    digest = hashlib.sha256()
    for entry in passages.manifest.shards if stored else ():
        digest.update(entry.texts_sha256.encode())
    return {
        "count": sum(segment.length for segment in segments),
        "hidden_size": segments[0].block(0, 1).shape[2],
        "sparse": all(segment.sparse is not None for segment in segments),
        "texts_sha256": digest.hexdigest() if stored else None,
        "settings": asdict(passages.manifest.settings) if stored else None,
    }


def _refuse_other(calls: QdrantCalls, collection: str, about: Mapping[str, Any]) -> None:
    there = collection_metadata(calls, collection)
    lines = []
    if there["settings"] and about["settings"]:
        where = f"{calls.location}: collection {collection!r}: settings"
        made, now = fill(Settings, there["settings"], where, others=True), Settings(**about["settings"])
        if differences := made.differences(now):
            lines.append(tell_apart(made, now, differences))
    for name in ("hidden_size", "count", "sparse", "texts_sha256"):
        if there.get(name) != about[name]:
            lines.append(tell_difference(name, there.get(name), about[name]))
    if lines:
        where = f"{calls.location}: collection {collection!r} was made from other passages or another model:"
        raise ValueError("\n  ".join([where, *lines, "Choose another collection name, or delete that collection."]))


def _create(
    calls: QdrantCalls, collection: str, about: Mapping[str, Any], quantization: Any, options: Mapping[str, Any]
) -> None:
    from qdrant_client import models

    chosen = quantization_config(quantization)
    half = about["settings"] is not None and about["settings"]["dtype"] == "float16"
    shared = {"size": about["hidden_size"], "distance": models.Distance.DOT, "quantization_config": chosen}
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
        metadata={"diffretriever": dict(about)},
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
    mask = segment.mask(0, segment.length)
    exists = torch.ones(vectors.shape[:2], dtype=torch.bool) if mask is None else mask[chosen]
    means = mean_vectors(vectors, exists)[0][:, 0]
    sparse = segment.sparse
    points = []
    for number, row in enumerate(rows):
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
