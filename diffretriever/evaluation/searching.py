"""A benchmark's queries searched in several modes, each side ranked once for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from ..search.modes import FUSED
from ..search.searcher import Engine, Searcher
from .runs import Run

QUERY_WINDOW = 1024  # queries encoded and searched at once


class RankedOnce:
    """An engine that keeps its rankings of one window of queries: the fusion modes reuse those of their two sides."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # the queries are kept as well, or their memory, which the key names, could be used again
        self._kept: dict[tuple[Any, ...], tuple[Any, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._scores: dict[tuple[Any, ...], tuple[Any, list[torch.Tensor], list[torch.Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._engine)

    @property
    def settings(self) -> Any:
        """As the engine's."""
        return self._engine.settings

    def ids(self, positions: Sequence[int]) -> list[str]:
        """As the engine's."""
        return self._engine.ids(positions)

    def rank(self, queries: Any, kind: str, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As the engine's, computed once."""
        key = (kind, top_k, len(queries), queries.dense.data_ptr())
        if key not in self._kept:
            self._kept[key] = (queries, self._engine.rank(queries, kind, top_k))
        return self._kept[key][1]

    def scores_at(self, queries: Any, kind: str, positions: list[torch.Tensor]) -> list[torch.Tensor]:
        """As the engine's, computed once for the same positions."""
        key = (kind, len(queries), queries.dense.data_ptr())
        if key in self._scores and _same(self._scores[key][1], positions):
            return self._scores[key][2]
        self._scores[key] = (queries, positions, self._engine.scores_at(queries, kind, positions))
        return self._scores[key][2]


def _same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def search_modes(
    model: Any,
    searcher: Searcher,
    queries: Mapping[str, str],
    modes: Sequence[str],
    depth: int,
    fusion_weight: float = 0.5,
    progress: bool = False,
) -> dict[str, Run]:
    """Encode the queries, a window at a time, and search them in every mode.

    Args:
        model: a loaded DiffRetriever.
        searcher: over the passages.
        queries: {query id: text}.
        modes: scoring modes.
        depth: passages a query; the fusion modes take as many candidates of each side.
        fusion_weight: the dense scores' share.
        progress: draw a bar, in queries.

    Returns:
        {mode: run}.
    """
    from tqdm.auto import tqdm

    runs: dict[str, Run] = {mode: {} for mode in modes}
    with tqdm(total=len(queries), disable=not progress, unit="query", desc="search") as bar:
        for window in _windows(queries, QUERY_WINDOW):
            vectors = model.encode_texts(list(window.values()), is_query=True, compute_sparse=any(map(_sparse, modes)))
            once = Searcher(RankedOnce(searcher.engine))
            for mode in modes:
                found = once.search(vectors, mode, depth, candidates=depth, fusion_weight=fusion_weight)
                runs[mode] |= found.run(list(window))
            bar.update(len(window))
    return runs


def search_weights(
    model: Any,
    searcher: Searcher,
    queries: Mapping[str, str],
    modes: Sequence[str],
    weights: Sequence[float],
    top_k: int,
    candidates: int,
) -> Iterator[tuple[str, float, Run]]:
    """Search in the fusion modes at several weights of the dense scores.

    Args:
        model, searcher, queries: as for `search_modes`.
        modes: fusion modes.
        weights: the dense scores' shares.
        top_k: passages a query.
        candidates: of each side.

    Yields:
        Mode, weight and the run of a window of queries; the windows one after the other.
    """
    for window in _windows(queries, QUERY_WINDOW):
        vectors = model.encode_texts(list(window.values()), is_query=True, compute_sparse=True)
        once = Searcher(RankedOnce(searcher.engine))
        for mode in modes:
            for weight in weights:
                found = once.search(vectors, mode, top_k, candidates=candidates, fusion_weight=weight)
                yield mode, weight, found.run(list(window))


def _windows(queries: Mapping[str, str], size: int) -> Iterator[dict[str, str]]:
    entries = iter(queries.items())
    while window := dict(islice(entries, size)):
        yield window


def _sparse(mode: str) -> bool:
    return mode == "sparse_max" or mode in FUSED


def query_latency(
    model: Any, searcher: Searcher, queries: Mapping[str, str], modes: Sequence[str], depth: int, count: int
) -> dict[str, float]:
    """Time single queries: encoding one and searching it, nothing else going on.

    Args:
        model, searcher, queries, modes, depth: as for `search_modes`.
        count: so many queries, spread over all of them.

    Returns:
        {mode: median, in milliseconds}.
    """

    def timed(mode: str) -> float:
        def work(text: str) -> None:
            vectors = model.encode_texts([text], is_query=True, compute_sparse=_sparse(mode))
            searcher.search(vectors, mode, depth, candidates=depth)

        return median_ms(work, spread(queries, count))

    return {mode: timed(mode) for mode in modes}


def spread(queries: Mapping[str, str], count: int) -> list[str]:
    """Return at most `count` of the queries' texts, spread over all of them.

    >>> spread({"a": "one", "b": "two", "c": "three", "d": "four"}, 2)
    ['one', 'three']
    """
    texts = list(queries.values())
    return texts[:: max(1, len(texts) // count)][:count]


def median_ms(work: Callable[[str], object], texts: Sequence[str]) -> float:
    """Return the median time of `work` over the texts, in milliseconds; the first one also warms up.

    >>> median_ms(len, ["a", "b"]) < 1000
    True
    """
    work(texts[0])
    took = []
    for text in texts:
        start = time.perf_counter()
        work(text)
        took.append(time.perf_counter() - start)
    return 1000 * statistics.median(took)
