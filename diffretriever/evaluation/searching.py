"""A benchmark's queries encoded and ranked, a window at a time, for several modes and weights at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ..data.benchmark import Benchmark
from ..progress import progress_bar
from ..search.searcher import Rankings, Searcher
from .runs import Run, cut, without_own_id

QUERY_WINDOW = 1024  # queries encoded and ranked at once


def search_benchmark(
    model: Any,
    searcher: Searcher,
    benchmark: Benchmark,
    rows: Mapping[str, tuple[str, float]],
    depth: int,
    progress: bool = False,
) -> dict[str, Run]:
    """Search a benchmark's queries; what several rows need is ranked once.

    Args:
        model: a loaded DiffRetriever.
        searcher: over the passages.
        benchmark: its queries, and its rule for own ids.
        rows: {row's name: (scoring mode, the dense scores' share in a fusion mode)}.
        depth: passages a query; the fusion modes take as many candidates of each side.
        progress: draw a bar, in queries.

    Returns:
        {row's name: run}.
    """
    runs: dict[str, Run] = {name: {} for name in rows}
    modes = [mode for mode, _ in rows.values()]
    for queries, ranked in ranked_windows(model, searcher, benchmark, modes, depth, progress):
        for name, (mode, weight) in rows.items():
            found = ranked.results(mode, reach(benchmark, depth), weight)
            runs[name] |= judged_part(found.run(queries), benchmark, depth)
    return runs


def ranked_windows(
    model: Any, searcher: Searcher, benchmark: Benchmark, modes: Sequence[str], depth: int, progress: bool = False
) -> Iterator[tuple[list[str], Rankings]]:
    """Encode a benchmark's queries and prepare their rankings, a window at a time.

    Args:
        model, searcher, benchmark, depth, progress: as for `search_benchmark`.
        modes: the scoring modes that will be asked for.

    Yields:
        The queries' ids, and their rankings, deep enough for `depth` passages after own ids are left out.
    """
    entries = iter(benchmark.queries.items())
    with progress_bar(len(benchmark.queries), "query", "search", progress) as bar:
        while window := dict(islice(entries, QUERY_WINDOW)):
            vectors = searcher.encode(model, list(window.values()), modes)
            yield list(window), searcher.rank(vectors, reach(benchmark, depth))
            bar.update(len(window))


def reach(benchmark: Benchmark, depth: int) -> int:
    """Return how many passages to rank so that `depth` are left without the query's own id."""
    return depth + (0 if benchmark.own_ids_count else 1)


def judged_part(run: Run, benchmark: Benchmark, depth: int) -> Run:
    """Return what of a run is evaluated: without own ids where the benchmark says so, `depth` passages a query."""
    return cut(run if benchmark.own_ids_count else without_own_id(run), depth)


def query_latency(
    model: Any, searcher: Searcher, queries: Mapping[str, str], modes: Sequence[str], depth: int, count: int
) -> dict[str, float]:
    """Time single queries: encoding one and searching it, nothing else going on.

    Args:
        model, searcher: as for `search_benchmark`.
        queries: {query id: text}.
        modes: scoring modes.
        depth: passages a query, and candidates of each side.
        count: so many queries, spread over all of them.

    Returns:
        {mode: median, in milliseconds}.
    """

    def timed(mode: str) -> float:
        def work(text: str) -> None:
            searcher.search(searcher.encode(model, [text], [mode]), mode, depth, candidates=depth)

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
