"""A collection on a Qdrant server or cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..engine import Ranking
from ..modes import QUANTIZATIONS
from .calls import EngineAwayError, EngineError, QdrantCalls, RequestTooLargeError
from .collection import (
    VECTOR_NAMES,
    CollectionRecord,
    Numbers,
    Point,
    count_numbers,
    made_otherwise,
    not_put_there,
    read_record,
)

SERVER_BYTES = 32 << 20  # of a request, which a server takes unless it was told otherwise
REQUEST_BYTES = SERVER_BYTES // 2  # that we send
NUMBER_BYTES = 25  # of one number in JSON, at the most
QUERIES_PER_REQUEST, PAYLOADS_PER_REQUEST = 16, 1000


class ServerCollection:
    """See `Collection`.

    Args:
        calls: to the server.
        name: the collection's.
        search_params: `qdrant_client.models.SearchParams`: hnsw_ef, exact, quantization …
    """

    def __init__(self, calls: QdrantCalls, name: str, search_params: Any = None) -> None:
        self.calls, self.name, self.place = calls, name, calls.location
        self._params = search_params
        self._limit = REQUEST_BYTES  # of a request; lowered where the server, or a proxy before it, takes less

    def close(self) -> None:
        """See `Collection`."""
        self.calls.close()

    # ------------------------------------------------------------------------------------------ what it says of itself

    def exists(self) -> bool:
        """See `Collection`."""
        return bool(self.calls(self.calls.client.collection_exists, self.name))

    def record(self) -> CollectionRecord:
        """See `Collection`."""
        where = f"{self.place}: collection {self.name!r}"
        if not self.exists():
            names = [entry.name for entry in self.calls(self.calls.client.get_collections).collections]
            raise ValueError(
                f"{self.place}: no collection {self.name!r}; there is {', '.join(names) or 'none'}. Make it with "
                "`diffretriever index`."
            )
        metadata = self.calls(self.calls.client.get_collection, self.name).config.metadata or {}
        if "diffretriever" not in metadata:
            raise ValueError(f"{where} was not made by `diffretriever index`; choose another name.")
        return read_record(metadata["diffretriever"], f"{where}: metadata")

    def refuse_other_options(self, options: Mapping[str, Any]) -> None:
        """See `Collection`."""
        config = self.calls(self.calls.client.get_collection, self.name).config
        wanted = _create_arguments(options)
        self._refuse_texts(wanted.pop("texts"))
        for name, value in wanted.items():
            if value is None:
                continue
            holder = config.params.vectors["multi"] if name == "quantization_config" else config.params
            elsewhere = getattr(config, "optimizer_config" if name == "optimizers_config" else name, None)
            there, ours = _plain(getattr(holder, name, None) or elsewhere), _plain(value)
            if not _contains(there, ours):
                raise ValueError(
                    f"{self.place}: collection {self.name!r} was made with another {name}: {there!r:.200}, not "
                    f"{ours!r:.200}. Leave the option out, choose another collection name, or delete that collection."
                )

    def _refuse_texts(self, texts: bool) -> None:
        """Refuse to go on with texts in a collection that has none, or without in one that has them."""
        found, _ = self.calls(self.calls.client.scroll, self.name, limit=1, with_payload=["text"], with_vectors=False)
        if found and ("text" in (found[0].payload or {})) != texts:
            raise ValueError(made_otherwise(self.place, self.name, texts))

    # ------------------------------------------------------------------------------------------ points

    def create(self, record: CollectionRecord, options: Mapping[str, Any]) -> None:
        """See `Collection`."""
        from qdrant_client import models

        arguments = _create_arguments(options)
        del arguments["texts"]
        shared: dict[str, Any] = {"size": record.hidden_size, "distance": models.Distance.DOT}
        shared["quantization_config"] = arguments.pop("quantization_config")
        vectors = {
            "dense": models.VectorParams(**shared),
            "multi": models.VectorParams(
                **shared,
                datatype=models.Datatype.FLOAT16 if record.half else None,
                multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            ),
        }
        self.calls(
            self.calls.client.create_collection,
            self.name,
            vectors_config=vectors,
            sparse_vectors_config={"sparse": models.SparseVectorParams()},
            metadata={"diffretriever": asdict(record)},
            **arguments,
        )

    def add(self, points: Sequence[Point]) -> None:
        """See `Collection`; in several requests where one would be too large."""
        held: list[Point] = []
        size = 0
        for point in points:
            each = json_bytes(point)
            if held and size + each > self._limit:
                self._upsert(held, size)
                held, size = [], 0
            held.append(point)
            size += each
        self._upsert(held, size)

    def _upsert(self, points: list[Point], size: int) -> None:
        try:
            self.calls(self.calls.client.upsert, self.name, points=list(map(point_struct, points)), wait=True)
        except (RequestTooLargeError, EngineAwayError) as error:
            # a server may also close the connection while a request that is too large comes in
            if isinstance(error, EngineAwayError) and size <= SERVER_BYTES:
                raise
            if len(points) == 1:
                raise ValueError(
                    f"{self.place}: passage {points[0].payload['id']!r:.80} alone is a request of "
                    f"{size / 2**20:.1f} MiB, more than the server takes ({error}). Upload without texts (--no-texts), "
                    "or raise the server's service.max_request_size_mb."
                ) from error
            self._limit = min(self._limit, max(1, size // 2))
            self.add(points)

    def complete(self) -> None:
        """See `Collection`; a server does so by itself."""

    def count(self) -> int:
        """See `Collection`."""
        return int(self.calls(self.calls.client.count, self.name, exact=True).count)

    def present(self, numbers: Sequence[int]) -> set[int]:
        """See `Collection`."""
        points = self.calls(
            self.calls.client.retrieve, self.name, ids=list(numbers), with_payload=False, with_vectors=False
        )
        return {point.id for point in points}

    def payload(self, name: str, numbers: Sequence[int]) -> dict[int, Any]:
        """See `Collection`."""
        found: dict[int, Any] = {}
        for start in range(0, len(numbers), PAYLOADS_PER_REQUEST):
            part = list(numbers[start : start + PAYLOADS_PER_REQUEST])
            points = self.calls(self.calls.client.retrieve, self.name, ids=part, with_payload=[name])
            found |= {point.id: (point.payload or {}).get(name) for point in points}
        return found

    # ------------------------------------------------------------------------------------------ search

    def search(
        self, queries: Sequence[Numbers], kind: str, limit: int, among: Sequence[int] | None = None
    ) -> list[Ranking]:
        """See `Collection`."""
        from qdrant_client import models

        params, condition = self._params, None
        if among is not None:
            condition = models.Filter(must=[models.HasIdCondition(has_id=list(among))])
            params = models.SearchParams(exact=True, quantization=models.QuantizationSearchParams(ignore=True))
        requests = [
            models.QueryRequest(
                query=_vector(query), using=VECTOR_NAMES[kind], limit=limit, params=params, filter=condition
            )
            for query in queries
        ]
        longest = max((NUMBER_BYTES * count_numbers(query) for query in queries), default=1)
        size = max(1, min(QUERIES_PER_REQUEST, REQUEST_BYTES // (longest or 1)))
        return [
            (
                torch.tensor([self._number(point.id) for point in answer.points], dtype=torch.int64, device="cpu"),
                torch.tensor([point.score for point in answer.points], dtype=torch.float32, device="cpu"),
            )
            for start in range(0, len(requests), size)
            for answer in self.calls(
                self.calls.client.query_batch_points, self.name, requests=requests[start : start + size]
            )
        ]

    def _number(self, point: object) -> int:
        """Return a point's id, if it can be one of ours."""
        if not isinstance(point, int):
            raise EngineError(not_put_there(self.place, self.name, point))
        return point


