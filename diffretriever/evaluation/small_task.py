"""nDCG@10 on retrieval tasks that are small enough to be encoded in memory, as along the way of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.benchmark import Benchmark, note_unknown_passages, read_benchmark
from ..data.corpus import read_small_corpus
from ..model.scoring import fusion_weight_of
from ..search.modes import SPARSE
from ..search.searcher import Searcher
from .metrics import evaluate_run, means, parse_metric
from .runs import Run
from .searching import judged_part, reach

METRIC = "nDCG@10"
DEPTH = 1000  # passages a query, and candidates of each side in the fusion modes, as in `evaluate`
# What the figures are called: the scoring mode that they are of.
NAMES = {"dense": "multi_dense", "sparse": "sparse_max", "fused": "fusion_multi_sparse_max"}
# (texts, whether they are queries) -> vectors, as `encode_texts` gives them
Encode = Callable[[Sequence[str], bool], Mapping[str, Any]]


def names_of(model: Any) -> dict[str, str]:
    """Return those of NAMES that a model has the vectors for."""
    return {name: mode for name, mode in NAMES.items() if mode not in SPARSE or model.config.sparse_top_k}


@dataclass(frozen=True)
class SmallTask:
    """Judged queries, and passages to find among.

    Args:
        benchmark: the queries and their judgements.
        passages: {passage id: text}.
        fusion: how the fused score fuses, see `Searcher`.
        fusion_weight: the dense scores' share of it; None is half.
    """

    benchmark: Benchmark
    passages: dict[str, str]
    fusion: str = "exact"
    fusion_weight: float | None = None

    def evaluate(self, encode: Encode, names: Mapping[str, str] = NAMES) -> dict[str, float]:
        """Encode both sides and return {name: nDCG@10}.

        Args:
            encode: a model's `encode_texts`, or what stands for it.
            names: {name: scoring mode}.
        """
        searcher = self.searcher(encode(list(self.passages.values()), False))
        return self.ndcg(self.runs(searcher, encode(list(self.benchmark.queries.values()), True), names))

    def searcher(self, passages: Mapping[str, Any]) -> Searcher:
        """Return a searcher over the encoded passages."""
        return Searcher(passages, ids=list(self.passages), fusion=self.fusion)

    def runs(self, searcher: Searcher, queries: Mapping[str, Any], names: Mapping[str, str] = NAMES) -> dict[str, Run]:
        """Search the encoded queries and return {name: run}, under the benchmark's rule for own ids.

        Args:
            searcher: over the passages.
            queries: their vectors.
            names: {name: scoring mode}.
        """
        benchmark, depth = self.benchmark, reach(self.benchmark, DEPTH)
        ranked, weight = searcher.rank(queries, depth), fusion_weight_of(None, self.fusion_weight)
        return {
            name: judged_part(ranked.results(mode, depth, weight).run(list(benchmark.queries)), benchmark, DEPTH)
            for name, mode in names.items()
        }

    def ndcg(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Return {name: nDCG@10} of {name: run}; a query without a relevant passage counts 0, as in trec_eval."""
        return means(self.ndcg_per_query(runs))

    def ndcg_per_query(self, runs: Mapping[str, Run]) -> dict[str, dict[str, float]]:
        """Return {name: {query id: nDCG@10}} of {name: run}."""
        metric, qrels = parse_metric(METRIC), self.benchmark.qrels
        return {name: evaluate_run(run, qrels, [metric])[METRIC] for name, run in runs.items()}


def read_small_task(folder: str | Path, split: str, limit: int | None = None) -> SmallTask:
    """Read a split of a benchmark, and its corpus or a part of it.

    Args:
        folder: a benchmark, see `read_benchmark`.
        split: its name, e.g. "dev".
        limit: keep the judged passages and the first others up to this number; None keeps all.

    Raises:
        FileNotFoundError, ValueError: as `read_benchmark` and `read_small_corpus`.
        ImportError: a package for metrics is not installed.
    """
    parse_metric(METRIC)  # what is not installed is missed now, not when hours of training are done
    benchmark = read_benchmark(folder, split)
    judged = {passage for grades in benchmark.qrels.values() for passage in grades}
    passages: dict[str, str] = {}
    others: list[str] = []
    for passage in read_small_corpus(folder):
        if passage.id not in judged:
            if len(others) == limit:
                continue
            others.append(passage.id)
        passages[passage.id] = passage.text
    if limit is not None:
        for name in others[max(limit - (len(passages) - len(others)), 0) :]:
            del passages[name]
    note_unknown_passages(benchmark, passages.keys())
    return SmallTask(benchmark, passages)
