"""The comparison row of the mean-pooled baseline (DiffEmbed, paper §4.2) on a BEIR-style folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .dev_evaluation import mean_scores
from .evaluate import Benchmark, ndcg_at_10
from .run_record import RUN_FILE


def evaluate_mean_pooling(model: Any, benchmark: Benchmark, run_file: Path | None = None) -> dict[str, Any]:
    """Encode a benchmark by mean pooling and rank by cosine.

    Args:
        model: a DiffRetriever with the adapter that `pooling: mean` has trained, or the untrained backbone.
        benchmark: queries, passages, judgements.
        run_file: TREC run of the best 1000 passages a query.

    Returns:
        {"ndcg@10", "queries", "passages", "max_length"}
    """
    scores = mean_scores(model, benchmark)
    if run_file is not None:
        write_run(scores, benchmark, run_file)
    figure = ndcg_at_10(scores, benchmark.query_ids, benchmark.passage_ids, benchmark.qrels)
    sizes = {"queries": len(benchmark.queries), "passages": len(benchmark.passages)}
    return {"ndcg@10": figure, **sizes, "max_length": model.config.max_length}


def recorded_length(adapter: Path) -> int:
    """The max_length that a mean-pooled adapter was trained for.

    Raises:
        FileNotFoundError: no run.json in the folder.
        ValueError: it was trained with masks.
    """
    file = adapter / RUN_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; expected the output folder of `diffretriever train`")
    recipe = json.loads(file.read_text(encoding="utf-8"))["recipe"]
    if recipe["pooling"] != "mean":
        raise ValueError(
            f"{adapter} was trained with pooling: {recipe['pooling']}; build a release of it with publish.py instead"
        )
    return int(recipe["max_length"])


def write_run(scores: torch.Tensor, benchmark: Benchmark, file: Path, depth: int = 1000) -> None:
    """Writes a ranking in TREC's format: query Q0 passage rank score name."""
    values, places = scores.topk(min(depth, scores.shape[1]), dim=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for query, row, numbers in zip(benchmark.query_ids, values.tolist(), places.tolist(), strict=True):
            for rank, (score, number) in enumerate(zip(row, numbers, strict=True), start=1):
                lines.write(f"{query} Q0 {benchmark.passage_ids[number]} {rank} {score:.6f} mean-pooling\n")
