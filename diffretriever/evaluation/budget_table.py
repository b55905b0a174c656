"""K_q for each query by its length and entropy: what a table learned on training queries is worth (paper §6.3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import fsum
from statistics import quantiles
from typing import Any

from ..model.query_budgets import BUDGETS, FEATURES, choose_budget, part_of
from .budget_analysis import Budget, Sweep
from .significance import paired_t_test

PARTS = 3  # of each feature's range, with as many training queries each
LEAST = 20  # training queries that a part needs to have a budget of its own


def learn_table(sweep: Sweep, mode: str, fixed: Budget) -> dict[str, Any]:
    """Choose for each part of the queries the K_q with the best mean; of equal ones the least.

    Args:
        sweep: of training queries.
        mode: "dense", "sparse" or "fused".
        fixed: the budget of all queries; its K_p is kept, and its K_q is that of parts with few queries.

    Returns:
        The table, as `DiffRetrieverConfig.query_budget_table` has it.
    """
    table: dict[str, Any] = {
        name: _edges([features[name] for features in sweep.features.values()]) for name in FEATURES
    }
    members: dict[tuple[int, int], list[str]] = defaultdict(list)
    for query, features in sweep.features.items():
        members[part_of(table, features)].append(query)
    rows = {k_q: row for (k_q, k_p), row in sorted(sweep.scores[mode].items()) if k_p == fixed[1]}

    def best(queries: list[str]) -> int:
        if len(queries) < LEAST:
            return fixed[0]
        return max(rows, key=lambda k_q: fsum(rows[k_q][query] for query in queries))

    lengths, entropies = (range(len(table[name]) + 1) for name in FEATURES)
    table[BUDGETS] = [[best(members[length, entropy]) for entropy in entropies] for length in lengths]
    return table


def _edges(values: list[float]) -> list[float]:
    """Return where the parts of a feature end, all but the last, each once."""
    return sorted({round(edge, 6) for edge in quantiles(values, n=PARTS, method="inclusive")}) if values[1:] else []


def try_table(table: Mapping[str, Any], sweep: Sweep, mode: str, fixed: Budget) -> dict[str, Any]:
    """Compare a table with the fixed budget on other queries.

    Args:
        table: from `learn_table`.
        sweep: of these queries, over the same budgets.
        mode, fixed: as for `learn_table`.

    Returns:
        {"score": the mean with the table's budgets, "difference": from the fixed one's, "p": of a paired t-test,
        "budgets": {K_q: queries}}.

    Raises:
        ValueError: the sweep lacks a budget of the table, or has one query.
    """
    grid = sweep.scores[mode]
    chosen = {query: choose_budget(table, features) for query, features in sweep.features.items()}
    missing = sorted(k_q for k_q in set(chosen.values()) if (k_q, fixed[1]) not in grid)
    if missing:
        raise ValueError(f"K_q/K_p = {missing[0]}/{fixed[1]} is in the table, but was not tried on these queries.")
    return compare({query: grid[k_q, fixed[1]][query] for query, k_q in chosen.items()}, grid[fixed], chosen)


def compare(scores: Mapping[str, float], fixed: Mapping[str, float], chosen: Mapping[str, int]) -> dict[str, Any]:
    """Compare each query's score under its own budget with that under the fixed one; returns as `try_table`."""
    test = paired_t_test(scores, fixed)
    counts = {k_q: list(chosen.values()).count(k_q) for k_q in sorted(set(chosen.values()))}
    return {"score": fsum(scores.values()) / len(scores), "difference": test.difference, "p": test.p, "budgets": counts}


def table_text(table: Mapping[str, Any]) -> str:
    """Return a table for the terminal: a row for each part of the length, a column for each of the entropy."""
    rows, columns = (
        [*(f"<= {edge:g}" for edge in table[name]), "above" if table[name] else "any"] for name in FEATURES
    )
    lines = [f"{'length, entropy':<16}" + "".join(f"{column:>12}" for column in columns)]
    for row, budgets in zip(rows, table[BUDGETS], strict=True):
        lines.append(f"{row:<16}" + "".join(f"{k_q:>12}" for k_q in budgets))
    return "\n".join(lines)
