"""Paired significance tests between two rankings of the same queries, corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..files.install import install_hint

ROUNDING = 1e-12  # metrics lie between 0 and 1


@dataclass(frozen=True)
class TTest:
    """A paired t-test: `queries` pairs, their mean `difference`, `t`, and the two-sided `p`."""

    queries: int
    difference: float
    t: float
    p: float


def paired_t_test(ours: Mapping[str, float], baseline: Mapping[str, float]) -> TTest:
    """Test whether the mean difference of two rankings is zero, by scipy's `ttest_rel`.

    Args:
        ours, baseline: {query id: value of one metric}, the same queries.

    Returns:
        The test; `difference` is ours minus the baseline. Where all differences are equal but for rounding, p is 1 if
        they are 0 and 0 if not.

    Raises:
        ValueError: the queries differ, or there are fewer than two.
        ImportError: scipy is not installed.
    """
    check_same_queries(ours.keys(), baseline.keys())
    if len(ours) < 2:
        raise ValueError(f"a paired t-test needs at least two queries, got {len(ours)}.")
    try:
        from scipy.stats import ttest_rel
    except ImportError as error:
        raise ImportError(f"significance tests need scipy: {install_hint('retrieval')}") from error
    pairs = [(value, baseline[query]) for query, value in ours.items()]
    differences = [value - other for value, other in pairs]
    mean = math.fsum(differences) / len(pairs)
    if max(differences) - min(differences) <= ROUNDING:  # without spread t is 0 or infinite, and scipy's NaN
        equal = abs(mean) <= ROUNDING
        return TTest(len(pairs), mean, 0.0 if equal else math.copysign(math.inf, mean), float(equal))
    found = ttest_rel(*zip(*pairs, strict=True))
    return TTest(len(pairs), mean, float(found.statistic), float(found.pvalue))


def check_same_queries(ours: Collection[str], theirs: Collection[str], whose: str = "the baseline") -> None:
    """Raise ValueError where two sides have not the same queries; `whose` the other side's are."""
    odd = sorted(set(ours) ^ set(theirs))
    if odd:
        raise ValueError(
            f"a paired test with {whose} needs the same queries on both sides; {len(odd)} are on one side only, e.g. "
            f"{odd[0]!r}."
        )


def bonferroni(p_values: Sequence[float]) -> list[float]:
    """Multiply each p by the number of tests (Bonferroni): holds the chance of any false mark.

    >>> bonferroni([0.01, 0.5])
    [0.02, 1.0]
    """
    return [min(1.0, p * len(p_values)) for p in p_values]


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct step by step (Holm 1979): the same guarantee as Bonferroni's, never fewer marks.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for step, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - step)))
        corrected[place] = highest
    return corrected


CORRECTIONS = {"bonferroni": bonferroni, "holm": holm}
