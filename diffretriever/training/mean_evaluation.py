"""The comparison row of the mean-pooled baseline (DiffEmbed, paper §4.2) on a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..evaluation.runs import write_run
from ..evaluation.small_task import SmallTask
from ..files.lines import read_object
from .adapter_recipe import LENGTHS
from .mean_pooling import MEAN_NAMES, as_diffembed
from .run_record import RUN_FILE


def evaluate_mean_pooling(model: Any, task: SmallTask, run_file: Path | None = None) -> dict[str, Any]:
    """Encode a benchmark by mean pooling and rank by cosine.

    Args:
        model: a DiffRetriever with the adapter that `pooling: mean` has trained, or the untrained backbone.
        task: queries, passages, judgements.
        run_file: TREC run of the best 1000 passages a query.

    Returns:
        {"ndcg@10", "queries", "passages", "max_length"}
    """
    encoder, queries = as_diffembed(model), list(task.benchmark.queries.values())
    searcher = task.searcher(encoder.encode_texts(list(task.passages.values()), False))
    runs = task.runs(searcher, encoder.encode_texts(queries, True), MEAN_NAMES)
    if run_file is not None:
        write_run(run_file, runs["dense"], "mean-pooling")
    sizes = {"queries": len(queries), "passages": len(task.passages)}
    return {"ndcg@10": task.ndcg(runs)["dense"], **sizes, "max_length": model.config.max_length}


def recorded_lengths(adapter: Path) -> dict[str, int]:
    """Return the lengths that a mean-pooled adapter was trained for, as `from_pretrained` takes them.

    Raises:
        FileNotFoundError: no run.json in the folder.
        ValueError: it was trained with masks.
    """
    file = adapter / RUN_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; expected the output folder of `diffretriever train`")
    recipe = read_object(file)["recipe"]
    if recipe["pooling"] != "mean":
        raise ValueError(
            f"{adapter} was trained with pooling: {recipe['pooling']}; build a release of it with publish.py instead"
        )
    return {name: int(recipe[name]) for name in LENGTHS if recipe.get(name) is not None}
