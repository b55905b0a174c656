"""`diffretriever mine-negatives`: passages that look like answers and are not known to be, by BM25 or by a release."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.corpus import read_corpus
from ..data.pair_files import PairFiles
from ..data.texts import text_key
from ..evaluation.bm25 import BM25
from ..files.durable import write_whole
from ..model.scoring import fusion_weight_of
from ..model.tokenization_helpers import without_lone_surrogates
from ..progress import progress_bar
from ..search.searcher import Searcher

BLOCK = 2048  # queries that are ranked at a time
# (queries, how many) -> the texts of each query's best passages, best first
Ranker = Callable[[Sequence[str], int], list[list[str]]]


@dataclass(frozen=True)
class Draws:
    """How negatives are drawn from a query's ranking.

    Args:
        count: negatives a query.
        depth: best passages that are no answers, from which they are drawn.
        skip: leave out the best so many of these: perhaps answers that nobody has marked.
        seed: fixes the draws.

    Raises:
        ValueError: `depth` is less than `skip` + `count`.
    """

    count: int = 15
    depth: int = 100
    skip: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        if self.depth < self.skip + self.count:
            raise ValueError(
                f"--depth {self.depth} leaves fewer than --negatives {self.count} after --skip {self.skip}; raise it"
            )

    def draw(self, ranked: Iterable[str], positives: Sequence[str], number: int) -> list[str]:
        """Draw the negatives of one query.

        Args:
            ranked: passages, best first.
            positives: texts that answer the query; what says the same is never drawn.
            number: the query's.

        Returns:
            Texts by falling rank; fewer than `count` where the ranking is short.
        """
        answers, wrong = set(map(text_key, positives)), dict[str, str]()
        for text in ranked:
            if (key := text_key(text)) and key not in answers:
                wrong.setdefault(key, text)
        kept = list(wrong.values())[: self.depth][self.skip :]
        rng = random.Random(f"{self.seed}-{number}")
        return [kept[place] for place in sorted(rng.sample(range(len(kept)), min(self.count, len(kept))))]


@contextmanager
def passages_of(files: PairFiles) -> Iterator[Path]:
    """Yield a corpus of everything that pairs hold, each text once; the file is gone afterwards."""
    texts = dict.fromkeys(text for item in files for text in (*item.positives, *item.negatives))
    with tempfile.TemporaryDirectory(prefix="diffretriever-") as folder:
        corpus = Path(folder) / "passages.jsonl"
        rows = ({"_id": str(number), "text": text} for number, text in enumerate(texts))
        write_whole(corpus, (json.dumps(row).encode() + b"\n" for row in rows))
        yield corpus


def rank_by_bm25(corpus: str | Path) -> Ranker:
    """Index a corpus, each text once, in memory; passages without any of a query's words are not ranked.

    Raises:
        As `read_corpus` and `BM25`.
    """
    texts = list(dict.fromkeys(passage.text for passage in read_corpus(corpus)))
    index = BM25([str(place) for place in range(len(texts))], texts)

    def rank(queries: Sequence[str], depth: int) -> list[list[str]]:
        return [[texts[place] for place, _ in row] for row in index.rank(queries, depth)]

    return rank


def rank_by_release(model: Any, store: Any, mode: str) -> Ranker:
    """Search a corpus that a release has encoded.

    Args:
        model: the release.
        store: of the corpus, its texts kept.
        mode: scoring mode.

    Raises:
        ValueError: the store keeps no texts.
    """
    searcher = Searcher(store)
    if len(searcher) and searcher.engine.texts([0]) == [None]:
        raise ValueError("the store keeps no texts to draw negatives from; encode the corpus without --no-texts.")

    def rank(queries: Sequence[str], depth: int) -> list[list[str]]:
        found = searcher.search(
            searcher.encode(model, queries, [mode]), mode, depth, fusion_weight=fusion_weight_of(model.config, None)
        ).positions  # [Q, depth], -1 where there is none
        return [[text or "" for text in searcher.engine.texts(row[row >= 0].tolist())] for row in found]

    return rank


def mine_negatives(files: PairFiles, rank: Ranker, out: Path, draws: Draws) -> dict[str, int]:
    """Write the pairs again, with mined negatives in place of their own; the file appears whole or not at all.

    Args:
        files: training pairs.
        rank: finds candidates.
        out: JSONL to write.
        draws: how negatives are drawn from them.

    Returns:
        Numbers of "queries", "negatives" and "queries_without_negatives".
    """
    counts = {"queries": len(files), "negatives": 0, "queries_without_negatives": 0}

    def lines() -> Iterator[bytes]:
        for start in range(0, len(files), BLOCK):
            items = [files[number] for number in range(start, min(start + BLOCK, len(files)))]
            depth = draws.depth + max(len(item.positives) for item in items)
            rankings = rank([item.query for item in items], depth)
            for number, (item, ranked) in enumerate(zip(items, rankings, strict=True), start):
                negatives = draws.draw(ranked, item.positives, number)
                counts["negatives"] += len(negatives)
                counts["queries_without_negatives"] += not negatives
                own = {} if item.identity is None else {"query_id": item.identity}
                record = own | {"query": item.query, "positives": item.positives, "negatives": negatives}
                yield without_lone_surrogates(json.dumps(record, ensure_ascii=False)).encode() + b"\n"
            bar.update(len(items))

    with progress_bar(len(files), "query", "mine") as bar:
        write_whole(out, lines())
    return counts
