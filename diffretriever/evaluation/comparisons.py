"""Which rows of a table are significantly better than which: the marks † and ‡.

As in the paper's Tables 2 and 3, † marks a result better than the same method's with a single vector, ‡ one that
is better than the matched autoregressive method's in the same scoring mode (for Dream, PromptReps on Qwen2.5). Each is
another evaluation's `--per-query` file. Without the first, † compares modes of the same table; without the second, ‡
means BM25.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .metrics import PerQuery
from .significance import CORRECTIONS, TTest, check_same_queries, paired_t_test

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


def pairs_of(
    rows: Mapping[str, PerQuery],
    single: Mapping[str, PerQuery] | None = None,
    counterpart: Mapping[str, PerQuery] | None = None,
) -> list[Pair]:
    """Choose the pairs to test.

    Args:
        rows: {row: metric -> query -> value}.
        single: the rows of the single-vector evaluation; then † compares each mode with the same mode there, else with
            its single-vector counterpart in the same table.
        counterpart: the rows of the matched autoregressive method; then ‡ compares each mode with the same mode there,
            else with the row "bm25", where there is one.

    Returns:
        The pairs, those of † first.
    """
    ours = [row for row in rows if row != BM25_ROW]
    if single is not None:
        pairs = _same_modes(ours, "†", "baseline", single)
    else:
        pairs = [
            Pair(row, "†", COUNTERPARTS[row], rows[COUNTERPARTS[row]]) for row in ours if COUNTERPARTS.get(row) in rows
        ]
    if counterpart is not None:
        return pairs + _same_modes(ours, "‡", "counterpart", counterpart)
    if BM25_ROW in rows:
        pairs += [Pair(row, "‡", BM25_ROW, rows[BM25_ROW]) for row in ours]
    return pairs


def _same_modes(ours: Sequence[str], mark: str, name: str, theirs: Mapping[str, PerQuery]) -> list[Pair]:
    """Pair rows with those of the same name in another evaluation, the `name`."""
    return [Pair(row, mark, f"{row} of the {name}", theirs[row]) for row in ours if row in theirs]


def check_comparable(
    name: str, theirs: Mapping[str, PerQuery], modes: Sequence[str], metrics: Sequence[str], queries: Collection[str]
) -> None:
    """Refuse another evaluation that this one could not be compared with, before it is made.

    Args:
        name: what it is called, "baseline" or "counterpart".
        theirs: its rows.
        modes, metrics, queries: this evaluation's.

    Raises:
        ValueError: it has none of the modes, or a row without a metric or with other queries.
    """
    if not any(mode in theirs for mode in modes):
        raise ValueError(
            f"the {name} has none of the modes {', '.join(modes)}, only {', '.join(theirs)}; evaluate both in the same."
        )
    for row, values in theirs.items():
        for metric in metrics:
            if metric not in values:
                raise ValueError(
                    f"{row} of the {name} has no {metric}, only {', '.join(values)}; evaluate both with the same "
                    "metrics."
                )
            check_same_queries(queries, values[metric], f"{row} of the {name}")


def compare(rows: Mapping[str, PerQuery], pairs: Sequence[Pair], correction: str = "bonferroni") -> list[Comparison]:
    """Test every pair on every metric; a metric's tests are one family for the correction.

    Args:
        rows: {row: metric -> query -> value}.
        pairs: from `pairs_of`.
        correction: "bonferroni" or "holm".

    Raises:
        ValueError: an unknown correction, or other queries on the other side.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction {correction!r} is not known; it is one of {', '.join(CORRECTIONS)}.")
    comparisons = []
    for metric in next(iter(rows.values()), {}):
        tests = [paired_t_test(rows[pair.row][metric], pair.values[metric]) for pair in pairs]
        corrected = CORRECTIONS[correction]([test.p for test in tests])
        for pair, test, p in zip(pairs, tests, corrected, strict=True):
            comparisons.append(Comparison(pair.row, pair.mark, pair.baseline, metric, test, p))
    return comparisons
