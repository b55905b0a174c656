"""The fine-tuning objective (paper §3.4): InfoNCE over MaxSim, plus InfoNCE over sparse dot products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..model.scoring import multi_dense
from ..model.sparse_head import lexical_weights, logits_at
from .adapter_recipe import AdapterRecipe
from .candidates import gather_ids, gather_rows, known_positives
from .denoising import passages_denoising_loss
from .distillation import Teacher, distillation_loss
from .lora import is_trained, lora_parameters
from .methods import TextStates, read_states

# Mask states [B, K, H] and vocabulary entries [C] -> logits [B, K, C].
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Side:
    """The states of one side's texts and what they may say.

    Args:
        states: [N, K, H], at the masks, not normalised.
        words: int64 [N, W], ids of each text's content words, padded with -1.
        frozen: bool [N, K], states of earlier denoising steps, which carry no gradient, nor do their logits (paper App.
            A.1); None where there is one step.
        exists: bool [N, K], which states the texts have, the first for one; None where they have all.
    """

    states: torch.Tensor
    words: torch.Tensor
    frozen: torch.Tensor | None = None
    exists: torch.Tensor | None = None


def dense_scores(query: Side, passage: Side) -> torch.Tensor:
    """Return the MaxSim of the L2-normalised states that exist (paper Eq. 2).

    Args:
        query: Q texts with K_q states; passage: P texts with K_p.

    Returns:
        float32 [Q, P].
    """
    states = [F.normalize(side.states.float(), dim=-1) for side in (query, passage)]
    return multi_dense(states[0], states[1], query.exists, passage.exists)


def word_columns(words: torch.Tensor) -> torch.Tensor:
    """Return the vocabulary entries that occur in lists of ids padded with -1: int64 [C], sorted, never empty."""
    columns = torch.unique(words[words >= 0])
    return columns if len(columns) else columns.new_zeros(1)  # the head must take part in every backward pass


def sparse_weights(side: Side, head: Head, columns: torch.Tensor) -> torch.Tensor:
    """Return the sparse weights of each text's content words (paper Eq. 3).

    Args:
        side: N texts.
        head: gives logits.
        columns: int64 [C], sorted; the entries that are asked for.

    Returns:
        float32 [N, C].
    """
    states = side.states
    if side.exists is not None:  # a maximum does not mind the first one twice
        states = torch.where(side.exists[..., None], states, states[:, :1])
    logits = head(states, columns)  # [N, K, C]
    if side.frozen is not None:
        logits = torch.where(side.frozen.to(logits.device)[..., None], logits.detach(), logits)
    return lexical_weights(logits) * membership(side.words, columns)


def membership(words: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Say which of the columns each text has among its words.

    Args:
        words: int64 [N, W], padded with -1.
        columns: int64 [C], sorted, at least one.

    Returns:
        float32 [N, C] of 0 and 1.
    """
    places = torch.searchsorted(columns, words.clamp(min=0)).clamp(max=len(columns) - 1)  # [N, W]
    known = (columns[places] == words).float()
    return known.new_zeros(len(words), len(columns)).scatter_reduce(1, places, known, "amax")


def sparse_scores(query: Side, passage: Side, head: Head) -> torch.Tensor:
    """Return dot products of content-filtered sparse vectors [Q, P]; the queries' columns alone can contribute."""
    columns = word_columns(query.words)
    return sparse_weights(query, head, columns) @ sparse_weights(passage, head, columns).T


