"""Figures of releases on a BEIR-style folder: `python -m diffretriever.training.report --data FOLDER RELEASE ...`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from .data import WordIds
from .evaluate import Benchmark, Vectors, ndcg_at_10, rankings, read_benchmark


def bm25_scores(benchmark: Benchmark) -> torch.Tensor:
    """BM25 (lucene, k1=0.9, b=0.4, Snowball stemmer, English stopwords): scores [Q, P].

    Raises:
        ImportError: if bm25s or PyStemmer is not installed.
    """
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise ImportError("the BM25 row needs bm25s and PyStemmer: pip install bm25s PyStemmer") from error
    index, stemmer = bm25s.BM25(k1=0.9, b=0.4, method="lucene"), Stemmer.Stemmer("english")
    rules = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    index.index(bm25s.tokenize(benchmark.passages, **rules), show_progress=False)
    asked = bm25s.tokenize(benchmark.queries, return_ids=False, **rules)
    return torch.stack([torch.as_tensor(index.get_scores(words)) for words in asked])


def few_shared_words(benchmark: Benchmark, tokenizer: Any, share: float = 0.34) -> list[int]:
    """Numbers of the queries of whose content tokens at most a share occurs in the judged passages."""
    words, place = WordIds(tokenizer), {name: number for number, name in enumerate(benchmark.passage_ids)}
    few = []
    for number, (name, text) in enumerate(zip(benchmark.query_ids, benchmark.queries, strict=True)):
        own = set(words(text))
        found = {
            token
            for passage in benchmark.qrels[name]
            if passage in place
            for token in words(benchmark.passages[place[passage]])
        }
        if own and len(own & found) <= share * len(own):
            few.append(number)
    return few


def release_scores(model: Any, benchmark: Benchmark, weight: float) -> dict[str, torch.Tensor]:
    """Dense, sparse and fused scores [Q, P] of one release."""
    sides = []
    for texts, is_query in ((benchmark.queries, True), (benchmark.passages, False)):
        out = model.encode_texts(texts, is_query)
        sides.append(Vectors(out["repr_hidden"], out["sparse_indices"], out["sparse_values"]))
    return rankings(sides[0], sides[1], model.config.backbone_config.vocab_size, weight)


def row(name: str, scores: dict[str, torch.Tensor], benchmark: Benchmark, few: Sequence[int], seconds: float) -> str:
    """One line of the Markdown table."""
    cells = []
    for chosen in (range(len(benchmark.queries)), few):
        ids = [benchmark.query_ids[n] for n in chosen]
        for value in scores.values():
            if not ids:
                cells.append("-")
                continue
            cells.append(f"{ndcg_at_10(value[list(chosen)], ids, benchmark.passage_ids, benchmark.qrels):.3f}")
    return f"| {name} | {' | '.join(cells)} | {seconds:.0f} s |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="nDCG@10 of releases on a BEIR-style folder")
    parser.add_argument("releases", nargs="*", help="release folders; FOLDER:K reads a zero-shot release with K masks")
    parser.add_argument("--data", type=Path, required=True, help="corpus.jsonl, queries.jsonl, qrels/<split>.tsv")
    parser.add_argument("--split", default="test")
    parser.add_argument("--weight", type=float, default=0.5, help="of the dense score in the fusion")
    parser.add_argument("--passages", type=int, help="only so many passages, the judged ones among them")
    parser.add_argument("--bm25", action="store_true", help="add a row for BM25")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    benchmark = read_benchmark(options.data, options.split, options.passages)
    few: list[int] = []
    for number, release in enumerate(options.releases):
        folder, _, masks = release.partition(":")
        settings = {"num_query_masks": int(masks), "num_passage_masks": int(masks)} if masks else {}
        model: Any = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **settings)
        if number == 0:
            few = few_shared_words(benchmark, model.tokenizer)
            sizes = len(benchmark.passages), len(benchmark.queries), len(few)
            print("{} passages, {} queries, {} with few shared words".format(*sizes))
            print("| release | dense | sparse | fused | few: dense | few: sparse | few: fused | time |", flush=True)
        started = time.monotonic()
        scores = release_scores(model, benchmark, options.weight)
        print(row(release, scores, benchmark, few, time.monotonic() - started), flush=True)
    if options.bm25:
        print(row("BM25", {"bm25": bm25_scores(benchmark)}, benchmark, few, 0.0), flush=True)


if __name__ == "__main__":
    main()
