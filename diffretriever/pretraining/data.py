"""Text pairs and plain texts from JSONL files, and the order in which training sees them."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch


@dataclass(frozen=True)
class Pair:
    """One training item: a query, the passages that answer it, and passages known not to."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()


def open_text(path: str | Path) -> TextIO:
    """Opens a text file, plain, .gz or .xz, as UTF-8.

    Raises:
        FileNotFoundError: if the file is absent.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file; give the path of a JSONL file (.jsonl, .gz or .xz)")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) for every line that is not blank.

    Raises:
        ValueError: on a line that is not UTF-8 or not a JSON object; names file and line.
    """
    number = 0
    with open_text(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
                yield number, record
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after line {number}: not valid UTF-8") from error


def read_pairs(path: str | Path) -> Iterator[Pair]:
    """Reads {"query": ..., "positive" or "positives": ..., "negatives": [...]} lines.

    Yields:
        `Pair`s. A negative equal to a positive is dropped.

    Raises:
        ValueError: on a missing or empty query or positive; names file and line.
    """
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        query = record.get("query")
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"{where}: 'query' must be a text that is not empty")
        given = record.get("positives", record.get("positive"))
        positives = _texts(given, where, "positive")
        if not positives:
            raise ValueError(f"{where}: 'positive' is missing or empty; expected one text or a list of texts")
        negatives = _texts(record.get("negatives", ()), where, "negatives")
        yield Pair(query, positives, tuple(text for text in negatives if text not in positives))


def _texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    """One text or a list of texts as a tuple, blank ones refused."""
    values = [value] if isinstance(value, str) else list(value or ())
    for text in values:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: '{name}' holds something that is not a text, or an empty one")
    return tuple(values)


def read_texts(path: str | Path) -> Iterator[str]:
    """Reads {"text": ...} lines.

    Raises:
        ValueError: on a line without a text; names file and line.
    """
    for number, record in read_jsonl(path):
        text = record.get("text")
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: 'text' is missing or not a text")
        if text.strip():
            yield text


_WORD = re.compile(r"\w+(?:[-./_+']\w+)*")
# The commonest English function words; the retrieval model's own filter has the full list.
COMMON_WORDS = frozenset(
    "a an the and or but if of to in on at by for with from into as is are was were be been being it its this that "
    "these those which who what when where how not no can will has have had do does did than then so such all any "
    "each other some most more only own same too very you your we our they their he she his her i me my there here "
    "also between about over under up down out off again once both few nor just should now during while because".split()
)


class WordIds:
    """Content token ids of texts: lower-case words without common ones, each word tokenised on its own, cached."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, tuple[int, ...]] = {}

    def __call__(self, text: str) -> list[int]:
        """Returns the sorted ids of one text's content words."""
        found: set[int] = set()
        for word in set(_WORD.findall(text.lower())):
            if word not in COMMON_WORDS:
                ids = self.cache.get(word)
                if ids is None:
                    ids = self.cache[word] = tuple(self.tokenizer(word, add_special_tokens=False)["input_ids"])
                found.update(ids)
        return sorted(found)


class IdLists:
    """Many lists of token ids in one array: millions of Python lists would cost memory and collector time."""

    def __init__(self, rows: Iterable[Sequence[int]] = ()) -> None:
        self.flat = array("i")
        self.starts = array("q", [0])
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> list[int]:
        return self.flat[self.starts[number] : self.starts[number + 1]].tolist()

    def append(self, row: Sequence[int]) -> None:
        """Adds one list."""
        self.flat.extend(row)
        self.starts.append(len(self.flat))

    def lengths(self, limit: int) -> list[int]:
        """Length of each list, at most `limit`."""
        return [min(end - start, limit) for start, end in zip(self.starts, self.starts[1:], strict=False)]