def point_struct(point: Point) -> Any:
    """Return a point as the client sends it."""
    from qdrant_client import models

    vectors: dict[str, Any] = {name: _vector(vector) for name, vector in point.vectors.items()}
    return models.PointStruct(id=point.number, vector=vectors, payload=dict(point.payload))


def json_bytes(point: Point) -> int:
    """Return an upper bound of a point's bytes in a request."""
    # characters outside ASCII are longer as escapes than as UTF-8
    return 256 + NUMBER_BYTES * sum(map(count_numbers, point.vectors.values())) + len(json.dumps(point.payload))


def _vector(vector: Numbers) -> Any:
    from qdrant_client import models

    if isinstance(vector, Mapping):
        return models.SparseVector(indices=list(vector), values=list(vector.values()))
    return vector


def _create_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `upload` as `create_collection` has them, and `texts`.

    Raises:
        ValueError: an option that a server has not.
    """
    arguments = dict(options)
    if arguments.pop("hnsw"):
        raise ValueError("a server builds its graph by its own settings (hnsw_config); leave --hnsw out.")
    arguments["quantization_config"] = quantization_config(arguments.pop("quantization"))
    return arguments


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


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True) if hasattr(value, "model_dump") else value


def _contains(there: Any, wanted: Any) -> bool:
    """Return whether all that is wanted is there; a server fills in what was left open."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        return all(_contains(there.get(name), value) for name, value in wanted.items())
    return bool(there == wanted)