def info_nce(scores: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return InfoNCE (paper Eq. 5): -log softmax of the positive's score among all candidates, mean over queries.

    Args:
        scores: [Q, P].
        targets: int64 [Q], the positive's column.
        temperature: divides the scores.

    Raises:
        ValueError: the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return F.cross_entropy(scores.float() / temperature, targets)


def contrastive_loss(
    query: Side,
    passage: Side,
    targets: torch.Tensor,
    excluded: torch.Tensor,
    head: Head | None,
    temperature: float,
    sparse_weight: float,
    teacher: torch.Tensor | None = None,
    distillation_weight: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Return InfoNCE over dense scores / temperature, plus sparse_weight times that over sparse scores (paper Eq. 5).

    Args:
        query: Q texts; passage: P texts, the positives and negatives of every query.
        targets: int64 [Q], each query's positive among the passages.
        excluded: bool [Q, P], candidates that are left out.
        head: gives logits; None leaves the sparse side out.
        temperature: of the dense scores; the sparse ones have none.
        sparse_weight: of the sparse loss.
        teacher: float32 [Q, P], another model's scores, divided by its temperature, whose ranking the dense scores
            learn (where the sparse ones learned it, too, they came out worse: checkpoints/README.md).
        distillation_weight: of learning it.

    Returns:
        "loss" with gradient; "dense", "sparse", "right" (share of queries whose positive scores best) and, with a
        teacher, "distillation" without.
    """
    scores = dense_scores(query, passage).masked_fill(excluded, -torch.inf)
    loss = dense = info_nce(scores, targets, temperature)
    sparse = dense.new_zeros(())
    if head is not None:
        found = sparse_scores(query, passage, head).masked_fill(excluded, -torch.inf)
        sparse = info_nce(found, targets)
        loss = dense + sparse_weight * sparse
    parts = {"dense": dense, "sparse": sparse, "right": (scores.argmax(dim=1) == targets).float().mean()}
    if teacher is not None:
        parts["distillation"] = distillation_loss(scores / temperature, teacher, excluded)
        loss = loss + distillation_weight * parts["distillation"]
    return {"loss": loss} | {name: part.detach() for name, part in parts.items()}


class ContrastiveModel(nn.Module):
    """A release with LoRA matrices that turns a batch of texts into the loss.

    Its state is the adapter alone: the frozen backbone is neither saved nor sent around.

    Args:
        retriever: a DiffRetriever or a baseline after `add_lora`.
        recipe: temperature, weights, grad_cache_chunk.
        teacher: scores each batch, where the recipe has one; it is no part of the module.
    """

    def __init__(self, retriever: Any, recipe: AdapterRecipe, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.retriever = retriever
        self.recipe = recipe
        self.teacher = teacher

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Compute the loss of one process's queries among all processes' passages.

        Args:
            batch: from `batches.Collator`.

        Returns:
            As `contrastive_loss`; with a `denoising_weight`, "loss" has that much of "denoising" in it.
        """
        states, frozen, exists = self.encode(batch["query"], True)
        query = Side(states, batch["query_words"], frozen, exists)
        own = self.encode(batch["passage"], False)
        states, start = gather_rows(own.states)
        frozen, exists = (None if part is None else gather_rows(part)[0] for part in own[1:])
        passage = Side(states, gather_ids(batch["passage_words"]), frozen, exists)
        hashes, _ = gather_rows(batch["passage_hashes"])
        targets = torch.arange(len(query.states), device=states.device) + start
        excluded = known_positives(batch["query_hashes"], batch["positive_hashes"], hashes, targets)
        head = partial(logits_at, self.retriever.lm_head) if self.retriever.config.sparse_top_k else None
        taught = None
        if self.teacher is not None:
            taught = self.teacher(batch["query_texts"], batch["passage_texts"], states.device)
        kind = states.device.type
        with torch.autocast(kind, enabled=False):  # a score of bfloat16 precision over 0.01 would be noise
            found = contrastive_loss(
                query, passage, targets, excluded, head, self.recipe.temperature, self.recipe.sparse_weight,
                taught, self.recipe.distillation_weight,
            )  # fmt: skip
        if self.recipe.denoising_weight:
            denoising = passages_denoising_loss(self.retriever, batch["passage"]["chunks"])
            found["loss"] = found["loss"] + self.recipe.denoising_weight * denoising
            found["denoising"] = denoising.detach()
        return found

    def encode(self, side: dict[str, Any], is_query: bool) -> TextStates:
        """Return the states of one side's N texts, in the order before the chunks were cut.

        With `grad_cache_chunk`, a chunk's activations are dropped after its forward pass and computed again, with
        the same dropout, when its gradient is known (GradCache, arXiv:2101.06983): a large batch then costs the
        memory of one chunk. The gradient is that of the whole batch.
        """
        found = []
        for chunk in side["chunks"]:
            if self.recipe.grad_cache_chunk and torch.is_grad_enabled():
                found.append(checkpoint(read_states, self.retriever, chunk, is_query, use_reentrant=False))
            else:
                found.append(read_states(self.retriever, chunk, is_query))
        order = side["order"]
        states = torch.cat([part.states for part in found])[order]
        masks = (None if part[0] is None else torch.cat(part)[order] for part in list(zip(*found, strict=True))[1:])
        return TextStates(states, *masks)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the adapter's weights only."""
        kept = super().state_dict(*args, **kwargs)
        for name in [name for name in kept if not is_trained(name)]:
            del kept[name]
        return kept

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take what `state_dict` returned.

        Raises:
            ValueError: other keys than this adapter's.
        """
        wrong = sorted(lora_parameters(self).keys() ^ state_dict.keys())
        if wrong:
            raise ValueError(f"{wrong[0]} is not in both the checkpoint and this run's adapter")
        return super().load_state_dict(state_dict, strict=False, assign=assign)
