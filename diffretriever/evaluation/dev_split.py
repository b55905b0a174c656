"""nDCG@10 on a part of a benchmark that is small enough to be encoded along the way of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.benchmark import read_benchmark
from ..data.corpus import read_corpus
from ..search.searcher import Searcher
from .metrics import evaluate_run, means, parse_metric
from .searching import judged_part, reach

DEV_MODES = {"dense": "multi_dense", "sparse": "sparse_max", "fused": "fusion_multi_sparse_max"}
# (texts, whether they are queries) -> vectors, as `encode_texts` gives them
Encode = Callable[[Sequence[str], bool], Mapping[str, Any]]


class DevSplit:
    """A split's judged queries, and passages to find among.

    Args:
        folder: a benchmark, see `read_benchmark`.
        split: its name, e.g. "dev".
        limit: keep the judged passages and the first ones up to this number; None keeps all.

    Raises:
        FileNotFoundError, ValueError: as `read_benchmark` and `read_corpus`.
    """

    def __init__(self, folder: str | Path, split: str, limit: int | None = None) -> None:
        self.benchmark = read_benchmark(folder, split)
        passages = {passage.id: passage.text for passage in read_corpus(folder)}
        judged = {passage for grades in self.benchmark.qrels.values() for passage in grades} & passages.keys()
        others = [name for name in passages if name not in judged]
        room = None if limit is None else max(limit - len(judged), 0)
        kept = judged.union(others[:room])
        self.passages = {name: text for name, text in passages.items() if name in kept}

    def ndcg(self, encode: Encode, modes: Mapping[str, str] = DEV_MODES) -> dict[str, float]:
        """Encode both sides and return {name: nDCG@10}.

        Args:
            encode: a model's `encode_texts`, or what stands for it.
            modes: {name: scoring mode}.
        """
        benchmark, metric = self.benchmark, parse_metric("nDCG@10")
        searcher = Searcher(encode(list(self.passages.values()), False), ids=list(self.passages))
        ranked = searcher.rank(encode(list(benchmark.queries.values()), True))
        found = {}
        for name, mode in modes.items():
            run = judged_part(ranked.results(mode, reach(benchmark, 10)).run(list(benchmark.queries)), benchmark, 10)
            (found[name],) = means(evaluate_run(run, benchmark.qrels, [metric])).values()
        return found
