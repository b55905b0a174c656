"""The DiffEmbed baseline (paper §4.2): the same backbone as an encoder, mean-pooled, without prompt and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..model.tokenization_helpers import PreparedText

MEAN_NAMES = {"dense": "single_dense"}  # what `SmallTask` evaluates of such vectors


def bare_sequence(model: Any, prepared: PreparedText) -> list[int]:
    """Return a text's own token ids, as the model cuts it, and an end-of-text token, so that none is empty."""
    return [*prepared.text_ids, model.texts.end_of_text_id]


def mean_states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the means of the final states over each row's tokens.

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
def encode_mean(model: Any, texts: Sequence[str], is_query: bool, batch_size: int = 32) -> dict[str, torch.Tensor]:
    """Return the L2-normalised mean vectors of texts, in the form of `encode_texts`.

    Args:
        model: a DiffRetriever, with the adapter that `pooling: mean` has trained.
        texts: one or more.
        is_query: only which texts are cut where; there is no prompt.
        batch_size: texts at a time.

    Returns:
        "repr_hidden", float32 [N, 1, H] on the CPU, in the texts' order.
    """
    prepared = model.texts.prepare(texts, is_query, content_filter=False)
    sequences = [bare_sequence(model, text) for text in prepared]
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
    found = torch.empty(len(sequences), 1, model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = model.texts.pad([sequences[row] for row in rows])
        found[rows] = F.normalize(mean_states(model, ids.to(model.device), mask.to(model.device)), dim=-1).cpu()
    return {"repr_hidden": found}
