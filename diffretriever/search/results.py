"""What a search found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from .engine import Engine


@dataclass(frozen=True)
class Hit:
    """One found passage."""

    id: str
    score: float
    position: int  # in the store


@dataclass(frozen=True)
class Results:
    """What a search found.

    Args:
        ids: each query's passages, best first; a query may have fewer than asked for.
        scores: float32 [Q, k], -inf where there is no passage.
        positions: int64 [Q, k], the passages' positions in the store, -1 where there is none.
        query_ids: the queries' ids, if they came from a store.
    """

    ids: list[list[str]]
    scores: torch.Tensor
    positions: torch.Tensor
    query_ids: list[str] | None = None

    @classmethod
    def of(cls, engine: Engine, positions: torch.Tensor, scores: torch.Tensor, query_ids: list[str] | None) -> Results:
        """Return a ranking with its passages' ids."""
        found = positions >= 0
        names = iter(engine.ids(positions[found].tolist()))  # of all queries: for an engine elsewhere one request
        ids = [list(islice(names, count)) for count in found.sum(dim=1).tolist()]
        return cls(ids, scores, positions, query_ids)

    @classmethod
    def joined(cls, parts: Sequence[Results]) -> Results:
        """Return the results of several searches, at least one, as those of one."""
        ids = [row for part in parts for row in part.ids]
        scores = pad_rows([row for part in parts for row in part.scores], -torch.inf)
        positions = pad_rows([row for part in parts for row in part.positions], -1)
        named = parts[0].query_ids is not None
        return cls(ids, scores, positions, [name for part in parts for name in part.query_ids or []] if named else None)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, query: int) -> list[Hit]:
        rows = zip(self.ids[query], self.scores[query].tolist(), self.positions[query].tolist(), strict=False)
        return [Hit(passage, score, position) for passage, score, position in rows]

    def __iter__(self) -> Iterator[list[Hit]]:
        return (self[query] for query in range(len(self)))

    def run(self, query_ids: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
        """Return {query id: {passage id: score}}, the form that evaluation tools read.

        Args:
            query_ids: one a query; None takes the store's.

        Raises:
            ValueError: no ids, one given twice, or another number than there are queries.
        """
        names = self.query_ids if query_ids is None else list(query_ids)
        if names is None or len(names) != len(self):
            raise ValueError(f"there are {len(self)} queries and {len(names or [])} query ids; give one for each.")
        if len(set(names)) < len(names):
            repeated = next(name for number, name in enumerate(names) if name in names[:number])
            raise ValueError(f"the query id {repeated!r:.80} is given twice; a run has one ranking for each id.")
        rows = zip(names, self.ids, self.scores.tolist(), strict=True)
        return {name: dict(zip(ids, scores, strict=False)) for name, ids, scores in rows}


def pad_rows(rows: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    """Stack rows of different lengths.

    >>> pad_rows([torch.tensor([1, 2]), torch.tensor([3])], -1).tolist()
    [[1, 2], [3, -1]]
    """
    dtype = torch.int64 if isinstance(value, int) else torch.float32
    padded = torch.full((len(rows), max(map(len, rows), default=0)), value, dtype=dtype, device="cpu")
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
