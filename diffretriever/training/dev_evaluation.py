"""nDCG@10 on a development split, along the way and at the end of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .adapter_recipe import AdapterRecipe
from .candidates import world
from .evaluate import Benchmark, Vectors, ndcg_at_10, rankings, read_benchmark
from .losses import maxsim
from .mean_pooling import encode_mean


def mask_ndcg(model: Any, benchmark: Benchmark) -> dict[str, float]:
    """nDCG@10 of a DiffRetriever: dense (MaxSim), sparse, fused."""

    def encode(texts: Sequence[str], is_query: bool) -> Vectors:
        out = model.encode_texts(texts, is_query)
        return Vectors(out["repr_hidden"], out["sparse_indices"], out["sparse_values"])

    sides = encode(benchmark.queries, True), encode(benchmark.passages, False)
    scores = rankings(*sides, model.config.vocab_size)
    return {mode: _ndcg(found, benchmark) for mode, found in scores.items()}


def mean_ndcg(model: Any, benchmark: Benchmark) -> dict[str, float]:
    """nDCG@10 of the mean-pooled baseline, which has a dense side only."""
    return {"dense": _ndcg(mean_scores(model, benchmark), benchmark)}


def mean_scores(model: Any, benchmark: Benchmark) -> torch.Tensor:
    """Cosines of mean-pooled vectors, [Q, P]."""
    queries, passages = encode_mean(model, benchmark.queries, True), encode_mean(model, benchmark.passages, False)
    return maxsim(queries, passages)


def _ndcg(scores: torch.Tensor, benchmark: Benchmark) -> float:
    return ndcg_at_10(scores, benchmark.query_ids, benchmark.passage_ids, benchmark.qrels)


class DevEvaluation(TrainerCallback):
    """Evaluates every `eval_steps` steps and after the last one; the figures go to the log.

    Args:
        trainer: logs, and holds the model.
        folder: BEIR layout with a dev split.
        recipe: eval_steps, eval_passages, pooling.
    """

    def __init__(self, trainer: Any, folder: Path, recipe: AdapterRecipe) -> None:
        self.trainer, self.recipe = trainer, recipe
        self.benchmark = read_benchmark(folder, "dev", recipe.eval_passages)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluates where it is time."""
        every = self.recipe.eval_steps
        due = (every and state.global_step % every == 0) or state.global_step == state.max_steps
        if due and world()[0] == 0:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model).retriever
            model.eval()
            evaluate = mean_ndcg if self.recipe.pooling == "mean" else mask_ndcg
            figures = evaluate(model, self.benchmark)
            self.trainer.log({f"dev_{mode}_ndcg@10": round(value, 4) for mode, value in figures.items()})
