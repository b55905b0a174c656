"""The best k of scores that arrive block by block, ties broken by position."""

from __future__ import annotations

import torch

MAX_POSITIONS = 2**32  # positions share an int64 key with the score
WAITING = 64 * 1024  # scores that are looked through at once


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
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # scores [P, Q] to look through, positions [P]
        self._num_waiting = 0  # scores

    def update(self, scores: torch.Tensor, first_position: int) -> None:
        """Take in the next block; blocks must come by rising position.

        Args:
            scores: float32 [P, Q] of consecutive passages.
            first_position: position of the first one.

        Raises:
            ValueError: a score of this block or of one before it is NaN.
        """
        self.update_at(scores, torch.arange(first_position, first_position + len(scores), device=scores.device))

    def update_at(self, scores: torch.Tensor, positions: torch.Tensor) -> None:
        """Take in chosen passages; they, too, must come by rising position.

        Args:
            scores: float32 [P, Q].
            positions: int64 [P].

        Raises:
            ValueError: as for `update`.
        """
        self._waiting.append((scores.clone(), positions))
        self._num_waiting += scores.numel()
        if self._num_waiting >= WAITING:
            self._look_through()

    def _look_through(self) -> None:
        """Keep the best of what waits: few scores at a time would cost more in calls than in work."""
        if not self._waiting:
            return
        scores, positions = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        lost = None  # NaN is not
        if self._floor is not None:  # a later position loses a tie, so only a better score can enter
            lost = scores <= self._floor
        elif scores.shape[0] > self.k:  # a key costs more than a score
            lost = scores < scores.topk(self.k, dim=0).values[-1]
        if lost is not None:
            rows = (~lost).any(dim=1).nonzero().flatten()
            scores, positions = scores[rows], positions[rows]
        if bool(torch.isnan(scores).any()):
            position = int(positions[torch.isnan(scores).any(dim=1)][0])
            raise ValueError(
                f"the score of the passage at position {position} is NaN: its vectors or the query's hold NaN. Encode "
                "that text again."
            )
        self._keep(_to_keys(scores.T, positions))

    def merge(self, others: TopK) -> None:
        """Take in what was kept of other passages, for the same queries.

        Raises:
            ValueError: a score is NaN.
        """
        for side in (self, others):
            side._look_through()
        self._keep(others._keys)

    def _keep(self, keys: torch.Tensor) -> None:
        keys = torch.cat([self._keys, keys], dim=1)
        self._keys = keys.topk(min(self.k, keys.shape[1]), dim=1).values
        if self._keys.shape[1] == self.k:
            self._floor = _to_scores(self._keys[:, -1])

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions int64 and scores float32, both [Q, min(k, passages seen)], best first, on the CPU.

        Raises:
            ValueError: a score is NaN.
        """
        self._look_through()
        keys = self._keys.cpu()
        return (MAX_POSITIONS - 1) - (keys & (MAX_POSITIONS - 1)), _to_scores(keys)


def _to_keys(scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the equal of 0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # rises with the score
    return (order.long() << 32) | ((MAX_POSITIONS - 1) - positions)


def _to_scores(keys: torch.Tensor) -> torch.Tensor:
    order = (keys >> 32).int()
    return torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)
