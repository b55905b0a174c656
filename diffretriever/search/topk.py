"""The best k of scores that arrive block by block, ties broken by position."""

from __future__ import annotations

import torch

MAX_POSITIONS = 2**32  # positions share an int64 key with the score


class TopK:
    """Keeps each query's k best passages.

    A key holds the score's order in its upper 32 bits and the falling position in its lower 32, so the largest keys
    are the best scores, and of equal scores the first position: the same result whatever the blocks' sizes.

    Args:
        num_queries: Q.
        k: passages to keep a query.
        device: where the scores will be.

    >>> best = TopK(num_queries=1, k=2)
    >>> best.update(torch.tensor([[0.5], [0.7], [0.7]]), first_position=0)
    >>> positions, scores = best.result()
    >>> positions.tolist()
    [[1, 2]]
    """

    def __init__(self, num_queries: int, k: int, device: torch.device | str = "cpu") -> None:
        self.k = k
        self._keys = torch.empty((num_queries, 0), dtype=torch.int64, device=device)  # [Q, <= k], falling
        self._floor: torch.Tensor | None = None  # [Q], the worst kept score once k are kept

    def update(self, scores: torch.Tensor, first_position: int) -> None:
        """Take in the next block; blocks must come by rising position.

        Args:
            scores: float32 [P, Q] of consecutive passages.
            first_position: position of the first one.

        Raises:
            ValueError: a score is NaN.
        """
        if bool(torch.isnan(scores).any()):
            row = int(torch.isnan(scores).any(dim=1).nonzero()[0, 0])
            raise ValueError(
                f"the score of the passage at position {first_position + row} is NaN: its vectors or the query's hold "
                "NaN. Encode that text again."
            )
        if self._floor is None:
            positions = torch.arange(first_position, first_position + len(scores), device=scores.device)
        else:  # a later position loses a tie, so only a better score can enter
            rows = (scores > self._floor).any(dim=1).nonzero().flatten()
            if not len(rows):
                return
            scores, positions = scores[rows], rows + first_position
        keys = torch.cat([self._keys, _to_keys(scores.T, positions)], dim=1)
        self._keys = keys.topk(min(self.k, keys.shape[1]), dim=1).values
        if self._keys.shape[1] == self.k:
            self._floor = _to_scores(self._keys[:, -1])

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions int64 and scores float32, both [Q, min(k, passages seen)], best first, on the CPU."""
        keys = self._keys.cpu()
        return (MAX_POSITIONS - 1) - (keys & (MAX_POSITIONS - 1)), _to_scores(keys)


def _to_keys(scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the equal of 0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # rises with the score
    return (order.long() << 32) | ((MAX_POSITIONS - 1) - positions)


def _to_scores(keys: torch.Tensor) -> torch.Tensor:
    order = (keys >> 32).int()
    return torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)
