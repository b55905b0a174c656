"""Encoding latency against length, search latency against index size (paper Fig. 8), from `benchmarks/latency.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files.lines import read_object
from .style import COLOURS, LINE_WIDTH, MARKER_SIZE, MARKERS, checked_points, new_figure, plain_axes

PARTS = {"encoding": "tokens", "search": "passages"}  # of the file, and what each is drawn against


def read_latency(path: str | Path) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Read the measured points and what they were measured on.

    Args:
        path: JSON, {"hardware", "backbone", "encoding": [{"system", "tokens", "latency_ms"}, …], "search": [{"system",
            "passages", "latency_ms"}, …]}.

    Returns:
        {"encoding": points, "search": points}, and hardware and backbone in words.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; the message says which point is wrong.
    """
    content = read_object(path)
    parts = {
        part: checked_points(path, content, part, (axis, "latency_ms"), "benchmarks/latency.py")
        for part, axis in PARTS.items()
    }
    return parts, "\n".join(str(content[name]) for name in ("hardware", "backbone") if name in content)


def plot_latency(parts: Mapping[str, Sequence[Mapping[str, Any]]], made_on: str = "", title: str | None = None) -> Any:
    """Draw both parts side by side, a line a system, all axes logarithmic; what is searched are random vectors.

    Args:
        parts: from `read_latency`.
        made_on: hardware and backbone, above the picture.
        title: above these.

    Returns:
        A matplotlib figure.
    """
    figure = new_figure(10.0, 4.4)
    labels = {"encoding": ("tokens of text", "encoding one query, median (ms)")}
    labels["search"] = ("passages (random vectors)", "searching one query, median (ms)")
    for place, (part, axis) in enumerate(PARTS.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        systems = list(dict.fromkeys(str(point["system"]) for point in parts[part]))
        for number, system in enumerate(systems):
            line = sorted((point[axis], point["latency_ms"]) for point in parts[part] if point["system"] == system)
            axes.plot(
                [size for size, _ in line], [value for _, value in line], label=system,
                markersize=MARKER_SIZE, linewidth=LINE_WIDTH,
                color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
                linestyle="-" if number < len(COLOURS) else "--",
            )  # fmt: skip
        ticks = sorted({point[axis] for point in parts[part]})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(labels[part][0])
        axes.set_ylabel(labels[part][1])
        plain_axes(axes)
        # side by side below the picture, so that neither widens the space between the parts
        figure.legend(
            *axes.get_legend_handles_labels(), fontsize=8, frameon=False, ncols=2,
            loc=f"outside lower {'left' if place == 1 else 'right'}",
        )  # fmt: skip
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle("\n".join(line for line in (title, made_on) if line), fontsize=9)
    return figure
