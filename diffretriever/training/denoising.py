"""The masked diffusion objective (LLaDA, Nie et al. 2025, eq. 3), and what an adapter's training has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

SHIFTS = {"dream": 1}  # a token is predicted from the state so many positions before it; 0 of other backbones
SMALLEST_T = 0.05  # t is kept away from 0, where 1/t has no finite variance
ONE_OF = 4  # passages: restoring all of them would cost as much as the contrastive loss


def denoising_loss(logits: torch.Tensor, targets: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the masked diffusion objective: cross-entropy on the masked tokens, each over its text's t, per token.

    The divisor is the sum of 1/t over the masked tokens. Its expected value is the number of tokens, by which the
    objective divides; the sum itself gives a loss that varies less with how many tokens happened to be masked.

    Args:
        logits: [M, V] at the M masked tokens; M may be 0, and then the loss is 0.
        targets: int64 [M], the tokens that were masked.
        t: float32 [M], the masking probability of the text that each is from.
    """
    each = F.cross_entropy(logits.float(), targets, reduction="none")  # [M]
    return (each / t).sum() / (1 / t).sum().clamp(min=1)


def masked_logits(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor, shift: int = 0
) -> torch.Tensor:
    """Return the logits for M chosen tokens, which the model sees masked: [M, V], with gradient.

    Args:
        model: a DiffRetriever.
        ids, mask: int64 [B, L].
        chosen: bool [B, L]; with a shift, none in a row's first column.
        shift: of SHIFTS.
    """
    states = model.hidden_states(ids.masked_fill(chosen, model.texts.mask_id), mask)  # [B, L, H]
    before = states[:, : states.shape[1] - shift][chosen[:, shift:]]
    logits: torch.Tensor = model.lm_head(before)
    return logits


def passages_denoising_loss(model: Any, chunks: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Return `denoising_loss` on some of a batch's passages, as they stand in their prompt.

    Args:
        model: a DiffRetriever that is trained.
        chunks: {"ids", "mask": int64 [b, L]}; of each, one passage in ONE_OF, at least one, is drawn by torch's
            generator, and so are t and its masks.
    """
    shift = SHIFTS.get(model.config.backbone_type, 0)
    found = []
    for chunk in chunks:
        device = chunk["ids"].device
        rows = torch.randperm(len(chunk["ids"]))[: max(1, len(chunk["ids"]) // ONE_OF)].to(device)
        ids, mask = chunk["ids"][rows], chunk["mask"][rows]  # [b, L]
        t = SMALLEST_T + (1 - SMALLEST_T) * torch.rand(len(rows), 1)
        chosen = (torch.rand(ids.shape) < t).to(device) & (mask == 1) & (ids != model.texts.mask_id)
        chosen[:, 0] = False  # padding, or the beginning of the prompt
        logits = masked_logits(model, ids, mask, chosen, shift)
        found.append((logits, ids[chosen], t.to(device)[chosen.nonzero()[:, 0], 0]))
    return denoising_loss(*(torch.cat(part) for part in zip(*found, strict=True)))
