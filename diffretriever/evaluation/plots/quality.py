"""Quality against latency (paper Fig. 1), from the JSON of `diffretriever evaluate --latency N --json FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.lines import read_object
from ..comparisons import BM25_ROW
from ..report import LATENCY
from .style import COLOURS, LINE_WIDTH, MARKER_SIZE, MARKERS, is_number, new_figure, plain_axes


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
        paths: JSON files, {mode: {metric: value, "latency_ms": value}, "about": {"dataset", "split"}}; each is named
            after its file.
        metric: the quality.

    Raises:
        FileNotFoundError, ValueError: a file is absent, holds no timed mode with this metric or has another one's name.
    """
    points: list[Timed] = []
    for path in paths:
        if any(point.release == Path(path).stem for point in points):
            raise ValueError(
                f"{path}: another file is called {Path(path).stem!r}, too; evaluations are named by their files."
            )
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
                if not is_number(row[name]):
                    raise ValueError(f"{path}: {name!r} of {mode} is {row[name]!r:.60}; expected a number.")
            points.append(Timed(Path(path).stem, mode, float(row[LATENCY]), float(row[metric])))
    return points


def plot_quality(points: Sequence[Timed], metric: str, title: str | None = None, dataset: str | None = None) -> Any:
    """Draw one point a mode, its shape; of several releases, colour says which. BM25 is drawn once.

    Args:
        points: at least one.
        metric: the vertical axis's name.
        title: above the picture.
        dataset: what the evaluations are of; stands beside the metric.

    Returns:
        A matplotlib figure.
    """
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    ours = [point for point in points if point.mode != BM25_ROW]
    markers = _assign([point.mode for point in ours], MARKERS)  # hollow, so that equal points show both shapes
    releases = _assign([point.release for point in ours], COLOURS[:-1])
    for point in ours:
        axes.scatter(
            point.milliseconds, point.quality, s=MARKER_SIZE**2, marker=markers[point.mode],
            facecolors="none", edgecolors=releases[point.release], linewidths=LINE_WIDTH,
        )  # fmt: skip
    for point in [point for point in points if point.mode == BM25_ROW][:1]:
        look = {"marker": "*", "color": COLOURS[-1], "label": BM25_ROW}
        axes.scatter(point.milliseconds, point.quality, s=MARKER_SIZE**2, **look)
    _logarithmic(axes)
    axes.margins(0.12)
    axes.set_xlabel("encoding and searching one query, median (ms, logarithmic)")
    axes.set_ylabel(f"{metric} on {dataset}" if dataset else metric)
    plain_axes(axes)
    handles = _legend(markers, releases) + axes.get_legend_handles_labels()[0]
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


def _legend(markers: Mapping[str, str], releases: Mapping[str, str]) -> list[Any]:
    """Return handles that say which shape is which mode, and which colour which release."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colour = "#444444" if len(releases) > 1 else next(iter(releases.values()), "#444444")
    look: dict[str, Any] = {"linestyle": "", "markerfacecolor": "none", "color": colour}
    look |= {"markersize": MARKER_SIZE, "markeredgewidth": LINE_WIDTH}
    modes = [Line2D([], [], marker=shape, label=mode, **look) for mode, shape in markers.items()]
    return modes + ([Patch(color=shade, label=name) for name, shade in releases.items()] if len(releases) > 1 else [])


def _logarithmic(axes: Any) -> None:
    """Make the horizontal axis logarithmic, with the ticks 1, 2, 5, 10, 20 …"""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
