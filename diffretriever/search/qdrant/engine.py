"""Search through Qdrant: the same interface as exact search, for collections that one process cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...files.fields import fill
from ...model.scoring import check_width, mean_vectors
from ...store.manifest import Settings, check_numbers
from ...store.segments import QueryVectors
from ..engine import Ranking
from ..results import pad_rows
from ..sparse import sum_by_term
from .calls import EngineError, QdrantCalls
from .location import check_collection

VECTOR_NAMES = {"single_dense": "dense", "multi_dense": "multi", "sparse_max": "sparse"}
QUERIES_PER_REQUEST, PAYLOADS_PER_REQUEST, CANDIDATES_PER_REQUEST = 16, 1000, 100_000
SERVER_BYTES = 32 << 20  # of a request, which a server takes unless it was told otherwise
REQUEST_BYTES = SERVER_BYTES // 2  # that we send
NUMBER_BYTES = 25  # of one number in JSON, at the most


@dataclass(frozen=True)
class CollectionRecord:
    """What a collection records about its passages, to refuse others later.

    Args:
        count: how many there are once the upload is complete.
        hidden_size: H.
        sparse: whether they have sparse vectors.
        texts_sha256: hash of their ids and texts; None for vectors that came without a store.
        settings: what they were encoded with; None for vectors that came without a store.

    Raises:
        ValueError: there are no passages.
    """

    count: int
    hidden_size: int
    sparse: bool = False
    texts_sha256: str | None = None
    settings: Settings | None = None

    def __post_init__(self) -> None:
        check_numbers(self, {"count": 1, "hidden_size": 1})


class QdrantEngine:
    """A collection that `upload` made. Fusion runs in the client: the server's own formulas are other ones.

    (Qdrant fuses by reciprocal ranks, by distribution, or by a formula over scores whose extremes are known
    beforehand; none is a min-max over the candidates with both scores of each.)

    Args:
        location: a server's or cluster's address (http://…, https://…; port 6333, with a path 80 or 443), or a folder
            for the embedded engine, which is not made here.
        collection: the collection's name.
        api_key, timeout: see `QdrantCalls`.
        search_params: `qdrant_client.models.SearchParams`: hnsw_ef, exact, quantization …

    Raises:
        ImportError: qdrant-client is not installed.
        EngineError: the upload is not complete, or as `QdrantCalls`.
        FileNotFoundError, ValueError: no such folder or collection, or one that `upload` did not make.
    """

    def __init__(
        self,
        location: str,
        collection: str,
        api_key: str | None = None,
        timeout: float = 60.0,
        search_params: Any = None,
    ) -> None:
        self.collection = check_collection(collection)
        self.calls = QdrantCalls(location, api_key, timeout)
        self._params = search_params
        try:
            self._about = collection_record(self.calls, collection)
            self._length = self._about.count
            found = self.calls(self.calls.client.count, collection, exact=True).count
            if found < self._length:
                raise EngineError(
                    f"{self.calls.location}: collection {collection!r} holds {found} of {self._length} passages; its "
                    "upload was interrupted. Run `diffretriever index` again to complete it."
                )
        except (EngineError, ValueError):
            self.calls.close()
            raise

    @property
    def settings(self) -> Settings | None:
        """What the passages were encoded with; None for vectors that came without a store."""
        return self._about.settings

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        """Close the connection; the embedded engine's folder is then free for others."""
        self.calls.close()

    def rank(self, queries: QueryVectors, kind: str, top_k: int) -> Ranking:
        """See `Engine.rank`."""
        asked = [self._query(query, kind) for query in queries.batches(1)]
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        numbers = [number for number, query in enumerate(asked) if query is not None]
        size = max(1, min(QUERIES_PER_REQUEST, REQUEST_BYTES // (NUMBER_BYTES * queries.dense[:1].numel() or 1)))
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            answers = self._ask([asked[number] for number in part], kind, top_k)
            for number, (positions, scores) in zip(part, answers, strict=True):
                found[number] = _sorted(positions, scores / self._divisor(queries, kind, number))
        nothing = (torch.empty(0, dtype=torch.int64), torch.empty(0))
        rows = [found.get(number, nothing) for number in range(len(asked))]
        return pad_rows([positions for positions, _ in rows], -1), pad_rows([scores for _, scores in rows], -torch.inf)

    def scores_at(self, queries: QueryVectors, kind: str, positions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Engine.scores_at`."""
        absent = 0.0 if kind == "sparse_max" else -torch.inf
        results = []
        for number, (query, wanted) in enumerate(zip(queries.batches(1), positions, strict=True)):
            scores = torch.full((len(wanted),), absent)
            asked = self._query(query, kind)
            for part in wanted.split(CANDIDATES_PER_REQUEST) if asked is not None and len(wanted) else ():
                [(found, values)] = self._ask([asked], kind, len(part), part.tolist())
                scores[torch.searchsorted(wanted, found)] = values / self._divisor(queries, kind, number)
            results.append(scores)
        return results

    def ids(self, positions: Sequence[int]) -> list[str]:
        """See `Engine.ids`; nothing else is asked for."""
        return [str(text_id) for text_id in self._payload("id", positions)]

    def texts(self, positions: Sequence[int]) -> list[str | None]:
        """See `Engine.texts`."""
        return self._payload("text", positions)

    def _payload(self, name: str, positions: Sequence[int]) -> list[Any]:
        """Return one field of each passage's payload, None where it is absent."""
        different = list(dict.fromkeys(positions))
        found: dict[Any, Any] = {}
        for start in range(0, len(different), PAYLOADS_PER_REQUEST):
            part = different[start : start + PAYLOADS_PER_REQUEST]
            points = self.calls(self.calls.client.retrieve, self.collection, ids=part, with_payload=[name])
            found |= {point.id: (point.payload or {}).get(name) for point in points}
        if lost := [position for position in different if position not in found]:
            raise EngineError(
                f"{self.calls.location}: collection {self.collection!r} no longer holds the passage at position "
                f"{lost[0]}. Run `diffretriever index` again."
            )
        return [found[position] for position in positions]

    def _query(self, query: QueryVectors, kind: str) -> Any:
        """Return one query in Qdrant's form, or None where it has no vector to search with."""
        from qdrant_client import models

        if kind == "sparse_max":
            indices, values = (row[0] for row in query.require_sparse())
            weights = sum_by_term(indices, values)
            return models.SparseVector(indices=list(weights), values=list(weights.values())) if weights else None
        if not bool(query.mask.any()):
            return None
        check_width(query.dense.shape[2], self._about.hidden_size)
        if kind == "single_dense":
            return mean_vectors(query.dense, query.mask)[0][0, 0].tolist()
        return query.dense[query.mask].tolist()

    def _ask(self, asked: list[Any], kind: str, limit: int, among: list[int] | None = None) -> list[Ranking]:
        """Return (positions, Qdrant's scores) of each query; `among` asks for exact scores of these points."""
        from qdrant_client import models

        params, condition = self._params, None
        if among is not None:
            condition = models.Filter(must=[models.HasIdCondition(has_id=list(among))])
            if self.calls.is_server:  # the embedded engine is exact in any case
                params = models.SearchParams(exact=True, quantization=models.QuantizationSearchParams(ignore=True))
        requests = [
            models.QueryRequest(query=query, using=VECTOR_NAMES[kind], limit=limit, params=params, filter=condition)
            for query in asked
        ]
        answers = self.calls(self.calls.client.query_batch_points, self.collection, requests=requests)
        allowed = range(self._length) if among is None else set(among)
        for point in (point for answer in answers for point in answer.points):
            if point.id not in allowed:
                raise EngineError(
                    f"{self.calls.location}: collection {self.collection!r} answers with a point {point.id!r:.80}, "
                    "which `diffretriever index` did not put there. Index again under another name."
                )
        return [
            (
                torch.tensor([point.id for point in answer.points], dtype=torch.int64),
                torch.tensor([point.score for point in answer.points], dtype=torch.float32),
            )
            for answer in answers
        ]

    @staticmethod
    def _divisor(queries: QueryVectors, kind: str, number: int) -> float:
        """Qdrant's max_sim is the sum over the query's vectors, paper Eq. 2 the mean."""
        return float(queries.mask[number].sum()) if kind == "multi_dense" else 1.0


def collection_record(calls: QdrantCalls, collection: str) -> CollectionRecord:
    """Return what `upload` recorded about a collection.

    Raises:
        ValueError: no such collection, or one that `upload` did not make.
    """
    if not calls(calls.client.collection_exists, collection):
        names = [entry.name for entry in calls(calls.client.get_collections).collections]
        raise ValueError(
            f"{calls.location}: no collection {collection!r}; there is {', '.join(names) or 'none'}. Make it with "
            "`diffretriever index`."
        )
    metadata = calls(calls.client.get_collection, collection).config.metadata or {}
    if "diffretriever" not in metadata:
        raise ValueError(
            f"{calls.location}: collection {collection!r} was not made by `diffretriever index`; choose another name."
        )
    return fill(
        CollectionRecord,
        metadata["diffretriever"],
        f"{calls.location}: collection {collection!r}: metadata",
        others=True,
    )


def _sorted(positions: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by falling score, ties by position."""
    by_position = torch.argsort(positions)
    positions, scores = positions[by_position], scores[by_position]
    order = torch.sort(scores, descending=True, stable=True).indices
    return positions[order], scores[order]
