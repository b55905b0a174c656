"""Which step of a stage does what: kinds of step in turn, and the batches of each kind in order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..training.epochs import epoch_batches
from .corpus import Corpus, EncodedPairs, cloze_pair
from .neighbours import with_neighbours
from .recipe import Stage

MIN_CLOZE = 16  # tokens of a text that is split into a query and a passage


class EndlessBatches:
    """Batch number n of an endless sequence of epochs, the same in every run.

    Args:
        make: from an epoch's number to its batches of item numbers, the same each time.

    >>> batches = EndlessBatches(lambda epoch: [[10 * epoch], [10 * epoch + 1, 10 * epoch + 2]])
    >>> batches[3], batches[0]
    ([11, 12], [0])
    """

    def __init__(self, make: Callable[[int], Sequence[Sequence[int]]]) -> None:
        self._make = make
        self._first, self._epoch = 0, -1
        self._batches: Sequence[Sequence[int]] = []

    def __getitem__(self, number: int) -> Sequence[int]:
        if number < self._first:
            self._first, self._epoch, self._batches = 0, -1, []
        while number >= self._first + len(self._batches):
            self._first, self._epoch = self._first + len(self._batches), self._epoch + 1
            self._batches = self._make(self._epoch)
        return self._batches[number - self._first]


@dataclass(frozen=True)
class Drawn:
    """One contrastive batch: token ids and ids of content words, one list a text; text n of both sides is a pair."""

    queries: list[list[int]]
    passages: list[list[int]]
    query_words: list[list[int]]
    passage_words: list[list[int]]


class StagePlan:
    """The steps of one stage.

    Args:
        stage: kinds of step, batch size, lengths.
        corpus: what to draw from.
        seed: fixes the order.

    Raises:
        ValueError: a batch is larger than the data.
    """

    def __init__(self, stage: Stage, corpus: Corpus, seed: int) -> None:
        self.stage, self.corpus = stage, corpus
        passages, texts = corpus.pairs.passages.lengths(stage.max_passage), corpus.texts.lengths(stage.max_passage)
        self.long = [number for number, length in enumerate(texts) if length >= MIN_CLOZE]
        items = {
            "pairs": (passages, stage.batch_size),
            "neighbours": (passages, max(stage.batch_size // 2, 1)),
            "cloze": ([texts[number] for number in self.long], stage.batch_size),
        }
        self.batches = {
            kind: _in_order(*items[kind], seed + place, kind)
            for place, kind in enumerate(items)
            if kind in stage.pattern
        }

    def kind(self, step: int) -> tuple[str, int]:
        """Return the kind of a step, and how many of that kind came before it."""
        pattern = self.stage.pattern
        rounds, place = divmod(step, len(pattern))
        kind = pattern[place]
        return kind, rounds * pattern.count(kind) + pattern[:place].count(kind)

    def budget(self, step: int) -> int:
        """Return K of a contrastive step: the budgets in turn."""
        contrastive = [kind != "denoise" for kind in self.stage.pattern]
        rounds, place = divmod(step, len(contrastive))
        return self.stage.budgets[(rounds * sum(contrastive) + sum(contrastive[:place])) % len(self.stage.budgets)]

    def draw(self, kind: str, number: int, rng: random.Random) -> Drawn:
        """Return batch `number` of a contrastive kind."""
        chosen, pairs = self.batches[kind][number], self.corpus.pairs
        if kind == "cloze":
            return self._cloze(chosen, rng)
        if kind == "neighbours":
            assert self.corpus.neighbours is not None
            chosen = with_neighbours(chosen, self.corpus.neighbours, rng)
        chosen = _distinct(chosen, pairs)
        lists = (pairs.queries, pairs.passages, pairs.query_words, pairs.passage_words)
        return Drawn(*([rows[number] for number in chosen] for rows in lists))

    def _cloze(self, chosen: Sequence[int], rng: random.Random) -> Drawn:
        made = []
        for item in chosen:
            text = self.corpus.texts[self.long[item]]
            start = rng.randrange(max(len(text) - self.stage.max_passage, 0) + 1)
            made.append(cloze_pair(text[start : start + self.stage.max_passage], rng))
        queries, passages = [query for query, _ in made], [passage for _, passage in made]
        return Drawn(queries, passages, [sorted(set(ids)) for ids in queries], [sorted(set(ids)) for ids in passages])


def _in_order(lengths: Sequence[int], size: int, seed: int, kind: str) -> EndlessBatches:
    if len(lengths) < size:
        raise ValueError(f"a batch of {size} is larger than the data: {len(lengths)} items for {kind!r} steps")
    return EndlessBatches(lambda epoch: epoch_batches(lengths, size, seed, epoch).tolist())


def _distinct(chosen: Sequence[int], pairs: EncodedPairs) -> list[int]:
    """Leave out pairs whose query or passage is already in the batch: they would be false negatives."""
    seen: set[tuple[int, ...]] = set()
    kept = []
    for number in chosen:
        keys = {(0, *pairs.queries[number]), (1, *pairs.passages[number])}
        if not keys & seen:
            kept.append(number)
            seen |= keys
    return kept
