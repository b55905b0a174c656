"""What all plots share: colours that colour-blind readers can tell apart, markers, points, files."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ...files.durable import check_place, write_whole
from ...files.install import install_hint

# Okabe and Ito's palette, without its yellow, which is too light for lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARKER_SIZE, LINE_WIDTH = 6.5, 1.6  # points, in all pictures
FORMATS = (".png", ".svg", ".pdf")
LARGEST = sys.float_info.max


def checked_points(
    path: str | Path, content: Mapping[str, Any], name: str, numbers: Sequence[str], writer: str
) -> list[dict[str, Any]]:
    """Return the points of a file of measurements.

    Args:
        path: the file, for messages.
        content: what it holds.
        name: of its list of points, each {"system": a text, …}.
        numbers: fields that each has, above 0.
        writer: what writes such files.

    Raises:
        ValueError: no such list, or a point that is none; the message says which, and why.
    """
    points = content.get(name)
    if not isinstance(points, list) or not points:
        raise ValueError(f'{path}: expected a list "{name}" with at least one entry, as {writer} writes.')
    for number, point in enumerate(points):
        found = point if isinstance(point, dict) else {}
        place = f"{path}: point {number} (from 0)"
        if not isinstance(found.get("system"), str):
            raise ValueError(f"{place}: 'system' is {found.get('system')!r}; expected a text.")
        for field in numbers:
            value = found.get(field)
            if not is_number(value) or value <= 0:
                raise ValueError(f"{place}: {field!r} is {value!r}; expected a number above 0.")
    return points


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value of a file can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, in inches, whose parts make room for each other.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would need a display and keep the figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: {install_hint('retrieval')}") from error
    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: Any) -> None:
    """Take away the frame's right and top, add a light grid behind the data."""
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def save(figure: Any, path: str | Path) -> None:
    """Write the figure; the file's ending says the format.

    Raises:
        ValueError: an ending that is no picture format.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the picture's file must end in one of {', '.join(FORMATS)}.")
    check_place(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, format=path.suffix.lower()[1:])
    write_whole(path, [buffer.getbuffer()])
