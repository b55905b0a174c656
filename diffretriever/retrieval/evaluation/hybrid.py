"""BM25 beside our modes, and fused with them."""

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


def choose_weight(ours: Run, bm25: Run, qrels: Qrels, metric: Any, depth: int) -> float:
    """Find the weight of ours, in tenths, that is best on a split kept for this; of equals the one nearest to 0.5.

    Args:
        ours, bm25: the split's runs.
        qrels: its judgements.
        metric: from `parse_metric`.
        depth: passages a query.
    """
    scores = {}
    for weight in WEIGHTS:
        run = fuse_runs(ours, bm25, weight, depth)
        scores[weight] = means(evaluate_run(run, qrels, [metric]))[str(metric)]
    return max(WEIGHTS, key=lambda weight: (scores[weight], -abs(weight - EVEN)))


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
