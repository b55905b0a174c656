"""An evaluation as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.lines import read_object
from .comparisons import LEVEL, Comparison
from .metrics import PerQuery, means

LATENCY = "latency_ms"


@dataclass
class Evaluation:
    """What an evaluation found.

    Args:
        title: model, data, split and sizes, in one line.
        rows: {mode or baseline: metric -> query id -> value}.
        latency: {mode: milliseconds a query}, for the modes that were timed.
        comparisons: significance tests between rows.
        correction: how their p values were corrected.
        notes: what the reader should know about the data.
    """

    title: str
    rows: dict[str, PerQuery]
    latency: dict[str, float] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    correction: str = "bonferroni"
    notes: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, dict[str, float]]:
        """Return {row: {metric: mean over the queries}}; a timed row also has `latency_ms`."""
        figures = {row: means(values) for row, values in self.rows.items()}
        for row, milliseconds in self.latency.items():
            figures[row][LATENCY] = milliseconds
        return figures


def to_terminal(evaluation: Evaluation) -> str:
    """Return the table with aligned columns, its legend and notes."""
    header, *rows = _cells(evaluation)
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [evaluation.title, ""]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.ljust(width) if cell else " " * width for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *_below(evaluation)]) + "\n"


def to_markdown(evaluation: Evaluation) -> str:
    """Return the table in Markdown, its legend, notes and the tests behind the marks."""
    header, *rows = _cells(evaluation)
    lines = [f"**{evaluation.title}**", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        name = f"`{row[0]}`"
        lines.append(f"| {' | '.join([name, *row[1:]])} |")
    lines += _below(evaluation)
    if evaluation.comparisons:
        lines += ["", "| better? | than | metric | difference | t | p | p corrected |", f"|{'---|' * 7}"]
    for found in evaluation.comparisons:
        lines.append(
            f"| `{found.row}` {found.mark if found.better else ''} | {found.baseline} | {found.metric} | "
            f"{found.test.difference:+.4f} | {found.test.t:.2f} | {found.test.p:.2g} | {found.corrected:.2g} |"
        )
    return "\n".join(lines) + "\n"


def _cells(evaluation: Evaluation) -> list[list[str]]:
    """Return the header and the rows, as text, marks included."""
    figures = evaluation.figures()
    columns = list(dict.fromkeys(name for values in figures.values() for name in values))
    marks: dict[tuple[str, str], str] = {}
    for found in evaluation.comparisons:
        if found.better:
            marks[found.row, found.metric] = marks.get((found.row, found.metric), "") + found.mark
    table = [["mode", *("ms / query" if name == LATENCY else name for name in columns)]]
    for row, values in figures.items():
        cells = [_number(name, values) + marks.get((row, name), "") for name in columns]
        table.append([row, *cells])
    return table


def _number(name: str, values: Mapping[str, float]) -> str:
    if name not in values:
        return ""
    return f"{values[name]:.1f}" if name == LATENCY else f"{values[name]:.3f}"


def _below(evaluation: Evaluation) -> list[str]:
    """Return the legend of the marks and the notes, each a paragraph."""
    lines = []
    tested = {found.mark: found.baseline for found in evaluation.comparisons}
    if tested:
        meanings = {"†": "its single-vector counterpart", "‡": tested.get("‡", "")}
        for mark, found in tested.items():
            _, of, source = found.partition(" of the ")
            meanings[mark] = f"the same mode of the {source}" if of else meanings[mark]
        each = len({(found.row, found.mark) for found in evaluation.comparisons})
        legend = ", ".join(f"{mark} better than {meanings[mark]}" for mark in tested)
        lines += ["", f"{legend}: paired two-sided t-test, p < {LEVEL} after {evaluation.correction.capitalize()}'s"]
        lines[-1] += f" correction over {each} tests a metric."
    for note in evaluation.notes:
        lines += ["", f"Note: {note}"]
    return lines


def read_per_query(path: str | Path) -> dict[str, PerQuery]:
    """Read what `diffretriever evaluate --per-query` wrote.

    Args:
        path: JSON, {mode: {metric: {query id: value}}}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file.
    """
    rows = read_object(path)
    if not _is_per_query(rows):
        raise ValueError(
            f"{path}: expected {{mode: {{metric: {{query id: number}}}}}}, as `diffretriever evaluate --per-query` "
            "writes."
        )
    return rows


def _is_per_query(rows: Any, depth: int = 3) -> bool:
    if depth == 0:
        return isinstance(rows, (int, float)) and not isinstance(rows, bool)
    return isinstance(rows, dict) and bool(rows) and all(_is_per_query(inner, depth - 1) for inner in rows.values())
