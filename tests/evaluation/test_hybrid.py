"""The fusion of runs against a plain loop, and the model's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffretriever.evaluation.hybrid import fuse_runs
from diffretriever.evaluation.runs import ranking
from diffretriever.model.scoring import fuse

RUNS = st.dictionaries(st.sampled_from("abcdef"), st.floats(-8, 8, width=32), max_size=6)


@settings(deadline=None)
@given(RUNS, RUNS, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 6))
def test_fusion_equals_a_plain_loop(
    first: dict[str, float], second: dict[str, float], weight: float, depth: int
) -> None:
    expected = dict.fromkeys(first | second, 0.0)
    for share, scores in ((weight, first), (1 - weight, second)):
        for passage, score in scores.items():
            if max(scores.values()) > min(scores.values()):
                scaled = (score - min(scores.values())) / (max(scores.values()) - min(scores.values()))
                expected[passage] += share * scaled
    everything = fuse_runs({"q": first}, {"q": second}, weight, depth=100)["q"]
    assert everything == pytest.approx(expected, abs=1e-6)
    found = fuse_runs({"q": first}, {"q": second}, weight, depth)["q"]
    assert list(found) == [name for name, _ in ranking(everything)[:depth]]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-4, 4, width=32), st.floats(-4, 4, width=32)), min_size=1, max_size=6))
def test_fusion_of_full_rankings_equals_the_models(pairs: list[tuple[float, float]]) -> None:
    names = "abcdef"[: len(pairs)]
    sides = [dict(zip(names, side, strict=True)) for side in zip(*pairs, strict=True)]
    dense, sparse = (torch.tensor([list(side.values())]) for side in sides)
    expected = fuse(dense, sparse, weight=0.3)[0]
    found = fuse_runs({"q": sides[0]}, {"q": sides[1]}, 0.3, depth=10)["q"]
    assert [found[name] for name in names] == pytest.approx(expected.tolist(), abs=1e-5)


def test_queries_of_either_run_are_kept_in_order() -> None:
    assert list(fuse_runs({"b": {"p": 1.0}, "a": {}}, {"c": {"p": 2.0}, "a": {"p": 1.0}}, 0.5, 5)) == ["b", "a", "c"]


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_outside_0_to_1_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="`fusion_weight` must lie between 0 and 1"):
        fuse_runs({}, {}, weight, 5)
