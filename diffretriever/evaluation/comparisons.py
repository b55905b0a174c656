"""Which rows of a table are significantly better than which: the marks † and ‡.

† marks a multi-vector result that is better than its single-vector counterpart (our reading of the paper's Table 2; its
count of marks fits §5.1), ‡ one that is better than a baseline of another method; here that baseline is BM25.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .metrics import PerQuery
from .significance import CORRECTIONS, TTest, paired_t_test

LEVEL = 0.05
BM25_ROW = "bm25"
COUNTERPARTS = {"multi_dense": "single_dense", "fusion_multi_sparse_max": "fusion_single_sparse_max"}


@dataclass(frozen=True)
class Pair:
    """A row of the table and what it is compared with, `baseline` in words."""

    row: str
    mark: str
    baseline: str
    values: PerQuery  # the baseline's


@dataclass(frozen=True)
class Comparison:
    """One test of one metric; `corrected` is its p after the correction."""

    row: str
    mark: str
    baseline: str
    metric: str
    test: TTest
    corrected: float

    @property
    def better(self) -> bool:
        """Whether the row earns its mark."""
        return self.test.difference > 0 and self.corrected < LEVEL


def pairs_of(rows: Mapping[str, PerQuery], earlier: Mapping[str, PerQuery] | None = None) -> list[Pair]:
    """Choose the pairs to test.

    Args:
        rows: {row: metric -> query -> value}.
        earlier: the rows of another evaluation, e.g. of the single-vector release; then † compares each mode with the
            same mode there, else with its single-vector counterpart in the same table.

    Returns:
        The pairs; ‡ compares with the row "bm25", where there is one.
    """
    pairs = []
    for row in rows:
        if earlier is not None and row in earlier:
            pairs.append(Pair(row, "†", f"{row} of the baseline", earlier[row]))
        elif earlier is None and COUNTERPARTS.get(row) in rows:
            pairs.append(Pair(row, "†", COUNTERPARTS[row], rows[COUNTERPARTS[row]]))
    if BM25_ROW in rows:
        pairs += [Pair(row, "‡", BM25_ROW, rows[BM25_ROW]) for row in rows if row != BM25_ROW]
    return pairs


def compare(rows: Mapping[str, PerQuery], pairs: Sequence[Pair], correction: str = "bonferroni") -> list[Comparison]:
    """Test every pair on every metric; a metric's tests are one family for the correction.

    Args:
        rows: {row: metric -> query -> value}.
        pairs: from `pairs_of`.
        correction: "bonferroni" or "holm".

    Raises:
        ValueError: an unknown correction, or a baseline without the metric or with other queries.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction {correction!r} is not known; it is one of {', '.join(CORRECTIONS)}.")
    comparisons = []
    for metric in next(iter(rows.values()), {}):
        tests = []
        for pair in pairs:
            if metric not in pair.values:
                raise ValueError(
                    f"{pair.baseline} has no {metric}, only {', '.join(pair.values)}; "
                    "evaluate both with the same metrics."
                )
            tests.append(paired_t_test(rows[pair.row][metric], pair.values[metric]))
        corrected = CORRECTIONS[correction]([test.p for test in tests])
        for pair, test, p in zip(pairs, tests, corrected, strict=True):
            comparisons.append(Comparison(pair.row, pair.mark, pair.baseline, metric, test, p))
    return comparisons
