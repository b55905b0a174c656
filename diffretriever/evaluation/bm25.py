"""BM25 by bm25s, the lexical baseline."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..files.compiling import numba_works
from ..files.install import install_hint
from .runs import Run, ranking

COMPILED_FROM = 20_000  # passages from which bm25s is worth compiling, where numba is installed
SPARE = 32  # passages that bm25s, whose order of equal scores is its own, ranks beyond those asked for
Ranking = list[tuple[int, float]]  # (position, score), best first


class BM25:
    """A BM25 index in memory (Robertson & Zaragoza 2009; Lucene's variant, Kamphuis et al. 2020).

    score(q, p) = sum over the query's words w of idf(w) · tf(w, p) / (tf(w, p) + k1 · (1 - b + b · |p| / mean |p|)).
    Words are stemmed (Snowball) and English stopwords dropped; k1 and b are Anserini's.

    Args:
        ids: the passages' ids.
        texts: their texts, title included.
        k1, b: BM25's own.

    Raises:
        ValueError: no passages, or not one id for each text.
        ImportError: bm25s or PyStemmer is not installed.
    """

    def __init__(self, ids: Sequence[str], texts: Sequence[str], k1: float = 0.9, b: float = 0.4) -> None:
        if not ids or len(ids) != len(texts):
            raise ValueError(f"BM25 needs passages with one id each; got {len(ids)} ids and {len(texts)} texts.")
        try:
            with _without_jax():
                import bm25s
            import Stemmer
        except ImportError as error:
            raise ImportError(f"BM25 needs bm25s and PyStemmer: {install_hint('retrieval')}") from error
        self.ids = list(ids)
        self._tokenize = bm25s.tokenize
        self._rules: dict[str, Any] = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False}
        compiled = len(ids) >= COMPILED_FROM and numba_works()
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numba" if compiled else "numpy")
        words = self._tokenize(list(texts), **self._rules)
        if not words.vocab:
            raise ValueError("BM25: no passage holds a word that is not a stopword.")
        self._index.index(words, show_progress=False)

    def search(self, queries: Mapping[str, str], top_k: int) -> Run:
        """Rank the passages that share a word with each query.

        Args:
            queries: {query id: text}.
            top_k: passages kept a query; equal scores at the end are kept in the passages' order.

        Returns:
            {query id: {passage id: score}}, best first.
        """
        found = zip(queries, self.rank(list(queries.values()), top_k), strict=True)
        return {query: dict(ranking({self.ids[place]: score for place, score in row})) for query, row in found}

    def rank(self, queries: Sequence[str], top_k: int) -> list[Ranking]:
        """Rank the passages that share a word with each query, by their positions.

        Args:
            queries: texts.
            top_k: passages kept a query.

        Returns:
            Each query's ranking; of equal scores the first position comes first.
        """
        if not queries:
            return []
        known = self._index.vocab_dict
        asked = [
            [word for word in words if word in known]
            for words in self._tokenize(list(queries), return_ids=False, **self._rules)
        ]
        if self._index.backend == "numba":
            return self._rank_compiled(asked, top_k)
        return [self._rank_one(words, top_k) for words in asked]

    def _rank_one(self, words: list[str], top_k: int) -> Ranking:
        if not words:
            return []
        scores = np.asarray(self._index.get_scores(words))  # float32 [passages]
        kept = np.arange(len(scores))
        if top_k < len(scores):  # whatever ties with the last place stays until the order is known
            kept = np.flatnonzero(scores >= np.partition(scores, -top_k)[-top_k])
        return _best(kept, scores[kept], top_k)

    def _rank_compiled(self, asked: list[list[str]], top_k: int) -> list[Ranking]:
        """Rank in one call; where ties at the end reach beyond what it returned, rank that query by itself."""
        rows: list[Ranking] = [[]] * len(asked)
        numbers = [number for number, words in enumerate(asked) if words]
        if not numbers:
            return rows
        depth = min(top_k + SPARE, len(self.ids))
        found = self._index.retrieve([asked[number] for number in numbers], k=depth, show_progress=False)
        for number, places, scores in zip(numbers, found.documents, found.scores, strict=True):
            whole = depth == len(self.ids) or scores[-1] < scores[top_k - 1] or scores[-1] == 0
            rows[number] = _best(places, scores, top_k) if whole else self._rank_one(asked[number], top_k)
        return rows


@contextmanager
def _without_jax() -> Iterator[None]:
    """Keep bm25s from importing JAX, which would at once take three quarters of a GPU's memory; we sort without it."""
    kept = "jax" not in sys.modules and "bm25s" not in sys.modules
    if kept:
        sys.modules["jax"] = None  # type: ignore[assignment]  # which makes its import fail
    try:
        yield
    finally:
        if kept:
            sys.modules.pop("jax", None)


def _best(places: np.ndarray, scores: np.ndarray, top_k: int) -> Ranking:
    """Return the best of some passages that share a word with the query."""
    order = np.lexsort((places, -scores))[:top_k]
    pairs = zip(places[order].tolist(), scores[order].tolist(), strict=True)
    return [(place, score) for place, score in pairs if score > 0]
