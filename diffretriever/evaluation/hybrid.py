"""Fusions: their weights and names, and BM25 beside our modes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .bm25 import BM25, fuse_runs
from .comparisons import BM25_ROW
from .metrics import Qrels, evaluate_run, means
from .runs import Run

EVEN = 0.5
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


def choose_weight(figures: Mapping[float, float]) -> float:
    """Choose the weight with the best figure; of equals the one nearest to 0.5.

    Args:
        figures: {weight: a metric's mean on a split kept for this}.

    >>> choose_weight({0.2: 0.7, 0.4: 0.7, 0.5: 0.6})
    0.4
    """
    return max(figures, key=lambda weight: (figures[weight], -abs(weight - EVEN)))


def best_weight(ours: Run, bm25: Run, qrels: Qrels, metric: Any, depth: int) -> float:
    """Find the weight of ours, in tenths, that is best for the fusion with BM25 on a split kept for this.

    Args:
        ours, bm25: the split's runs.
        qrels: its judgements.
        metric: from `parse_metric`.
        depth: passages a query.
    """
    seen = metric.params.get("cutoff", depth)  # the metric does not see the rest
    runs = ((weight, fuse_runs(ours, bm25, weight, seen)) for weight in WEIGHTS)
    return choose_weight({weight: means(evaluate_run(run, qrels, [metric]))[str(metric)] for weight, run in runs})


def fused_runs(
    ours: Mapping[str, Run], bm25: Run, weights: Mapping[str, Iterable[float]], depth: int
) -> dict[str, Run]:
    """Fuse modes with BM25.

    Args:
        ours: {mode: run}.
        bm25: BM25's run.
        weights: {mode: its weights}.
        depth: passages a query.

    Returns:
        {name: run}, the names by `fused_name`.
    """
    return {
        fused_name(mode, weight): fuse_runs(ours[mode], bm25, weight, depth)
        for mode, chosen in weights.items()
        for weight in chosen
    }


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