@dataclass
class EncodedPairs:
    """Token ids and content words of pairs, cut to the lengths used in training."""

    queries: IdLists
    passages: IdLists
    query_words: IdLists
    passage_words: IdLists

    def __len__(self) -> int:
        return len(self.queries)


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, max_query: int, max_passage: int) -> EncodedPairs:
    """Tokenises pairs (a pair with several positives counts once for each).

    Args:
        pairs: text pairs.
        tokenizer: transformers tokenizer.
        max_query, max_passage: tokens of text kept.
    """
    flat = [(pair.query, positive) for pair in pairs for positive in pair.positives]
    words = WordIds(tokenizer)
    queries, kept_queries = encode_texts([q for q, _ in flat], tokenizer, max_query)
    passages, kept_passages = encode_texts([p for _, p in flat], tokenizer, max_passage)
    return EncodedPairs(queries, passages, IdLists(map(words, kept_queries)), IdLists(map(words, kept_passages)))


def encode_texts(texts: Sequence[str], tokenizer: Any, limit: int) -> tuple[IdLists, list[str]]:
    """Returns each text's first `limit` token ids, and the part of the text that they cover."""
    ids = IdLists()
    kept: list[str] = []
    for start in range(0, len(texts), 1000):
        part = list(texts[start : start + 1000])
        batch = tokenizer(
            [text[: limit * 12] for text in part],
            add_special_tokens=False,
            split_special_tokens=True,  # a special token's name inside a text is only text
            return_offsets_mapping=True,
        )
        for text, row, offsets in zip(part, batch["input_ids"], batch["offset_mapping"], strict=True):
            ids.append(row[:limit])
            kept.append(text[: offsets[limit - 1][1]] if len(row) >= limit else text)
    return ids, kept


def bucketed_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, pool: int = 32) -> list[list[int]]:
    """Splits items into batches of similar length, in random order; the last incomplete batch is left out.

    Args:
        lengths: one length per item.
        batch_size: items per batch.
        seed, epoch: fix the order.
        pool: batches that are sorted together.
    """
    rng = random.Random(f"{seed}-{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * pool):
        chunk = sorted(order[start : start + batch_size * pool], key=lambda item: lengths[item])
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk) - batch_size + 1, batch_size)]
    rng.shuffle(batches)
    return batches


class Batches:
    """Batch number n of an endless sequence, the same in every run: epochs of `bucketed_batches`."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if len(lengths) < batch_size:
            raise ValueError(f"batch size {batch_size} is larger than the data: {len(lengths)} items")
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch, self.current = -1, [[0]]

    def __getitem__(self, number: int) -> list[int]:
        per_epoch = len(bucketed_sizes(len(self.lengths), self.batch_size))
        epoch, place = divmod(number, per_epoch)
        if epoch != self.epoch:
            self.epoch, self.current = epoch, bucketed_batches(self.lengths, self.batch_size, self.seed, epoch)
        return self.current[place]


def bucketed_sizes(items: int, batch_size: int, pool: int = 32) -> range:
    """A range as long as the list that `bucketed_batches` returns."""
    full, rest = divmod(items, batch_size * pool)
    return range(full * pool + rest // batch_size)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads on the left.

    Returns:
        ids and 0/1 mask, int64 [B, L] each.
    """
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def drop_tokens(ids: Sequence[int], probability: float, rng: random.Random) -> list[int]:
    """Leaves out each token with a probability; never all of them."""
    kept = [token for token in ids if rng.random() >= probability]
    return kept or list(ids)


def cloze_pair(ids: Sequence[int], rng: random.Random, keep: float = 0.1) -> tuple[list[int], list[int]]:
    """Inverse cloze task: a span of 5 to 16 tokens as the query, the rest of the text as the passage.

    Args:
        ids: at least 12 token ids.
        rng: source of randomness.
        keep: probability that the passage keeps the span.

    Returns:
        (query ids, passage ids).
    """
    size = min(rng.randint(5, 16), len(ids) // 2)
    start = rng.randrange(len(ids) - size + 1)
    span = list(ids[start : start + size])
    return span, list(ids) if rng.random() < keep else list(ids[:start]) + list(ids[start + size :])
