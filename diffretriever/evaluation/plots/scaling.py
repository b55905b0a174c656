"""Storage and latency against corpus size (paper App. B.2, B.3), from the JSON of `benchmarks/storage.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files.lines import read_object
from .style import COLOURS, LINE_WIDTH, MARKER_SIZE, MARKERS, checked_points, new_figure, plain_axes

NUMBERS = ("passages", "bytes", "latency_ms")
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def read_points(path: str | Path) -> tuple[list[dict[str, Any]], str]:
    """Read the measured points and the hardware's name.

    Args:
        path: JSON, {"hardware": …, "points": [{"system", "passages", "bytes", "latency_ms"}, …]}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; the message says what is wrong with which point.
    """
    content = read_object(path)
    return checked_points(path, content, "points", NUMBERS, "benchmarks/storage.py"), str(content.get("hardware", ""))


def plot_scaling(points: Sequence[Mapping[str, Any]], hardware: str = "", title: str | None = None) -> Any:
    """Draw storage and latency side by side, both axes logarithmic, one line a system.

    Args:
        points: from `read_points`.
        hardware: below the picture.
        title: above the picture.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: more systems than a reader can tell apart.
    """
    systems = list(dict.fromkeys(str(point["system"]) for point in points))
    if len(systems) > len(COLOURS):
        raise ValueError(f"{len(systems)} systems are too many for one picture; at most {len(COLOURS)}.")
    figure = new_figure(9.0, 3.9)
    for place, (name, label, units) in enumerate(
        (("bytes", "storage on disk", UNITS), ("latency_ms", "searching one query, median (ms)", None)), start=1
    ):
        axes = figure.add_subplot(1, 2, place)
        for number, system in enumerate(systems):
            line = sorted((point["passages"], point[name]) for point in points if point["system"] == system)
            axes.plot(
                [size for size, _ in line], [value for _, value in line], label=system,
                color=COLOURS[number], marker=MARKERS[number], markersize=MARKER_SIZE, linewidth=LINE_WIDTH,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: _with_unit(value, COUNTS, ""))
        axes.margins(x=0.08)
        axes.yaxis.set_major_formatter(_formatter(units))
        axes.set_xlabel("passages (random vectors)")
        axes.set_ylabel(label)
        plain_axes(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(systems), 4), frameon=False)
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle("\n".join(line for line in (title, hardware) if line), fontsize=9)
    return figure


def _formatter(units: Sequence[tuple[float, str]] | None) -> Callable[[float, int], str]:
    """Return what writes a tick's value, with a unit if there are any."""
    return lambda value, _: _with_unit(value, units, " ") if units else f"{value:g}"


def _with_unit(value: float, units: Sequence[tuple[float, str]], space: str) -> str:
    """Write a number with the largest unit that leaves it at 1 or more.

    >>> _with_unit(2.5e9, UNITS, " ")
    '2.5 GB'
    """
    scale, unit = next(((scale, unit) for scale, unit in units if value >= scale), units[-1])
    return f"{value / scale:g}{space}{unit}"
