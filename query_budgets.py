"""K_q of each query by its length and entropy: a release's table of budgets (paper §6.3)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from reprlib import repr as shortened
from typing import Any

FEATURES = ("length", "entropy")
BUDGETS = "num_query_masks"
MOST_MASKS = 1024
MOST_EDGES = 64  # of a feature


def query_features(ids: Sequence[int]) -> dict[str, float]:
    """Return what is known of a query before it is encoded (paper §6.3).

    Args:
        ids: the tokens of its text alone.

    Returns:
        "length", the number of tokens, and "entropy", Shannon's, of their distribution, in bits, to 6 decimals: a
        machine's last bit decides nothing.

    >>> query_features([7, 7, 8, 9])
    {'length': 4, 'entropy': 1.5}
    """
    shares = [count / len(ids) for count in Counter(ids).values()]
    return {"length": len(ids), "entropy": round(-math.fsum(share * math.log2(share) for share in shares) + 0.0, 6)}


def part_of(table: Mapping[str, Any], features: Mapping[str, float]) -> tuple[int, int]:
    """Return the parts of a table that a query's length and entropy fall into, from 0; a part ends with its edge."""
    length, entropy = (bisect_left(table[name], features[name]) for name in FEATURES)
    return length, entropy


def choose_budget(table: Mapping[str, Any], features: Mapping[str, float]) -> int:
    """Return a query's K_q.

    Args:
        table: as `DiffRetrieverConfig.query_budget_table`.
        features: of `query_features`.

    >>> table = {"length": [5], "entropy": [2.0], "num_query_masks": [[1, 4], [4, 8]]}
    >>> [choose_budget(table, {"length": length, "entropy": 2.0}) for length in (5, 6)]
    [1, 4]
    """
    row, column = part_of(table, features)
    chosen: int = table[BUDGETS][row][column]
    return chosen


def budgets_of(table: Mapping[str, Any]) -> list[int]:
    """Return every K_q of a table once, rising."""
    return sorted({k for row in table[BUDGETS] for k in row})


def check_table(where: str, table: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no table of K_q by length and entropy.

    Args:
        where: the field's name, for messages.
        table: an object.
    """
    names = (*FEATURES, BUDGETS)
    if set(table) != set(names):
        raise ValueError(f"{where} must hold exactly {', '.join(names)}; got {shortened(list(table))}.")
    for name in FEATURES:
        edges = table[name]
        right = isinstance(edges, list) and len(edges) <= MOST_EDGES
        right = right and all(type(edge) in (int, float) and 0 <= edge < math.inf for edge in edges)
        if not right or any(one >= other for one, other in pairwise(edges)):
            wanted = f"a list of at most {MOST_EDGES} rising numbers of at least 0"
            raise ValueError(f"{where}: `{name}` must be {wanted}, got {shortened(edges)}.")
    rows, columns = (len(table[name]) + 1 for name in FEATURES)
    budgets = table[BUDGETS]
    right = isinstance(budgets, list) and len(budgets) == rows
    right = right and all(isinstance(row, list) and len(row) == columns for row in budgets)
    if not right or any(type(k) is not int or not 1 <= k <= MOST_MASKS for row in budgets for k in row):
        wanted = f"{rows} lists of {columns} whole numbers from 1 to {MOST_MASKS}, a list for each part of the length"
        raise ValueError(f"{where}: `{BUDGETS}` must be {wanted}; got {shortened(budgets)}.")
