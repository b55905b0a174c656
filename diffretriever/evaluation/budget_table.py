"""K_q for each query by its length and entropy: what a table learned on training queries is worth (paper §6.3)."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from statistics import quantiles
from typing import Any

from .budget_analysis import FEATURES, Budget, Sweep
from .significance import paired_t_test

PARTS = 3  # of each feature's range, with as many training queries each
LEAST = 20  # training queries that a part needs to have a budget of its own


@dataclass(frozen=True)
class BudgetTable:
    """Budgets by length and entropy.

    Args:
        edges: {feature: the upper edges of all parts but the last}.
        budgets: {(part of the length, part of the entropy): K_q}.
        default: K_q of the parts that are not there.
    """

    edges: dict[str, list[float]]
    budgets: dict[tuple[int, int], int]
    default: int

    def part(self, features: Mapping[str, float]) -> tuple[int, int]:
        """Return the parts of a query's length and entropy, from 0."""
        length, entropy = (bisect_left(self.edges[name], features[name]) for name in FEATURES)
        return length, entropy

    def choose(self, features: Mapping[str, float]) -> int:
        """Return a query's K_q.

        >>> table = BudgetTable({"length": [5.0], "entropy": [2.0]}, {(0, 0): 1, (1, 1): 8}, default=4)
        >>> [table.choose({"length": length, "entropy": 2.0}) for length in (5, 6)]
        [1, 4]
        """
        return self.budgets.get(self.part(features), self.default)


def learn_table(sweep: Sweep, mode: str, fixed: Budget) -> BudgetTable:
    """Choose for each part of the queries the K_q with the best mean; of equal ones the least.

    Args:
        sweep: of training queries.
        mode: "dense", "sparse" or "fused".
        fixed: the budget of all queries; its K_p is kept, and its K_q is that of parts with few queries.
    """
    values = {name: [features[name] for features in sweep.features.values()] for name in FEATURES}
    edges = {name: quantiles(each, n=PARTS, method="inclusive") for name, each in values.items() if len(each) > 1}
    table = BudgetTable({name: edges.get(name, []) for name in FEATURES}, {}, fixed[0])
    members: dict[tuple[int, int], list[str]] = defaultdict(list)
    for query, features in sweep.features.items():
        members[table.part(features)].append(query)
    rows = {k_q: row for (k_q, k_p), row in sorted(sweep.scores[mode].items()) if k_p == fixed[1]}
    for part, queries in members.items():
        if len(queries) >= LEAST:
            totals = {k_q: fsum(row[query] for query in queries) for k_q, row in rows.items()}
            table.budgets[part] = max(totals, key=lambda k_q: totals[k_q])
    return table


def try_table(table: BudgetTable, sweep: Sweep, mode: str, fixed: Budget) -> dict[str, Any]:
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
    chosen = {query: table.choose(features) for query, features in sweep.features.items()}
    missing = sorted(k_q for k_q in set(chosen.values()) if (k_q, fixed[1]) not in grid)
    if missing:
        raise ValueError(f"K_q/K_p = {missing[0]}/{fixed[1]} is in the table, but was not tried on these queries.")
    scores = {query: grid[k_q, fixed[1]][query] for query, k_q in chosen.items()}
    test = paired_t_test(scores, grid[fixed])
    counts = {k_q: list(chosen.values()).count(k_q) for k_q in sorted(set(chosen.values()))}
    return {"score": fsum(scores.values()) / len(scores), "difference": test.difference, "p": test.p, "budgets": counts}
