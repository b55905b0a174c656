"""The DiffEmbed baseline (paper §4.2): the same backbone as an encoder, mean-pooled, without prompt and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F


def bare_sequences(model: Any, texts: Sequence[str], is_query: bool) -> list[list[int]]:
    """Token ids of the texts as the model cuts them, each with an end-of-text token behind it (none is empty)."""
    ids, mask = model.tokenize(list(texts), is_query)
    _, text_ids = model.texts.locate(ids, mask, is_query)
    return [[*row, model.texts.end_of_text_id] for row in text_ids]


def mean_states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Means of the final states over each row's tokens.

    Args:
        model: a DiffRetriever.
        ids, mask: int64 [B, L], padded.

    Returns:
        [B, 1, H], with gradient, not normalised.
    """
    states = model.hidden_states(ids, mask)  # [B, L, H]
    weights = mask[:, :, None].float()
    mean: torch.Tensor = (states.float() * weights).sum(dim=1) / weights.sum(dim=1)
    return mean[:, None]


@torch.no_grad()
def encode_mean(model: Any, texts: Sequence[str], is_query: bool, batch_size: int = 32) -> torch.Tensor:
    """L2-normalised mean vectors of texts in their order: float32 [N, 1, H] on the CPU.

    Args:
        model: a DiffRetriever, with the adapter that `pooling: mean` has trained.
        texts: one or more.
        is_query: only which texts are cut where; there is no prompt.
        batch_size: texts at a time.
    """
    sequences = bare_sequences(model, texts, is_query)
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
    found = torch.empty(len(sequences), 1, model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = model.texts.pad([sequences[row] for row in rows])
        found[rows] = F.normalize(mean_states(model, ids.to(model.device), mask.to(model.device)), dim=-1).cpu()
    return found
