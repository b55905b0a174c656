"""`diffretriever mine-negatives`: passages that look like answers and are not known to be, by BM25 or by a release."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils import logging

from ..data.pair_files import PairFiles
from ..files.lines import read_objects

BLOCK = 2048  # queries that are ranked at a time
COMPILED_FROM = 20_000  # passages from which bm25s is worth compiling, where numba is installed
PASSAGE_BLOCK = 8192  # passages that a release encodes at a time; their vectors are all that is held


class Ranker(Protocol):
    """Finds the passages that match each query best."""

    def top(self, queries: Sequence[str], depth: int) -> list[list[int]]:
        """Returns passage numbers, best first, at most `depth` of them for each query."""


class Bm25Ranker:
    """BM25 (Lucene's formula; k1=0.9, b=0.4; Snowball stemmer, English stopwords).

    Args:
        passages: the texts to rank.

    Raises:
        ImportError: bm25s or PyStemmer is not installed.
    """

    def __init__(self, passages: Sequence[str]) -> None:
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise ImportError(
                'mining with BM25 needs bm25s and PyStemmer: pip install "diffretriever[train]"'
            ) from error
        self._tokenize = bm25s.tokenize
        self._rules = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False}
        backend = "auto" if len(passages) > COMPILED_FROM else "numpy"
        self._index = bm25s.BM25(k1=0.9, b=0.4, method="lucene", backend=backend)
        self._index.index(bm25s.tokenize(list(passages), **self._rules), show_progress=False)
        self._count = len(passages)

    def top(self, queries: Sequence[str], depth: int) -> list[list[int]]:
        """Ranks; passages without any of the query's words are left out."""
        asked = self._tokenize(list(queries), return_ids=False, **self._rules)
        depth = min(depth, self._count)
        found, scores = self._index.retrieve(asked, k=depth, show_progress=False)
        return [
            [number for number, score in zip(row, values, strict=True) if score > 0]
            for row, values in zip(found.tolist(), scores.tolist(), strict=True)
        ]


class ReleaseRanker:
    """A DiffRetriever release, by one of its scores.

    Args:
        model: the release.
        passages: the texts to rank.
        mode: "multi_dense", "single_dense" or "sparse_max"; fused scores depend on the candidates and so on the block.
    """

    def __init__(self, model: Any, passages: Sequence[str], mode: str = "multi_dense") -> None:
        self.model, self.passages, self.mode = model, passages, mode

    def top(self, queries: Sequence[str], depth: int) -> list[list[int]]:
        """Ranks, a block of passages after the other."""
        sparse = self.mode == "sparse_max"
        asked = self.model.encode_texts(list(queries), True, compute_sparse=sparse)
        best = torch.empty(len(queries), 0)
        numbers = torch.empty(len(queries), 0, dtype=torch.long)
        for start in range(0, len(self.passages), PASSAGE_BLOCK):
            block = list(self.passages[start : start + PASSAGE_BLOCK])
            scores = self.model.score(asked, self.model.encode_texts(block, False, compute_sparse=sparse), self.mode)
            best = torch.cat([best, scores], dim=1)
            numbers = torch.cat([numbers, torch.arange(start, start + len(block)).expand(len(queries), -1)], dim=1)
            best, places = best.topk(min(depth, best.shape[1]), dim=1)
            numbers = numbers.gather(1, places)
        return numbers.tolist()


def collect_passages(files: PairFiles, corpus: Path | None) -> list[str]:
    """The passages to mine from, each text once: a corpus, or else everything that the pairs hold.

    Args:
        files: training pairs.
        corpus: JSONL of {"text"} and perhaps {"title"}.

    Raises:
        ValueError: a line of the corpus has no text; names file and line.
    """
    return list(dict.fromkeys(_corpus_texts(corpus) if corpus is not None else _pair_texts(files)))


def _pair_texts(files: PairFiles) -> Iterator[str]:
    for item in files:
        yield from item.positives
        yield from item.negatives


def _corpus_texts(corpus: Path) -> Iterator[str]:
    for number, record in read_objects(corpus):
        text = record.get("text")
        if not isinstance(text, str):
            raise ValueError(f"{corpus}, line {number}: 'text' is missing or not a text")
        if joined := f"{record.get('title') or ''} {text}".strip():
            yield joined


def choose_negatives(
    ranked: Iterable[int], passages: Sequence[str], positives: Sequence[str], count: int, skip: int, rng: random.Random
) -> list[str]:
    """Draws negatives from one query's ranking.

    Args:
        ranked: passage numbers, best first.
        passages: their texts.
        positives: texts that answer the query; never drawn.
        count: how many to draw.
        skip: leave out the best so many, which may be answers that nobody has marked.
        rng: source of randomness.

    Returns:
        Texts by falling rank; fewer than `count` where the ranking is short.
    """
    known = set(positives)
    wrong = [number for number in ranked if passages[number] not in known][skip:]
    chosen = sorted(rng.sample(range(len(wrong)), min(count, len(wrong))))
    return [passages[wrong[place]] for place in chosen]


def mine_negatives(
    files: PairFiles, passages: Sequence[str], ranker: Ranker, out: Path, count: int, depth: int, skip: int, seed: int
) -> dict[str, int]:
    """Writes the pairs again, with mined negatives in place of their own; the file appears whole or not at all.

    Args:
        files: training pairs.
        passages: what the ranker's numbers stand for.
        ranker: finds candidates.
        out: JSONL to write.
        count: negatives a query.
        depth: candidates a query, from which the negatives are drawn.
        skip: best candidates to leave out.
        seed: fixes the draws.

    Returns:
        Numbers of "queries", "negatives" and "queries_without_negatives".

    Raises:
        ValueError: `depth` is less than `skip` + `count`.
    """
    if depth < skip + count:
        raise ValueError(f"--depth {depth} leaves fewer than --negatives {count} after --skip {skip}; raise it")
    counts = {"queries": len(files), "negatives": 0, "queries_without_negatives": 0}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    most = max(len(item.positives) for item in files)
    with partial.open("w", encoding="utf-8") as lines, logging.tqdm(total=len(files), unit="query") as bar:
        for start in range(0, len(files), BLOCK):
            items = [files[number] for number in range(start, min(start + BLOCK, len(files)))]
            rankings = ranker.top([item.query for item in items], depth + most)
            for number, (item, ranked) in enumerate(zip(items, rankings, strict=True), start):
                rng = random.Random(f"{seed}-{number}")
                kept = [place for place in ranked if passages[place] not in item.positives][:depth]
                negatives = choose_negatives(kept, passages, item.positives, count, skip, rng)
                counts["negatives"] += len(negatives)
                counts["queries_without_negatives"] += not negatives
                own = {} if item.identity is None else {"query_id": item.identity}
                record = own | {"query": item.query, "positives": item.positives, "negatives": negatives}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            bar.update(len(items))
    os.replace(partial, out)
    return counts
