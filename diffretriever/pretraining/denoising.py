"""The masked diffusion objective on plain text (LLaDA, Nie et al. 2025, eq. 3): batches, masks, loss, held-out loss."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from ..model.batching import batches_by_length
from ..model.modeling_diffretriever import DiffRetriever
from ..model.tokenization_helpers import RetrievalTokenizer
from ..training.denoising import SMALLEST_T, denoising_loss, masked_logits
from .corpus import IdLists
from .plan import EndlessBatches

POOL = 8192  # texts that are sorted by length together
HELD_OUT_T = (0.15, 0.5, 0.85)


def token_batches(lengths: Sequence[int], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Split texts into batches of similar length and about the same number of tokens, in random order.

    Args:
        lengths: tokens of each text.
        tokens: padded tokens in a batch, at most (a longer text makes a batch of its own).
        seed, epoch: fix the order.
    """
    rng = np.random.default_rng([seed, epoch])
    order, sizes = rng.permutation(len(lengths)), np.asarray(lengths)
    batches: list[list[int]] = []
    for start in range(0, len(order), POOL):
        pool = order[start : start + POOL]
        batches += [pool[rows].tolist() for rows in batches_by_length(sizes[pool].tolist(), tokens)]
    return [batches[number] for number in rng.permutation(len(batches))]


class Denoiser:
    """Masks texts and measures how well a model restores them.

    Args:
        texts: the corpus as token ids.
        rules: knows the mask token, and pads.
        length: tokens of a text that are used, with the bos token.
        tokens: padded tokens in a batch.
        seed: fixes the order of the batches.
        shift: a token is predicted from the state so many positions before it: 0 for LLaDA, 1 for Dream.

    Raises:
        ValueError: there are no texts.
    """

    def __init__(
        self, texts: IdLists, rules: RetrievalTokenizer, length: int, tokens: int, seed: int, shift: int = 0
    ) -> None:
        if not len(texts):
            raise ValueError("there are no plain texts to denoise")
        self.texts, self.rules, self.length, self.tokens, self.shift = texts, rules, length, tokens, shift
        self.bos: int = rules.tokenizer.bos_token_id
        lengths = self._lengths(texts)
        self.batches = EndlessBatches(lambda epoch: token_batches(lengths, tokens, seed, epoch))

    def loss(self, model: DiffRetriever, number: int, rng: random.Random) -> torch.Tensor:
        """Return the objective on batch `number`: each token masked with probability t, cross-entropy over t."""
        ids, mask = self.rows(self.texts, self.batches[number], rng)
        # t is uniform in every row, and spread over its range within the batch: a lower variance at no cost.
        shift = torch.rand(1)
        t = ((torch.arange(len(ids)) + shift) / len(ids))[torch.randperm(len(ids))] % 1.0
        t = SMALLEST_T + (1 - SMALLEST_T) * t  # [B]
        chosen = self.choose(ids, mask, t[:, None])
        logits = masked_logits(model, ids, mask, chosen, self.shift)
        return denoising_loss(logits, ids[chosen], t[chosen.nonzero()[:, 0]])

    @torch.no_grad()
    def held_out(self, model: DiffRetriever, texts: IdLists) -> dict[str, float]:
        """Return the mean cross-entropy (nats) on masked tokens at three masking probabilities; same masks always.

        Args:
            model: the model.
            texts: texts that it was not trained on.

        Returns:
            {"t=0.15": ..., "t=0.5": ..., "t=0.85": ...}.
        """
        generator, result = torch.Generator().manual_seed(0), {}
        for t in HELD_OUT_T:
            total, count = 0.0, 0
            for batch in batches_by_length(self._lengths(texts), self.tokens):
                ids, mask = self.rows(texts, batch, random.Random(0))
                chosen = self.choose(ids, mask, torch.tensor(t), generator)
                logits = masked_logits(model, ids, mask, chosen, self.shift).float()
                total += float(F.cross_entropy(logits, ids[chosen], reduction="sum"))
                count += int(chosen.sum())
            result[f"t={t}"] = round(total / count, 4)
        return result

    def _lengths(self, texts: IdLists) -> list[int]:
        return [length + 1 for length in texts.lengths(self.length - 1)]

    def rows(self, texts: IdLists, batch: Sequence[int], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask [B, L] of a batch: bos and a random stretch of each text."""
        sequences = []
        for number in batch:
            text = texts[number]
            start = rng.randrange(max(len(text) - self.length + 1, 0) + 1)
            sequences.append([self.bos, *text[start : start + self.length - 1]])
        return self.rules.pad(sequences)

    def choose(
        self, ids: torch.Tensor, mask: torch.Tensor, t: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Say which tokens are masked: each with probability t, never bos or padding; at least one in a row. [B, L]."""
        chosen = (torch.rand(ids.shape, generator=generator) < t) & (mask == 1) & (ids != self.bos)
        chosen[:, -1] |= ~chosen.any(1)
        return chosen
