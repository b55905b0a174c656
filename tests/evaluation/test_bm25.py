"""BM25 against its formula written out."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from diffretriever.evaluation.bm25 import BM25
from diffretriever.evaluation.runs import ranking

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


def test_jax_is_left_alone(tmp_path: Path) -> None:
    """bm25s computes something with JAX when it is imported, for which that takes three quarters of a GPU."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("")
    (tmp_path / "jax/lax.py").write_text("def top_k(values, k):\n    raise SystemExit('it took the GPU')\n")
    script = "from diffretriever.evaluation.bm25 import BM25; print(BM25(['a'], ['web']).search({'q': 'web'}, 1))\n"
    script += "import jax.lax; print(jax.lax.top_k)\n"  # who wants it has it
    paths = [str(tmp_path), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'q': {'a': ")
    assert "<function top_k" in done.stdout
