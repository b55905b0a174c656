"""Fusions: their names, their weights, and BM25 beside our modes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from ..data.benchmark import Benchmark
from ..model.scoring import EVEN_FUSION, check_weight, fuse
from ..search.searcher import Searcher
from .bm25 import BM25
from .comparisons import BM25_ROW
from .metrics import Qrels, evaluate_run, means
from .runs import Run, ranking
from .searching import judged_part, ranked_windows, reach

WEIGHTS = tuple(step / 10 for step in range(11))


def fused_name(mode: str, weight: float) -> str:
    """Name a fusion with BM25 by our mode and its weight.

    >>> fused_name("multi_dense", 0.5)
    'multi_dense+bm25@0.5'
    """
    return f"{mode}+{BM25_ROW}@{weight:g}"


def tuned_name(mode: str, weight: float) -> str:
    """Name a fusion mode whose dense weight was chosen.

    >>> tuned_name("fusion_multi_sparse_max", 0.3)
    'fusion_multi_sparse_max@0.3'
    """
    return f"{mode}@{weight:g}"


def fuse_runs(
    first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]], weight: float, depth: int
) -> Run:
    """Fuse two runs as the method fuses its two sides (paper Eq. 4).

    The candidates are the union of both rankings; one that a ranking does not hold gets that ranking's lowest, 0.

    Args:
        first, second: {query id: {passage id: score}}.
        weight: the first run's share, 0 to 1.
        depth: passages kept a query.

    Returns:
        {query id: {passage id: score in [0, 1]}}, best first, the queries of both.

    Raises:
        ValueError: the weight is outside 0 to 1.

    >>> fuse_runs({"q": {"a": 3.0, "b": 1.0}}, {"q": {"b": 9.0, "c": 7.0}}, 0.25, depth=10)
    {'q': {'b': 0.75, 'a': 0.25, 'c': 0.0}}
    """
    check_weight(weight)
    fused: Run = {}
    for query in dict.fromkeys([*first, *second]):  # in order, where a set would have none
        rows = [first.get(query, {}), second.get(query, {})]
        passages = list(dict.fromkeys([*rows[0], *rows[1]]))
        one, other = torch.tensor(
            [[row.get(name, -torch.inf) for name in passages] for row in rows], dtype=torch.float64, device="cpu"
        )
        scores = zip(passages, fuse(one, other, weight).tolist(), strict=True)
        fused[query] = dict(ranking(dict(scores))[:depth])
    return fused


def choose_weight(figures: Mapping[float, float]) -> float:
    """Choose the weight with the best figure; of equals the one nearest to 0.5.

    Args:
        figures: {weight: a metric's mean on a split kept for this}.

    >>> choose_weight({0.2: 0.7, 0.4: 0.7, 0.5: 0.6})
    0.4
    """
    return max(figures, key=lambda weight: (figures[weight], -abs(weight - EVEN_FUSION)))


def tune_modes(
    model: Any, searcher: Searcher, tuning: Benchmark, modes: Sequence[str], metric: Any, depth: int
) -> dict[str, float]:
    """Find the weight of the dense scores, in tenths, that is best for each fusion mode.

    Args:
        model: encodes the queries.
        searcher: over the passages.
        tuning: a split kept for this.
        modes: fusion modes.
        metric: from `parse_metric`.
        depth: candidates of each side.

    Returns:
        {mode: weight}.
    """
    if not modes:
        return {}
    seen = metric.params.get("cutoff", depth)  # what the metric does not see need not be ranked
    values: dict[str, dict[float, list[float]]] = {mode: {weight: [] for weight in WEIGHTS} for mode in modes}
    for queries, ranked in ranked_windows(model, searcher, tuning, modes, depth):
        qrels = {query: tuning.qrels[query] for query in queries}
        for mode in modes:
            sides = ranked.sides(mode)
            for weight in WEIGHTS:
                run = judged_part(sides.fuse(weight, reach(tuning, seen)).run(queries), tuning, seen)
                values[mode][weight] += evaluate_run(run, qrels, [metric])[str(metric)].values()
    figures = {mode: {weight: fmean(each) for weight, each in found.items()} for mode, found in values.items()}
    return {mode: choose_weight(found) for mode, found in figures.items()}


def tune_bm25(ours: Run, bm25: Run, qrels: Qrels, metric: Any, depth: int) -> float:
    """Find the weight of ours, in tenths, that is best for the fusion with BM25 on a split kept for this.

    Args:
        ours, bm25: the split's runs.
        qrels: its judgements.
        metric: from `parse_metric`.
        depth: passages a query.
    """
    seen = metric.params.get("cutoff", depth)
    runs = ((weight, fuse_runs(ours, bm25, weight, seen)) for weight in WEIGHTS)
    return choose_weight({weight: means(evaluate_run(run, qrels, [metric]))[str(metric)] for weight, run in runs})


def index_of(passages: Iterable[Any]) -> BM25:
    """Index a corpus (`read_corpus`), titles included."""
    ids: list[str] = []
    texts: list[str] = []
    for passage in passages:
        ids.append(passage.id)
        texts.append(passage.text)
    return BM25(ids, texts)


def modes_to_fuse(modes: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """Return the modes to fuse with BM25: those asked for, else multi_dense, with BM25 as its lexical side.

    Raises:
        ValueError: a mode that is not evaluated.
    """
    if asked is None:
        return [mode for mode in modes if mode in ("multi_dense", "fusion_multi_sparse_max")] or list(modes[-1:])
    for mode in asked:
        if mode not in modes:
            raise ValueError(f"--bm25-with {mode}: this mode is not evaluated; the modes are {', '.join(modes)}.")
    return list(asked)
