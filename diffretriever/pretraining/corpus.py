"""What pretraining learns from: pairs and plain texts as token ids, and the pairs that are made of plain texts."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.pair_files import PairFiles
from ..files.lines import read_objects
from ..model.tokenization_helpers import RetrievalTokenizer
from .neighbours import cached_neighbours
from .recipe import PretrainRecipe

HELD_OUT_EVERY = 400  # one plain text in so many measures the denoising loss and is never trained on
LONGEST_TEXT = 512  # tokens of a plain text that are kept
CHUNK = 1000  # texts that are tokenised at once


class IdLists:
    """Many lists of token ids in one array: millions of Python lists would cost memory and collector time."""

    def __init__(self, rows: Iterable[Sequence[int]] = ()) -> None:
        self.flat = array("i")
        self.starts = array("q", [0])
        for row in rows:
            self.flat.extend(row)
            self.starts.append(len(self.flat))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> list[int]:
        return self.flat[self.starts[number] : self.starts[number + 1]].tolist()

    def lengths(self, limit: int) -> list[int]:
        """Return the length of each list, at most `limit`."""
        return np.diff(self.starts).clip(max=limit).tolist()


@dataclass(frozen=True)
class EncodedPairs:
    """Queries and passages as token ids, each with the ids of its content words; pair n is number n in all four."""

    queries: IdLists
    passages: IdLists
    query_words: IdLists
    passage_words: IdLists

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Corpus:
    """Everything that steps draw from.

    Args:
        pairs: what answers what.
        texts: plain texts.
        held_out: plain texts that are never trained on.
        neighbours: int32 [pairs, depth], see `bm25_neighbours`; None where no stage asks for them.
    """

    pairs: EncodedPairs
    texts: IdLists
    held_out: IdLists
    neighbours: np.ndarray | None


def read_texts(path: str | Path) -> Iterator[str]:
    """Read {"text": ...} lines; blank texts are passed over.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line without a text; names file and line.
    """
    for number, record in read_objects(path):
        text = record.get("text")
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: 'text' is missing or not a text.")
        if text.strip():
            yield text


def read_corpus(
    recipe: PretrainRecipe,
    pair_files: Sequence[Path],
    text_files: Sequence[Path],
    rules: RetrievalTokenizer,
    scratch: Path,
) -> Corpus:
    """Read and tokenise the training data.

    Args:
        recipe: lengths and what the stages ask for.
        pair_files: JSONL of pairs; a query with several positives counts once for each.
        text_files: JSONL of plain texts.
        rules: tokenises as a release of this backbone does.
        scratch: folder for the mined neighbours, and for unpacked copies of compressed pairs.
    """
    files = PairFiles(pair_files, scratch)
    flat = [(item.query, positive) for item in files for positive in item.positives]
    files.close()
    queries, passages = [query for query, _ in flat], [passage for _, passage in flat]
    found = None
    if any("neighbours" in stage.pattern for stage in recipe.stages):
        found = cached_neighbours(queries, passages, recipe.neighbours, scratch, files.report.fingerprints.values())
    query_ids = IdLists(_first_ids(rules, queries, max(stage.max_query for stage in recipe.stages)))
    passage_ids = IdLists(_first_ids(rules, passages, max(stage.max_passage for stage in recipe.stages)))
    pairs = EncodedPairs(query_ids, passage_ids, _words(rules, query_ids), _words(rules, passage_ids))
    texts = (text for path in text_files for text in read_texts(path))
    ids = IdLists(_first_ids(rules, islice(texts, 0, None, recipe.texts_every), LONGEST_TEXT))
    held_out = range(HELD_OUT_EVERY - 1, len(ids), HELD_OUT_EVERY)
    kept = (ids[number] for number in range(len(ids)) if number not in held_out)
    return Corpus(pairs, IdLists(kept), IdLists(ids[number] for number in held_out or range(len(ids))[:1]), found)


def _first_ids(rules: RetrievalTokenizer, texts: Iterable[str], limit: int) -> Iterator[list[int]]:
    """Yield each text's first `limit` token ids."""
    stream = iter(texts)
    while chunk := list(islice(stream, CHUNK)):
        yield from rules.first_ids(chunk, limit)


def _words(rules: RetrievalTokenizer, texts: IdLists) -> IdLists:
    """Return the ids of the content words of each text."""
    return IdLists(rules.content_lists([texts[number] for number in range(len(texts))]))


def drop_tokens(ids: Sequence[int], probability: float, rng: random.Random) -> list[int]:
    """Leave out each token with a probability; never all of them."""
    kept = [token for token in ids if rng.random() >= probability]
    return kept or list(ids)


def cloze_pair(ids: Sequence[int], rng: random.Random, keep: float = 0.1) -> tuple[list[int], list[int]]:
    """Make a pair of one text by the inverse cloze task (Lee et al. 2019): a span as the query, the rest answers it.

    Args:
        ids: at least 12 token ids.
        rng: source of randomness.
        keep: probability that the passage keeps the span.

    Returns:
        (query ids, passage ids); the query has 5 to 16 tokens.
    """
    size = min(rng.randint(5, 16), len(ids) // 2)
    start = rng.randrange(len(ids) - size + 1)
    span = list(ids[start : start + size])
    return span, list(ids) if rng.random() < keep else list(ids[:start]) + list(ids[start + size :])
