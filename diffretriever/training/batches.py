"""From training items to the tensors of one micro-batch."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from ..data.pair_files import PairFiles, TrainingItem
from ..data.texts import text_key
from ..files.hashes import hash64
from .adapter_recipe import AdapterRecipe

CACHED_TEXTS = 200_000  # about 1.5 KB each
Prepared = tuple["array[int]", "array[int]", bool]  # sequence, content word ids, whether the text was cut


class SampledItems(torch.utils.data.Dataset[dict[str, Any]]):
    """Training items as an epoch sees them: one positive and some hard negatives, drawn by (seed, epoch, item).

    Args:
        files: the data.
        hard_negatives: how many to draw; an item with fewer gives all it has.
        seed: fixes the draws.
    """

    def __init__(self, files: PairFiles, hard_negatives: int, seed: int) -> None:
        self.files, self.hard_negatives, self.seed = files, hard_negatives, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Draw item (epoch, number)."""
        epoch, number = key
        item = self.files[number]
        rng = random.Random(f"{self.seed}-{epoch}-{number}")
        positive = rng.choice(item.positives)
        negatives = rng.sample(item.negatives, min(self.hard_negatives, len(item.negatives)))
        return {"item": item, "positive": positive, "negatives": negatives}


class PreparedTexts:
    """Sequences and content words of texts as the model's inference has them, remembered.

    Args:
        model: a DiffRetriever or a baseline; its `texts` attribute has the rules.
    """

    def __init__(self, model: Any) -> None:
        self._rules, self._sparse = model.texts, bool(model.config.sparse_top_k)
        self._kept: dict[tuple[bool, str], Prepared] = {}

    def __call__(self, texts: Sequence[str], is_query: bool) -> list[Prepared]:
        """Return (sequence, content word ids, whether the text was cut) of each text."""
        missing = [text for text in dict.fromkeys(texts) if (is_query, text) not in self._kept]
        if missing:
            if len(self._kept) + len(missing) > CACHED_TEXTS:
                self._kept.clear()
                missing = list(dict.fromkeys(texts))
            for text, made in zip(missing, self._prepare(missing, is_query), strict=True):
                self._kept[is_query, text] = made
        return [self._kept[is_query, text] for text in texts]

    def _prepare(self, texts: list[str], is_query: bool) -> list[Prepared]:
        prepared = self._rules.prepare(texts, is_query, content_filter=self._sparse)
        return [(array("i", text.sequence), array("i", text.content or []), text.cut) for text in prepared]


class Collator:
    """Makes one process's micro-batch: the queries, and the passages with the positives in front.

    Args:
        model: a DiffRetriever or a baseline.
        recipe: forward_texts, grad_cache_chunk.
    """

    def __init__(self, model: Any, recipe: AdapterRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.prepared = PreparedTexts(model)

    def __call__(self, drawn: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Turn Q items into tensors.

        Returns:
            "query" and "passage": {"chunks": [{"ids", "mask": int64 [b, L], "positions": [b, K]}], "order": [N]};
            "query_words" [Q, W] and "passage_words" [P, W'], padded with -1; "query_hashes" [Q], "positive_hashes"
            [Q, N], "passage_hashes" [P, 2] (see `known_positives`); "query_texts" and "passage_texts"; "tokens" and
            "cut", numbers for the log; "where", the lines that the items are from.
        """
        items: list[TrainingItem] = [each["item"] for each in drawn]
        queries = [item.query for item in items]
        positives = [each["positive"] for each in drawn]
        negatives = [text for each in drawn for text in each["negatives"]]
        prepared = self.prepared(queries, True), self.prepared(positives + negatives, False)
        batch: dict[str, Any] = {}
        for name, is_query, rows in (("query", True, prepared[0]), ("passage", False, prepared[1])):
            batch[name] = self.chunked([row[0] for row in rows], is_query)
            batch[f"{name}_words"] = padded_ids([row[1] for row in rows])
        batch |= candidate_hashes(drawn) | {"query_texts": queries, "passage_texts": positives + negatives}
        batch["tokens"] = sum(len(row[0]) for side in prepared for row in side)
        batch["cut"] = sum(row[2] for side in prepared for row in side)
        batch["where"] = [item.where for item in items]
        return batch

    def chunked(self, sequences: Sequence[Sequence[int]], is_query: bool) -> dict[str, Any]:
        """Cut one side into chunks of similar length, each padded for itself."""
        size = self.recipe.grad_cache_chunk or self.recipe.forward_texts or len(sequences)
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        chunks = [self._pad([sequences[row] for row in order[start : start + size]], is_query)
                  for start in range(0, len(order), size)]  # fmt: skip
        return {"chunks": chunks, "order": torch.tensor(order).argsort()}

    def _pad(self, rows: Sequence[Sequence[int]], is_query: bool) -> dict[str, torch.Tensor]:
        ids, mask = self.model.texts.pad(rows)
        return {"ids": ids, "mask": mask, "positions": self.model.texts.mask_positions(ids, is_query)}


def candidate_hashes(drawn: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return what `known_positives` compares, for Q items as `SampledItems` draws them.

    Returns:
        int64 "query_hashes" [Q], "positive_hashes" [Q, N] padded with -1, and "passage_hashes" [P, 2], the positives'
        in front.
    """
    negatives = [text for each in drawn for text in each["negatives"]]
    queries = hashes_of([each["item"].query for each in drawn])
    texts = hashes_of([each["positive"] for each in drawn] + negatives)
    owners = queries + [-1] * len(negatives)
    return {
        "query_hashes": torch.tensor(queries),
        "positive_hashes": padded_ids([hashes_of(each["item"].positives) for each in drawn]),
        "passage_hashes": torch.tensor([texts, owners]).T.contiguous(),
    }


def hashes_of(texts: Sequence[str]) -> list[int]:
    """Return a number for each text, the same for texts that say the same."""
    return [hash64(text_key(text)) for text in texts]


def padded_ids(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return lists of ids as one tensor, padded with -1: int64 [N, longest, at least 1].

    >>> padded_ids([[3, 5], []]).tolist()
    [[3, 5], [-1, -1]]
    """
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])
