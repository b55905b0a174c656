"""Runs: what a search returned for each query, and the TREC files that hold them.

A run is {query id: {passage id: score}}. Its order is trec_eval's: falling score in float32, equal scores by falling
passage id. So a run file gives the same figures in trec_eval as in our tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..files.durable import write_whole
from ..files.lines import read_lines

Run = dict[str, dict[str, float]]


def ranking(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Order one query's passages as trec_eval does.

    Args:
        scores: {passage id: score}, higher is better.

    Returns:
        (passage id, score rounded to float32), best first.

    Raises:
        ValueError: a score is NaN.

    >>> ranking({"a": 1.0, "b": 2.0, "c": 1.0})
    [('b', 2.0), ('c', 1.0), ('a', 1.0)]
    """
    values = np.fromiter(scores.values(), dtype=np.float64, count=len(scores)).astype(np.float32).tolist()
    pairs = list(zip(scores, values, strict=True))
    for passage, value in pairs:
        if math.isnan(value):
            raise ValueError(f"the score of passage {passage!r} is NaN; a run needs numbers.")
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]), reverse=True)


def cut(run: Mapping[str, Mapping[str, float]], depth: int) -> Run:
    """Keep the best `depth` passages of each query.

    >>> cut({"q": {"a": 1.0, "b": 2.0, "c": 3.0}}, 2)
    {'q': {'c': 3.0, 'b': 2.0}}
    """
    return {query: dict(ranking(scores)[:depth]) for query, scores in run.items()}


def without_own_id(run: Mapping[str, Mapping[str, float]]) -> Run:
    """Drop the passage that has the query's own id, as BEIR does (in ArguAna and Quora a query is in the corpus).

    >>> without_own_id({"7": {"7": 1.0, "8": 0.5}})
    {'7': {'8': 0.5}}
    """
    return {
        query: {passage: score for passage, score in scores.items() if passage != query}
        for query, scores in run.items()
    }


def write_run(path: str | Path, run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Write a TREC run file: `query Q0 passage rank score tag`, best first; the file appears whole or not at all.

    Args:
        path: the file.
        run: {query id: {passage id: score}}.
        tag: the run's name, its last column.

    Raises:
        ValueError: an id is empty or holds white space, which this format cannot say, or a score is NaN.
    """
    _check_word(tag, "the tag")
    write_whole(Path(path), (_run_lines(query, scores, tag).encode("utf-8") for query, scores in run.items()))


def _run_lines(query: str, scores: Mapping[str, float], tag: str) -> str:
    """Return one query's lines."""
    _check_word(query, "the query id")
    lines = []
    for rank, (passage, score) in enumerate(ranking(scores), start=1):
        _check_word(passage, "the passage id")
        lines.append(f"{query} Q0 {passage} {rank} {score:.9g} {tag}\n")  # 9 digits bring a float32 back
    return "".join(lines)


def check_run_ids(ids: Iterable[str], kind: str) -> None:
    """Raise ValueError for an id that a run file cannot hold; `kind` is "query" or "passage"."""
    for name in ids:
        _check_word(name, f"the {kind} id")


def _check_word(word: str, name: str) -> None:
    if not word or word.split() != [word]:
        raise ValueError(
            f"{name} {word!r:.80} cannot stand in a TREC run file, whose columns end at white space; "
            "leave the run files out, or give the ids no spaces."
        )


def read_run(path: str | Path) -> Run:
    """Read a TREC run file; the ranks in it are ignored, as trec_eval does.

    Args:
        path: lines `query Q0 passage rank score tag`, plain or compressed.

    Returns:
        {query id: {passage id: score}}, in the file's order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed line, a passage twice for one query, no line at all; file and line are named.
    """
    run: Run = {}
    for number, line in read_lines(path):
        columns = line.split()
        if not columns:
            continue
        query, passage, score = _run_columns(columns, f"{path}, line {number}")
        scores = run.setdefault(query, {})
        if passage in scores:
            raise ValueError(
                f"{path}, line {number}: passage {passage!r:.80} stands a second time under query {query!r:.80}."
            )
        scores[passage] = score
    if not run:
        raise ValueError(f"{path} holds no ranking; a run file has lines `query Q0 passage rank score tag`.")
    return run


def _run_columns(columns: list[str], place: str) -> tuple[str, str, float]:
    if len(columns) != 6:
        raise ValueError(f"{place}: {len(columns)} columns; a run has six: query Q0 passage rank score tag.")
    try:
        score = float(columns[4])
    except ValueError:
        score = math.nan
    if math.isnan(score):
        raise ValueError(f"{place}: the score {columns[4]!r:.80} is not a number.")
    return columns[0], columns[2], score
