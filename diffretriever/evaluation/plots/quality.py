"""Quality against latency (paper Fig. 1), from the JSON of `diffretriever evaluate --latency N --json FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.lines import read_object
from ..comparisons import BM25_ROW
from ..report import LATENCY
from .style import COLOURS, MARKERS, new_figure, plain_axes


@dataclass(frozen=True)
class Timed:
    """One mode of one evaluation."""

    release: str
    mode: str
    milliseconds: float
    quality: float


def read_evaluations(paths: Sequence[str | Path], metric: str) -> list[Timed]:
    """Read the timed modes of several evaluations.

    Args:
        paths: JSON files, {mode: {metric: value, "latency_ms": value}}; each is named after its file.
        metric: the quality.

    Raises:
        FileNotFoundError, ValueError: a file is absent or holds no timed mode with this metric.
    """
    points = []
    for path in paths:
        rows = read_object(path)
        timed = [(mode, row) for mode, row in rows.items() if isinstance(row, dict) and LATENCY in row]
        if not timed:
            raise ValueError(
                f"{path}: no mode has {LATENCY!r}; write the file with "
                "`diffretriever evaluate --latency 50 --json FILE`."
            )
        for mode, row in timed:
            if metric not in row:
                raise ValueError(f"{path}: {mode} has no {metric!r}, only {', '.join(row)}.")
            for name in (LATENCY, metric):
                if isinstance(row[name], bool) or not isinstance(row[name], (int, float)):
                    raise ValueError(f"{path}: {name!r} of {mode} is {row[name]!r:.60}; expected a number.")
            points.append(Timed(Path(path).stem, mode, float(row[LATENCY]), float(row[metric])))
    return points


def plot_quality(points: Sequence[Timed], metric: str, title: str | None = None) -> Any:
    """Draw one point a mode: colour and size say the mode, shape the release. BM25 is drawn once.

    Args:
        points: at least one.
        metric: the vertical axis's name.
        title: above the picture.

    Returns:
        A matplotlib figure.
    """
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    ours = [point for point in points if point.mode != BM25_ROW]
    colours = _assign([point.mode for point in ours], COLOURS[:-1])
    markers = _assign([point.release for point in ours], MARKERS)
    sizes = {mode: 210 / (1 + number) ** 0.9 for number, mode in enumerate(colours)}  # equal points become rings
    for point in ours:
        axes.scatter(
            point.milliseconds, point.quality, s=sizes[point.mode], marker=markers[point.release],
            facecolors="none", edgecolors=colours[point.mode], linewidths=1.8,
        )  # fmt: skip
    for point in [point for point in points if point.mode == BM25_ROW][:1]:
        axes.scatter(point.milliseconds, point.quality, s=110, marker="*", color=COLOURS[-1], label=BM25_ROW)
    _logarithmic(axes)
    axes.margins(0.12)
    axes.set_xlabel("encoding and searching one query, median (ms, logarithmic)")
    axes.set_ylabel(metric)
    plain_axes(axes)
    handles = _legend(colours, markers, sizes) + axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    if title:
        axes.set_title(title, loc="left", fontsize=10)
    return figure


def _assign(names: Sequence[str], looks: Sequence[str]) -> dict[str, str]:
    """Give each name a look of its own, in order.

    Raises:
        ValueError: there are more names than looks.
    """
    different = list(dict.fromkeys(names))
    if len(different) > len(looks):
        raise ValueError(
            f"{len(different)} different series are too many for one picture ({len(looks)} at most): "
            f"{', '.join(different)}."
        )
    return dict(zip(different, looks, strict=False))


def _legend(colours: Mapping[str, str], markers: Mapping[str, str], sizes: Mapping[str, float]) -> list[Any]:
    """Return handles that say which colour is which mode, and which shape which release."""
    from matplotlib.lines import Line2D

    hollow: dict[str, Any] = {"linestyle": "", "markerfacecolor": "none"}
    modes = [
        Line2D(
            [], [], marker="o", color=colour, markersize=sizes[mode] ** 0.5, markeredgewidth=1.8, label=mode, **hollow
        )
        for mode, colour in colours.items()
    ]
    releases = [Line2D([], [], marker=shape, color="#444444", label=name, **hollow) for name, shape in markers.items()]
    return modes + (releases if len(releases) > 1 else [])


def _logarithmic(axes: Any) -> None:
    """Make the horizontal axis logarithmic, with the ticks 1, 2, 5, 10, 20 …"""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
