"""What pretraining minimises: the fine-tuning objective both ways, a loss on content words, and masked diffusion."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ..model.sparse_head import logits_at
from ..training.objective import Head, Side, dense_scores, info_nce, membership, sparse_scores
from .recipe import Stage

CHANCE_WORDS = 256  # random vocabulary entries among the negatives of `word_loss`


def contrastive_loss(query: Side, passage: Side, head: nn.Linear, stage: Stage) -> dict[str, torch.Tensor]:
    """Return InfoNCE over dense and over sparse scores (paper §3.4, Eq. 5), and the loss on content words.

    The dense scores are ranked both ways, passages for each query and queries for each passage: small models learn
    faster so.

    Args:
        query: N texts; passage: the N texts that answer them, with as many masks.
        head: the output head, [V, H].
        stage: temperature and weights.

    Returns:
        "loss" with gradient; "dense", "sparse", "words" and "right" (share of queries whose passage has the best sparse
        score) without.
    """
    targets, logits = torch.arange(len(query.states)), partial(logits_at, head)
    scores = dense_scores(query, passage)  # [N, N]
    dense = (info_nce(scores, targets, stage.temperature) + info_nce(scores.T, targets, stage.temperature)) / 2
    scores = sparse_scores(query, passage, logits)
    sparse = info_nce(scores, targets)
    both = Side(torch.cat([query.states, passage.states]), torch.cat([query.words, passage.words]))
    words = word_loss(both, logits, torch.randint(head.out_features, (CHANCE_WORDS,)))
    loss = dense + stage.sparse_weight * sparse + stage.word_weight * words
    right = (scores.argmax(dim=1) == targets).float().mean()
    return {"loss": loss, "dense": dense.detach(), "sparse": sparse.detach(), "words": words.detach(), "right": right}


def word_loss(side: Side, head: Head, chance: torch.Tensor) -> torch.Tensor:
    """Return a binary cross-entropy: a text's own content words shall have positive logits, other words negative ones.

    Without it the relu of the sparse vectors is zero at the start and passes no gradient.

    Args:
        side: N texts.
        head: gives logits.
        chance: int64, vocabulary entries that count as negatives besides the other texts' words.
    """
    columns = torch.unique(torch.cat([side.words[side.words >= 0], chance]))  # [C]
    logits = head(side.states, columns).amax(dim=1)  # [N, C]
    truth = membership(side.words, columns)
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    positive = (each * truth).sum() / truth.sum().clamp(min=1)
    return (positive + (each * (1 - truth)).sum() / (1 - truth).sum().clamp(min=1)) / 2
