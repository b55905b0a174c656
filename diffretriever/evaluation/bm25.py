"""BM25 by bm25s, the lexical baseline, and its fusion with our runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .runs import Run, ranking


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
            import bm25s
            import Stemmer
        except ImportError as error:
            raise ImportError('BM25 needs bm25s and PyStemmer: pip install "diffretriever[retrieval]"') from error
        self.ids = list(ids)
        self._tokenize = bm25s.tokenize
        self._rules: dict[str, Any] = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False}
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
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
        if not queries:
            return {}
        asked = self._tokenize(list(queries.values()), return_ids=False, **self._rules)
        return {query: self._best(words, top_k) for query, words in zip(queries, asked, strict=True)}

    def _best(self, words: list[str], top_k: int) -> dict[str, float]:
        known = [word for word in words if word in self._index.vocab_dict]
        if not known:
            return {}
        scores = np.asarray(self._index.get_scores(known))  # float32 [passages]
        if top_k < len(scores):
            limit = np.partition(scores, -top_k)[-top_k]
            above = np.flatnonzero(scores > limit)
            level = np.flatnonzero(scores == limit)[: top_k - len(above)]
            kept = np.concatenate([above, level])
        else:
            kept = np.arange(len(scores))
        found = {self.ids[place]: float(scores[place]) for place in kept.tolist() if scores[place] > 0}
        return dict(ranking(found))


def fuse_runs(
    first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]], weight: float, depth: int
) -> Run:
    """Fuse two runs as the method fuses its two sides (paper Eq. 4): min-max normalise a query's scores, interpolate.

    The candidates are the union of both rankings; one that a ranking does not hold gets that ranking's lowest, 0.

    Args:
        first, second: {query id: {passage id: score}}.
        weight: the first run's share, 0 to 1.
        depth: passages kept a query.

    Returns:
        {query id: {passage id: score in [0, 1]}}, best first, the queries of both.

    Raises:
        ValueError: the weight is outside 0 to 1.

    >>> fuse_runs({"q": {"a": 3.0, "b": 1.0}}, {"q": {"b": 9.0, "c": 7.0}}, 0.25, depth=10)
    {'q': {'b': 0.75, 'a': 0.25, 'c': 0.0}}
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"the fusion weight must lie between 0 and 1, got {weight}.")
    fused: Run = {}
    for query in dict.fromkeys([*first, *second]):  # in order, where a set would have none
        one, other = _min_max(first.get(query, {})), _min_max(second.get(query, {}))
        scores = {
            passage: weight * one.get(passage, 0.0) + (1 - weight) * other.get(passage, 0.0) for passage in one | other
        }
        fused[query] = dict(ranking(scores)[:depth])
    return fused


def _min_max(scores: Mapping[str, float]) -> dict[str, float]:
    """Scale to [0, 1]; equal scores become 0, as in the model's own fusion."""
    if not scores:
        return {}
    low, high = min(scores.values()), max(scores.values())
    spread = (high - low) or 1.0
    return {passage: (score - low) / spread for passage, score in scores.items()}
