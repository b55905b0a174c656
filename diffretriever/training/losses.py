"""MaxSim of vectors that all exist."""

from __future__ import annotations

import torch


def maxsim(query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
    """Late interaction (paper §3.3): mean over the query's masks of the max over the passage's.

    Args:
        query: [Q, K_q, H], L2-normalised.
        passage: [P, K_p, H], L2-normalised.

    Returns:
        [Q, P].
    """
    queries, k_q, width = query.shape
    passages, k_p, _ = passage.shape
    similarity = query.reshape(-1, width) @ passage.reshape(-1, width).T  # [Q*K_q, P*K_p]
    return similarity.view(queries, k_q, passages, k_p).amax(-1).mean(1)
