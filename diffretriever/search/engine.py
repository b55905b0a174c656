"""What a search engine must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..store.manifest import Settings
from ..store.segments import QueryVectors

Ranking = tuple[torch.Tensor, torch.Tensor]  # positions int64 and scores float32, both [Q, k], best first


class Engine(Protocol):
    """Passages that can be ranked, in this process or elsewhere."""

    def __len__(self) -> int: ...

    @property
    def settings(self) -> Settings | None:
        """What the passages were encoded with, where that is known."""

    def rank(self, queries: QueryVectors, kind: str, top_k: int) -> Ranking:
        """Rank all passages for Q queries.

        Args:
            queries: Q queries.
            kind: "single_dense", "multi_dense" or "sparse_max".
            top_k: passages a query.

        Returns:
            Positions and scores, [Q, at most top_k]; of equal scores the first position comes first. Unused slots are
            -1 and -inf, and a text without vectors scores -inf.
        """

    def scores_at(self, queries: QueryVectors, kind: str, positions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Score chosen passages.

        Args:
            queries, kind: as for `rank`.
            positions: for each query, int64 [C], rising; C may differ.

        Returns:
            For each query its scores, float32 [C]; -inf for a missing dense vector, 0 for a missing sparse one.
        """

    def ids(self, positions: Sequence[int]) -> list[str]:
        """The ids of passages."""

    def texts(self, positions: Sequence[int]) -> list[str | None]:
        """The texts of passages, None where they are not kept."""
