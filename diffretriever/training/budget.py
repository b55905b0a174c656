"""`diffretriever select-budget`: which (K_q, K_p) ranks queries best by the fused score (paper §4.4)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.benchmark import Benchmark
from ..data.pair_files import PairFiles
from ..evaluation.metrics import means
from ..evaluation.small_task import METRIC, SmallTask
from ..model.query_budgets import query_features

BUDGETS = (1, 2, 4, 8, 16)


def training_task(files: PairFiles, queries: int, passages: int, seed: int) -> SmallTask:
    """Make a small retrieval task of training data.

    Args:
        files: training pairs.
        queries: how many to draw.
        passages: size of the collection: the drawn queries' positives and negatives, then other queries' positives.
        seed: fixes the draws.

    Returns:
        Queries, passages (each text once) and judgements: a query's positives have grade 1.

    Raises:
        ValueError: there are fewer queries than are to be drawn.
    """
    if queries > len(files):
        raise ValueError(f"--num-queries {queries} is more than the {len(files)} queries of {', '.join(files.names)}")
    order = list(range(len(files)))
    random.Random(seed).shuffle(order)
    drawn = [files[number] for number in order[:queries]]
    texts = dict.fromkeys(text for item in drawn for text in item.positives)
    for item in drawn:
        texts |= dict.fromkeys(item.negatives)
    for number in order[queries:]:
        if len(texts) >= passages:
            break
        texts |= dict.fromkeys(files[number].positives)
    names = {text: str(place) for place, text in enumerate(texts)}
    qrels = {str(place): {names[text]: 1 for text in item.positives} for place, item in enumerate(drawn)}
    asked = {str(place): item.query for place, item in enumerate(drawn)}
    benchmark = Benchmark(Path(files.names[0]), "train", asked, qrels, relevance_level=1, own_ids_count=True)
    return SmallTask(benchmark, {name: text for text, name in names.items()})


def sweep(
    model: Any, task: SmallTask, budgets: Sequence[int] = BUDGETS, passage_budgets: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Evaluate every pair of budgets; each side is encoded once for each K.

    Args:
        model: a zero-shot DiffRetriever; its prompts must follow its budgets.
        task: queries, passages, judgements.
        budgets: values of K_q and of K_p.
        passage_budgets: other values of K_p.

    Returns:
        {"num_query_masks", "num_passage_masks", "dense", "sparse", "fused", "per_query"} with nDCG@10, for each pair;
        `per_query` is {"dense", "sparse", "fused": {query id: nDCG@10}}.
    """
    queries = {k_q: encode_with(model, task.benchmark.queries, True, k_q) for k_q in budgets}
    grid = []
    for k_p in passage_budgets or budgets:  # the passages of one K_p are held at a time
        searcher = task.searcher(encode_with(model, task.passages, False, k_p))
        for k_q in budgets:
            values = task.ndcg_per_query(task.runs(searcher, queries[k_q]))
            grid.append({"num_query_masks": k_q, "num_passage_masks": k_p, **means(values), "per_query": values})
    return sorted(grid, key=lambda cell: (cell["num_query_masks"], cell["num_passage_masks"]))


def encode_with(model: Any, texts: Mapping[str, str], is_query: bool, masks: int) -> Mapping[str, Any]:
    """Encode one side with K masks, under the prompt that belongs to K; a release's own table is left aside."""
    changes: dict[str, int | None] = {"num_query_masks" if is_query else "num_passage_masks": masks}
    changes |= {"query_budget_table": None} if hasattr(model.config, "query_budget_table") else {}
    before = {field: getattr(model.config, field) for field in changes}
    for field, value in changes.items():
        setattr(model.config, field, value)
    try:
        encoded: Mapping[str, Any] = model.encode_texts(list(texts.values()), is_query)
    finally:
        for field, value in before.items():
            setattr(model.config, field, value)
    return encoded


def choose(grid: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the cell with the best fused score; of equal ones that with the fewest masks, passages' first.

    >>> cells = [(4, 4, 0.7), (4, 1, 0.7), (1, 1, 0.6)]
    >>> choose([dict(zip(("num_query_masks", "num_passage_masks", "fused"), cell)) for cell in cells])
    {'num_query_masks': 4, 'num_passage_masks': 1, 'fused': 0.7}
    """
    return min(grid, key=lambda cell: (-cell["fused"], cell["num_passage_masks"], cell["num_query_masks"]))


def table(grid: Sequence[dict[str, Any]], mode: str = "fused") -> str:
    """Return the grid as text: a row for each K_q, a column for each K_p."""
    columns = sorted({cell["num_passage_masks"] for cell in grid})
    lines = [f"{mode:>8}" + "".join(f"  K_p={k_p:<3}" for k_p in columns)]
    for k_q in sorted({cell["num_query_masks"] for cell in grid}):
        row = {cell["num_passage_masks"]: cell[mode] for cell in grid if cell["num_query_masks"] == k_q}
        lines.append(f"{f'K_q={k_q}':<8}" + "".join(f"  {row[k_p]:7.4f}" for k_p in columns))
    return "\n".join(lines)


def select_budget(model: Any, task: SmallTask, budgets: Sequence[int] = BUDGETS) -> dict[str, Any]:
    """Sweep a zero-shot model over the budgets.

    Args:
        model: a DiffRetriever whose prompts follow its budgets.
        task: from `training_task`, or `read_small_task`.
        budgets: values of K_q and of K_p.

    Returns:
        {"metric", "fusion", "queries", "passages", "grid": [...], "choice": {...}, "query_features": {query id: …}}

    Raises:
        ValueError: its prompts are fixed, as those of trained releases are.
    """
    if model.config.query_prompt is not None or model.config.passage_prompt is not None:
        raise ValueError(
            f"{model.config.name_or_path} has fixed prompts, so it was made for one budget; give a zero-shot release "
            "(publish.py build without --adapter)"
        )
    grid = sweep(model, task, budgets)
    return describe_sweep(model, task, grid, choose(grid))


def describe_sweep(
    model: Any, task: SmallTask, grid: Sequence[dict[str, Any]], choice: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a sweep's cells with what else `analyze-budget` reads; arguments and returns as for `select_budget`."""
    texts = task.benchmark.queries
    prepared = model.texts.prepare(list(texts.values()), True, content_filter=False)
    return {
        "metric": METRIC,
        "fusion": task.fusion,
        "queries": len(texts),
        "passages": len(task.passages),
        "grid": grid,
        "choice": {name: value for name, value in choice.items() if name != "per_query"},
        "query_features": {query: query_features(text.text_ids) for query, text in zip(texts, prepared, strict=True)},
    }
