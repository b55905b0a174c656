"""The masked diffusion objective on plain text (LLaDA, Nie et al. 2025, eq. 3): batches, masks, loss, held-out loss."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..training.losses import denoising_loss
from .backbone import hidden_states
from .backbone_format import Backbone
from .data import IdLists, pad_left

POOL = 8192  # texts that are sorted by length together
SMALLEST_T = 0.05  # t is kept away from 0, where 1/t has no finite variance
HELD_OUT_T = (0.15, 0.5, 0.85)


def token_batches(lengths: Sequence[int], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Splits texts into batches of similar length and about the same number of tokens, in random order.

    Args:
        lengths: tokens of each text.
        tokens: padded tokens in a batch, at most (a longer text makes a batch of its own).
        seed, epoch: fix the order.
    """
    rng = random.Random(f"{seed}-{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), POOL):
        current: list[int] = []
        for item in sorted(order[start : start + POOL], key=lengths.__getitem__):
            if current and lengths[item] * (len(current) + 1) > tokens:
                batches.append(current)
                current = []
            current.append(item)
        batches.append(current)
    rng.shuffle(batches)
    return batches


class TokenBatches:
    """Batch number n of an endless sequence, the same in every run: epochs of `token_batches`."""

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int) -> None:
        if not lengths:
            raise ValueError("there are no plain texts to denoise")
        self.lengths, self.tokens, self.seed = lengths, tokens, seed
        self._first, self._epoch = 0, -1
        self._batches: list[list[int]] = []

    def __getitem__(self, number: int) -> list[int]:
        if number < self._first:
            self._first, self._epoch, self._batches = 0, -1, []
        while number >= self._first + len(self._batches):
            self._first, self._epoch = self._first + len(self._batches), self._epoch + 1
            self._batches = token_batches(self.lengths, self.tokens, self.seed, self._epoch)
        return self._batches[number - self._first]


class Denoiser:
    """Masks texts and measures how well a model restores them.

    Args:
        texts: the corpus as token ids.
        special: ids of "mask", "bos" and "eos" (which pads).
        length: tokens of a text that are used, with the bos token.
        tokens: padded tokens in a batch.
        seed: fixes the order of the batches.
        shift: a token is predicted from the state so many positions before it: 0 for LLaDA, 1 for Dream.
    """

    def __init__(
        self, texts: IdLists, special: dict[str, int], length: int, tokens: int, seed: int, shift: int = 0
    ) -> None:
        self.texts, self.special, self.length, self.tokens, self.shift = texts, special, length, tokens, shift
        self.batches = TokenBatches([n + 1 for n in texts.lengths(length - 1)], tokens, seed)

    def loss(self, model: Backbone, number: int, rng: random.Random) -> torch.Tensor:
        """The objective on batch `number`: mask each token with probability t, cross-entropy over t."""
        ids, mask = self._rows(self.texts, self.batches[number], rng)
        # t is uniform in every row, and spread over its range within the batch: a lower variance at no cost.
        shift = torch.rand(1)
        t = ((torch.arange(len(ids)) + shift) / len(ids))[torch.randperm(len(ids))] % 1.0
        t = SMALLEST_T + (1 - SMALLEST_T) * t  # [B]
        chosen = self._choose(ids, mask, t[:, None], None)
        rows = chosen.nonzero()[:, 0]
        return denoising_loss(self._logits(model, ids, mask, chosen), ids[chosen], t, rows)

    @torch.no_grad()
    def held_out(self, model: Backbone, texts: IdLists) -> dict[str, float]:
        """Mean cross-entropy (nats) on masked tokens of other texts at three masking probabilities; same masks always.

        Args:
            model: the model.
            texts: texts that it was not trained on.

        Returns:
            {"t=0.15": ..., "t=0.5": ..., "t=0.85": ...}.
        """
        lengths = [n + 1 for n in texts.lengths(self.length - 1)]
        generator, result = torch.Generator().manual_seed(0), {}
        for t in HELD_OUT_T:
            total, count = 0.0, 0
            for batch in token_batches(lengths, self.tokens, 0, 0):
                ids, mask = self._rows(texts, batch, random.Random(0))
                chosen = self._choose(ids, mask, torch.tensor(t), generator)
                logits = self._logits(model, ids, mask, chosen).float()
                total += float(F.cross_entropy(logits, ids[chosen], reduction="sum"))
                count += int(chosen.sum())
            result[f"t={t}"] = round(total / count, 4)
        return result

    def _rows(self, texts: IdLists, batch: Sequence[int], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [B, L] of a batch: bos and a random stretch of each text."""
        return pad_left(list(self._stretches(texts, batch, rng)), self.special["eos"])

    def _stretches(self, texts: IdLists, batch: Sequence[int], rng: random.Random) -> Iterator[list[int]]:
        for number in batch:
            text = texts[number]
            start = rng.randrange(max(len(text) - self.length + 1, 0) + 1)
            yield [self.special["bos"], *text[start : start + self.length - 1]]

    def _choose(self, ids: torch.Tensor, mask: torch.Tensor, t: torch.Tensor, generator: Any) -> torch.Tensor:
        """Which tokens are masked: each with probability t, never bos or padding; at least one in a row. [B, L]."""
        chosen = (torch.rand(ids.shape, generator=generator) < t) & (mask == 1) & (ids != self.special["bos"])
        chosen[:, -1] |= ~chosen.any(1)
        return chosen

    def _logits(self, model: Backbone, ids: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Logits for the masked tokens alone: [M, V]."""
        states = hidden_states(model, ids.masked_fill(chosen, self.special["mask"]), mask)
        # A row begins with padding or bos, which is never chosen: no masked token is lost.
        before = states[:, : states.shape[1] - self.shift][chosen[:, self.shift :]]
        logits: torch.Tensor = model.lm_head(before)
        return logits
