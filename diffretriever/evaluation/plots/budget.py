"""The (K_q, K_p) landscape (paper Fig. 5), from the JSON of `diffretriever select-budget`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files.lines import read_object
from .style import is_number, new_figure

Grid = dict[tuple[int, int], float]
PAIR = re.compile(r"\s*(\d+)\s*,\s*(\d+)\s*")


def read_grid(path: str | Path, score: str = "fused") -> tuple[Grid, str]:
    """Read the score of every budget.

    Args:
        path: JSON, {"metric": "nDCG@10", "grid": [{"num_query_masks": 1, "num_passage_masks": 4, "fused": 0.7, …}, …]},
            or the short form {"1,4": 0.7, …} of K_q and K_p.
        score: which of an entry's scores, in the long form.

    Returns:
        {(K_q, K_p): score}, and what the score is, in words.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or an entry without this score.
    """
    content = read_object(path)
    if "grid" not in content:
        return _short_form(path, content), score
    grid: Grid = {}
    if not isinstance(content["grid"], list) or not content["grid"]:
        raise ValueError(f'{path}: "grid" must be a list with at least one entry.')
    for number, entry in enumerate(content["grid"]):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: entry {number} (from 0) of the grid is no object.")
        budget = entry.get("num_query_masks"), entry.get("num_passage_masks")
        if not all(isinstance(count, int) and count > 0 for count in budget) or not is_number(entry.get(score)):
            raise ValueError(
                f"{path}: entry {number} (from 0) of the grid needs num_query_masks, num_passage_masks and {score!r}, "
                f"numbers; it has {entry!r:.200}."
            )
        _add(grid, (int(budget[0] or 0), int(budget[1] or 0)), float(entry[score]), path)
    return grid, f"{score} {content.get('metric', '')}".strip()


def _short_form(path: str | Path, content: Mapping[str, Any]) -> Grid:
    grid: Grid = {}
    for key, value in content.items():
        found = PAIR.fullmatch(key)
        if found is None or not is_number(value):
            raise ValueError(f'{path}: expected a list "grid", or entries like "1,4": 0.7; got {key!r}: {value!r:.60}.')
        _add(grid, (int(found[1]), int(found[2])), float(value), path)
    if not grid:
        raise ValueError(f"{path} holds no budget.")
    return grid


def _add(grid: Grid, budget: tuple[int, int], value: float, path: str | Path) -> None:
    if budget in grid:
        raise ValueError(f"{path}: K_q = {budget[0]}, K_p = {budget[1]} stands there twice.")
    grid[budget] = value


def plot_budget(grid: Grid, score: str = "score", title: str | None = None) -> Any:
    """Draw the landscape: a cell a budget with its score; budgets that were not tried are left blank.

    The best budget is framed; of equal ones that with the fewest passage masks, which cost most.

    Args:
        grid: from `read_grid`.
        score: the colour bar's name.
        title: above the picture.

    Returns:
        A matplotlib figure.
    """
    rows, columns = (sorted({budget[side] for budget in grid}) for side in (0, 1))
    figure = new_figure(max(3.6, 1.6 + 0.8 * len(columns)), max(2.6, 1.2 + 0.6 * len(rows)))
    axes = figure.add_subplot()
    missing = float("nan")
    values = [[grid.get((row, column), missing) for column in columns] for row in rows]
    image = axes.imshow(values, cmap="cividis", origin="lower", aspect="auto")
    best = max(grid, key=lambda budget: (grid[budget], -budget[1], -budget[0]))
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for (row, column), value in grid.items():
        place = columns.index(column), rows.index(row)
        colour = "white" if value < middle else "black"
        weight = "bold" if (row, column) == best else "normal"
        axes.text(*place, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=9, fontweight=weight)
    _frame(axes, columns.index(best[1]), rows.index(best[0]))
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    axes.set_xlabel("passage masks, $K_p$")
    axes.set_ylabel("query masks, $K_q$")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=score)
    if title:
        axes.set_title(title, loc="left", fontsize=10)
    return figure


def _frame(axes: Any, column: int, row: int) -> None:
    """Frame the best cell."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor="#D55E00", linewidth=2.5))
