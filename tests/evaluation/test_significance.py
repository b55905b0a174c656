"""The paired t-test against the density's integral and scipy's own test; corrections against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from diffretriever.evaluation.significance import bonferroni, holm, paired_t_test

VALUES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=40)


def named(values: list[float]) -> dict[str, float]:
    return {f"q{number}": value for number, value in enumerate(values)}


@settings(deadline=None)
@given(VALUES)
def test_equals_scipy(pairs: list[tuple[float, float]]) -> None:
    ours, baseline = zip(*pairs, strict=True)
    if np.std(np.subtract(ours, baseline)) < 1e-9:
        return  # scipy gives NaN or warns; see below
    expected = stats.ttest_rel(ours, baseline)
    found = paired_t_test(named(list(ours)), named(list(baseline)))
    assert found.t == pytest.approx(expected.statistic, rel=1e-6)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.difference == pytest.approx(np.mean(np.subtract(ours, baseline)))
    assert found.queries == len(pairs)


def test_p_is_twice_the_tail_of_the_t_density() -> None:
    found = paired_t_test(named([0.9, 0.4, 0.7, 0.5]), named([0.5, 0.3, 0.6, 0.6]))
    freedom = 3
    constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    tail = integrate.quad(lambda t: constant * (1 + t * t / freedom) ** (-(freedom + 1) / 2), found.t, math.inf)[0]
    # differences 0.4, 0.1, 0.1, -0.1: mean 0.125, deviation sqrt(0.1275 / 3)
    assert found.t == pytest.approx(0.125 / (math.sqrt(0.1275 / 3) / 2))
    assert found.p == pytest.approx(2 * tail)


def test_the_order_of_the_queries_does_not_matter() -> None:
    ours, baseline = {"a": 0.9, "b": 0.1, "c": 0.4}, {"c": 0.2, "a": 0.3, "b": 0.2}
    assert paired_t_test(ours, baseline) == paired_t_test(ours, dict(sorted(baseline.items())))


def test_without_spread() -> None:
    same = paired_t_test({"a": 0.3, "b": 0.7}, {"a": 0.3, "b": 0.7})
    assert (same.t, same.p) == (0.0, 1.0)
    shifted = paired_t_test({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.5})
    assert (shifted.t, shifted.p) == (math.inf, 0.0)
    assert paired_t_test({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}).t == -math.inf


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"same queries on both sides; 2 are on one side only, e\.g\. 'b'"):
        paired_t_test({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match="at least two queries, got 1"):
        paired_t_test({"a": 1.0}, {"a": 0.5})


P_VALUES = st.lists(st.floats(0, 1), max_size=8)


@settings(deadline=None)
@given(P_VALUES)
def test_holm_is_the_step_down_of_its_definition(p_values: list[float]) -> None:
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for step, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[place] * (len(p_values) - step) > level:
                break
            rejected.add(place)
        assert {place for place, p in enumerate(holm(p_values)) if p <= level} == rejected


@settings(deadline=None)
@given(P_VALUES)
def test_corrections_bound_each_other(p_values: list[float]) -> None:
    for p, step_down, plain in zip(p_values, holm(p_values), bonferroni(p_values), strict=True):
        assert p <= step_down <= plain <= 1.0
        assert plain == min(1.0, len(p_values) * p)
