"""`diffretriever select-budget --adaptive`: K_q of each query by a table of its length and entropy (paper §6.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..evaluation.budget_analysis import sweep_of
from ..evaluation.budget_table import compare, learn_table
from ..evaluation.small_task import SmallTask
from .budget import BUDGETS, describe_sweep, encode_with, sweep

MODE = "fused"  # the score that the table is learned by, as budgets are chosen (paper §4.4)


def held_apart(training: SmallTask, dev: SmallTask) -> SmallTask:
    """Return the training task without the queries that dev asks, too, whatever case and blanks they are written with.

    Raises:
        ValueError: no query is left.
    """

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    asked = {plain(text) for text in dev.benchmark.queries.values()}
    queries = {query: text for query, text in training.benchmark.queries.items() if plain(text) not in asked}
    if not queries:
        raise ValueError("all training queries are dev's, too; a table must be learned on others than it is shown on.")
    qrels = {query: training.benchmark.qrels[query] for query in queries}
    return replace(training, benchmark=replace(training.benchmark, queries=queries, qrels=qrels))


def learn_budgets(model: Any, training: SmallTask, dev: SmallTask, budgets: Sequence[int] = BUDGETS) -> dict[str, Any]:
    """Learn a table of K_q on training queries, and compare it on dev with the fixed K_q; K_p stays the model's.

    Args:
        model: a DiffRetriever without a table, zero-shot or trained. On dev it encodes with the table, queries of
            different K_q in one batch.
        training: of which `held_apart` leaves out what is dev's.
        dev: the queries to show the table on.
        budgets: values of K_q to try beside the model's own.

    Returns:
        The sweep of the training queries, as `select_budget` returns it with the fixed budget as the choice, and with
        "table" and "dev": {"queries", "passages", "modes": {mode: {"fixed", "score", "difference", "p", "budgets",
        "per_query": {"fixed", "score"}}}}; the difference is the table's from the fixed budget, p that of a paired
        t-test.

    Raises:
        ValueError: fewer than two queries in dev, or no training query that is not dev's.
    """
    training = held_apart(training, dev)
    fixed = model.config.num_query_masks, model.config.num_passage_masks
    grid = sweep(model, training, sorted({*budgets, fixed[0]}), [fixed[1]])
    found = describe_sweep(model, training, grid, next(cell for cell in grid if cell["num_query_masks"] == fixed[0]))
    table = learn_table(sweep_of(found, "the training queries"), MODE, fixed)
    return {**found, "table": table, "dev": show_table(model, dev, table)}


def show_table(model: Any, dev: SmallTask, table: dict[str, Any]) -> dict[str, Any]:
    """Compare a table with the fixed K_q on dev; see `learn_budgets`. The model's config is left as it was."""
    searcher = dev.searcher(model.encode_texts(list(dev.passages.values()), False))
    texts = list(dev.benchmark.queries.values())
    fixed = dev.ndcg_per_query(
        dev.runs(searcher, encode_with(model, dev.benchmark.queries, True, model.config.num_query_masks))
    )
    model.config.query_budget_table = table
    try:
        encoded = model.encode_texts(texts, True)
    finally:
        model.config.query_budget_table = None
    scores = dev.ndcg_per_query(dev.runs(searcher, encoded))
    chosen = dict(zip(dev.benchmark.queries, encoded["repr_mask"].sum(dim=1).tolist(), strict=True))
    modes = {}
    for mode, row in scores.items():
        mean = sum(fixed[mode].values()) / len(fixed[mode])
        per_query = {"fixed": fixed[mode], "score": row}
        modes[mode] = {"fixed": mean, **compare(row, fixed[mode], chosen), "per_query": per_query}
    return {"queries": len(texts), "passages": len(dev.passages), "modes": modes}


def to_text(found: dict[str, Any]) -> str:
    """Return what `learn_budgets` found on dev for the terminal, and whether the table beats the fixed budget."""
    dev = found["dev"]
    lines = [f"dev: {found['metric']} of {dev['queries']} queries on {dev['passages']} passages"]
    lines.append(f"{'':<8}{'fixed':>10}{'table':>10}{'difference':>12}{'p':>9}")
    for mode, row in dev["modes"].items():
        figures = f"{row['fixed']:10.4f}{row['score']:10.4f}{row['difference']:+12.4f}{row['p']:9.2g}"
        lines.append(f"{mode:<8}{figures}")
    row = dev["modes"][MODE]
    used = ", ".join(f"{count} with {k_q}" for k_q, count in row["budgets"].items())
    lines.append(f"queries by K_q: {used}")
    better = row["difference"] > 0 and row["p"] < 0.05
    verdict = "beats" if better else "does not beat"
    lines.append(f"The table {verdict} the fixed budget on dev, by the {MODE} score (paired t-test, p < 0.05).")
    return "\n".join(lines)
