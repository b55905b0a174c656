"""BM25 against its formula written out, and the fusion of runs against a plain loop."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffretriever.evaluation.bm25 import BM25, fuse_runs
from diffretriever.evaluation.runs import ranking
from diffretriever.model.scoring import fuse

TEXTS = {"p1": "audio player", "p2": "audio audio video", "p3": "web daemon", "p4": "player web web daemon audio"}


def by_formula(query: list[str], text: str, k1: float = 0.9, b: float = 0.4) -> float:
    """Lucene's BM25 in plain loops, for words that stemming leaves alone."""
    passages = [passage.split() for passage in TEXTS.values()]
    mean = sum(map(len, passages)) / len(passages)
    total = 0.0
    for word in query:
        count = sum(word in passage for passage in passages)
        if count:
            idf = math.log(1 + (len(passages) - count + 0.5) / (count + 0.5))
            frequency = text.split().count(word)
            total += idf * frequency / (frequency + k1 * (1 - b + b * len(text.split()) / mean))
    return total


def test_equals_the_formula() -> None:
    index = BM25(list(TEXTS), list(TEXTS.values()))
    for query in ("audio", "web video", "player daemon audio", "audio unheard"):
        expected = {name: by_formula(query.split(), text) for name, text in TEXTS.items()}
        expected = {name: score for name, score in expected.items() if score > 0}
        found = index.search({"q": query}, top_k=10)["q"]
        assert found == pytest.approx(expected, rel=1e-5), query
        assert list(found) == [name for name, _ in ranking(found)]


def test_words_are_stemmed_and_stopwords_dropped() -> None:
    index = BM25(["a", "b"], ["the players of games", "a running server"])
    assert list(index.search({"q": "player"}, 10)["q"]) == ["a"]
    assert index.search({"q": "the of"}, 10) == {"q": {}}
    assert index.search({"q": "unheard"}, 10) == {"q": {}}
    assert index.search({}, 10) == {}


def test_top_k_keeps_the_first_of_equal_scores() -> None:
    index = BM25([f"p{number}" for number in range(6)], ["web", "audio", "web", "web audio audio", "web", "web"])
    assert sorted(index.search({"q": "web"}, 3)["q"]) == ["p0", "p2", "p4"]
    everything = index.search({"q": "web audio"}, 100)["q"]
    for top_k in range(1, 7):
        kept = index.search({"q": "web audio"}, top_k)["q"]
        assert sorted(kept.values()) == sorted(everything.values())[-top_k:]


def test_the_compiled_index_ranks_as_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ties that reach beyond what one call returns, and queries of words that no passage has."""
    pytest.importorskip("numba")
    words = [f"w{chr(97 + number)}" for number in range(12)]
    numbers = random.Random(3)
    texts = [" ".join(numbers.choices(words, k=3)) for _ in range(400)]
    queries = [*words, "wa wb wc", "wa unheard", "unheard", "the"]
    plain = BM25([str(place) for place in range(400)], texts)
    monkeypatch.setattr("diffretriever.evaluation.bm25.COMPILED_FROM", 400)
    compiled = BM25([str(place) for place in range(400)], texts)
    for top_k in (1, 10, 60, 399, 400, 500):
        for ours, theirs in zip(compiled.rank(queries, top_k), plain.rank(queries, top_k), strict=True):
            assert [place for place, _ in ours] == [place for place, _ in theirs]
            assert [score for _, score in ours] == pytest.approx([score for _, score in theirs])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="got 2 ids and 1 texts"):
        BM25(["a", "b"], ["one"])
    with pytest.raises(ValueError, match="got 0 ids and 0 texts"):
        BM25([], [])
    with pytest.raises(ValueError, match="no passage holds a word that is not a stopword"):
        BM25(["a"], ["the of"])


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
    with pytest.raises(ValueError, match="the fusion weight must lie between 0 and 1"):
        fuse_runs({}, {}, weight, 5)
