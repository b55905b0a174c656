"""Search through Qdrant: the same interface as exact search, for collections that one process cannot hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...model.scoring import check_width, mean_vectors
from ...store.manifest import Settings
from ...store.segments import QueryVectors
from ..engine import Ranking
from ..results import pad_rows
from ..sparse import NO_SPARSE, sum_by_term
from .calls import EngineError, QdrantCalls
from .collection import Collection, Numbers, not_put_there
from .edge import EdgeCollection
from .location import Location, check_collection
from .server import ServerCollection

CANDIDATES_PER_REQUEST = 100_000


class QdrantEngine:
    """A collection that `upload` made. Fusion runs in the client: the server's own formulas are other ones.

    (Qdrant fuses by reciprocal ranks, by distribution, or by a formula over scores whose extremes are known
    beforehand; none is a min-max over the candidates with both scores of each.)

    Args:
        location: a server's or cluster's address (http://…, https://…; port 6333, with a path 80 or 443), or a folder,
            for Qdrant's engine in this process.
        collection: the collection's name.
        api_key, timeout: see `QdrantCalls`; a folder needs neither.
        search_params: hnsw_ef, exact, quantization …: `qdrant_client.models.SearchParams` for a server, which chooses
            for itself without them; `qdrant_edge.SearchParams` for a folder, see `EdgeCollection`.

    Raises:
        ImportError: qdrant-client, or for a folder qdrant-edge-py, is not installed.
        EngineError: the upload is not complete, the server is too old or no Qdrant server, or the engine fails.
        EngineAwayError: the server is away, or the folder is in use by another process.
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
        self.collection = collection
        self._collection = open_collection(location, collection, api_key, timeout, search_params)
        try:
            self._about = self._collection.record()
            self._length = self._about.count
            found = self._collection.count()
            if found < self._length:
                raise EngineError(
                    f"{self._where} holds {found} of {self._length} passages; its upload was interrupted. Run "
                    "`diffretriever index` again to complete it."
                )
        except (EngineError, ValueError, OSError):
            self._collection.close()
            raise

    @property
    def _where(self) -> str:
        return f"{self._collection.place}: collection {self.collection!r}"

    @property
    def settings(self) -> Settings | None:
        """What the passages were encoded with; None for vectors that came without a store."""
        return self._about.settings

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        """Close the connection; a folder is then free for others."""
        self._collection.close()

    def rank(self, queries: QueryVectors, kind: str, top_k: int) -> Ranking:
        """See `Engine.rank`.

        Raises:
            ValueError: the passages have no sparse vectors, or the sides' dimensions differ.
        """
        asked = [self._query(query, kind) for query in queries.batches(1)]
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        given = {number: query for number, query in enumerate(asked) if query is not None}
        for number, (positions, scores) in zip(given, self._ask(list(given.values()), kind, top_k), strict=True):
            found[number] = _sorted(positions, scores / self._divisor(queries, kind, number))
        nothing = (torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.float32, device="cpu"))
        rows = [found.get(number, nothing) for number in range(len(asked))]
        return pad_rows([positions for positions, _ in rows], -1), pad_rows([scores for _, scores in rows], -torch.inf)

    def scores_at(self, queries: QueryVectors, kind: str, positions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Engine.scores_at`."""
        absent = 0.0 if kind == "sparse_max" else -torch.inf
        results = []
        for number, (query, wanted) in enumerate(zip(queries.batches(1), positions, strict=True)):
            scores = torch.full((len(wanted),), absent, dtype=torch.float32, device="cpu")
            if len(wanted) and (asked := self._query(query, kind)) is not None:
                for part in wanted.split(CANDIDATES_PER_REQUEST):
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
        found = self._collection.payload(name, different)
        if lost := [position for position in different if position not in found]:
            raise EngineError(
                f"{self._where} no longer holds the passage at position {lost[0]}. Run `diffretriever index` again."
            )
        return [found[position] for position in positions]

    def _query(self, query: QueryVectors, kind: str) -> Numbers | None:
        """Return one query's vector, or None where it has none to search with."""
        if kind == "sparse_max":
            if not self._about.sparse:
                raise ValueError(NO_SPARSE)
            indices, values = (row[0] for row in query.require_sparse())
            return sum_by_term(indices, values) or None
        if not bool(query.mask.any()):
            return None
        check_width(query.dense.shape[2], self._about.hidden_size)
        if kind == "single_dense":
            return mean_vectors(query.dense, query.mask)[0][0, 0].tolist()
        return query.dense[query.mask].tolist()

    def _ask(self, asked: list[Numbers], kind: str, limit: int, among: list[int] | None = None) -> list[Ranking]:
        """Return (positions, Qdrant's scores) of each query; `among` asks for exact scores of these points."""
        answers = self._collection.search(asked, kind, limit, among)
        allowed = range(self._length) if among is None else set(among)
        for point in (point for positions, _ in answers for point in positions.tolist()):
            if point not in allowed:
                raise EngineError(not_put_there(self._collection.place, self.collection, point))
        return answers

    @staticmethod
    def _divisor(queries: QueryVectors, kind: str, number: int) -> float:
        """Qdrant's max_sim is the sum over the query's vectors, paper Eq. 2 the mean."""
        return float(queries.mask[number].sum()) if kind == "multi_dense" else 1.0


def open_collection(
    location: str, name: str, api_key: str | None = None, timeout: float = 60.0, search_params: Any = None
) -> Collection:
    """Return a collection, which need not be there yet, on a server or in a folder.

    Args:
        location, name, api_key, timeout, search_params: see `QdrantEngine`.

    Raises:
        ValueError: the location, the name or the timeout cannot be.
        ImportError, EngineError, EngineAwayError: as `QdrantEngine`.
    """
    check_collection(name)
    where = Location.of(location)
    if not 0 < timeout < math.inf:
        raise ValueError(f"the timeout must be a positive number of seconds, got {timeout}.")
    if where.folder is not None:
        return EdgeCollection(where.folder, name, search_params)
    return ServerCollection(QdrantCalls(str(where), api_key, timeout), name, search_params)


def _sorted(positions: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by falling score, ties by position."""
    by_position = torch.argsort(positions)
    positions, scores = positions[by_position], scores[by_position]
    order = torch.sort(scores, descending=True, stable=True).indices
    return positions[order], scores[order]
