"""Pictures: what is drawn, where, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from diffretriever.cli import main as cli
from diffretriever.evaluation.plots.budget import plot_budget, read_grid
from diffretriever.evaluation.plots.latency import plot_latency, read_latency
from diffretriever.evaluation.plots.quality import Timed, plot_quality, read_evaluations
from diffretriever.evaluation.plots.scaling import plot_scaling, read_points
from diffretriever.evaluation.plots.style import COLOURS, MARKERS

Command = Callable[..., int]
EVALUATION = {
    "single_dense": {"nDCG@10": 0.5, "latency_ms": 10.0},
    "fusion_multi_sparse_max": {"nDCG@10": 0.7, "latency_ms": 20.0},
    "bm25": {"nDCG@10": 0.74, "latency_ms": 0.4},
    "multi_dense+bm25@0.5": {"nDCG@10": 0.75},
}
POINTS = [
    {"system": f"K_p = {masks}", "passages": size, "bytes": size * masks * 8000, "latency_ms": size * masks / 500}
    for masks in (1, 4)
    for size in (10_000, 1000, 100_000)
]
LATENCY = {
    "hardware": "a machine",
    "backbone": "2 layers",
    "encoding": [
        {
            "system": f"A method of a long name, {number} words",
            "tokens": tokens,
            "latency_ms": 10.0 * (number + 1) + tokens,
        }
        for number in range(8)
        for tokens in (256, 8, 32)
    ],
    "search": [
        {"system": f"$K_p$ = {masks}", "passages": size, "latency_ms": size * masks / 500}
        for masks in (1, 4, 16)
        for size in (1000, 100_000, 10_000)
    ],
}
GRID = [
    {"num_query_masks": k_q, "num_passage_masks": k_p, "fused": 0.6 + k_q / 100 + k_p / 1000, "dense": 0.1}
    for k_q in (1, 4)
    for k_p in (1, 4, 16)
    if (k_q, k_p) != (1, 16)
]


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> Command:
    return lambda *words: cli.main(["plot", *map(str, words)])


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def faults(figure: Any) -> list[str]:
    """Draw the figure; return the texts that leave it and the pairs of texts that overlap."""
    from matplotlib.axis import Axis
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    undrawn = set()  # ticks outside the axis's range exist, but are not drawn
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not low <= tick.get_loc() <= high:
                undrawn |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = {text: text.get_window_extent(canvas.get_renderer()) for text in texts if text not in undrawn}
    found = [text.get_text() for text, box in boxes.items() if box.x0 < 0 or box.y0 < 0]
    found += [text.get_text() for text, box in boxes.items() if box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1]
    return found + [
        f"{one.get_text()} / {other.get_text()}"
        for one, other in combinations(boxes, 2)
        if boxes[one].overlaps(boxes[other])
    ]


def test_quality_draws_every_timed_mode(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.json", EVALUATION) for name in ("single", "multi")]
    points = read_evaluations(files, "nDCG@10")
    assert len(points) == 6
    assert points[0] == Timed("single", "single_dense", 10.0, 0.5)
    figure = plot_quality(points, "nDCG@10", "title", "SciFact")
    axes = figure.axes[0]
    assert plot_quality(points, "nDCG@10").axes[0].get_ylabel() == "nDCG@10"
    drawn = [tuple(collection.get_offsets()[0]) for collection in axes.collections]
    assert sorted(drawn) == [(0.4, 0.74), (10.0, 0.5), (10.0, 0.5), (20.0, 0.7), (20.0, 0.7)]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["single_dense", "fusion_multi_sparse_max", "single", "multi", "bm25"]
    assert axes.get_ylabel() == "nDCG@10 on SciFact"
    assert len({float(collection.get_sizes()[0]) for collection in axes.collections}) == 1
    looks = [(c.get_paths()[0].vertices.shape, tuple(c.get_edgecolors()[0])) for c in axes.collections]
    assert len(set(looks)) == 5  # two modes of two releases, and BM25
    assert "ms" in axes.get_xlabel()
    assert faults(figure) == []


def test_evaluations_of_one_name_are_not_drawn_as_one(tmp_path: Path) -> None:
    files = [tmp_path / folder / "results.json" for folder in ("single", "multi")]
    for file in files:
        file.parent.mkdir()
        file.write_text('{"multi_dense": {"AP": 0.5, "latency_ms": 9.0}}')
    with pytest.raises(ValueError, match=r"multi/results.json: another file is called 'results', too"):
        read_evaluations(files, "AP")


def test_scaling_draws_storage_and_latency(tmp_path: Path) -> None:
    points, hardware = read_points(write(tmp_path / "storage.json", {"hardware": "a machine", "points": POINTS}))
    figure = plot_scaling(points, hardware)
    assert len(figure.axes) == 2
    for axes, name in zip(figure.axes, ("bytes", "latency_ms"), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        for line, masks in zip(axes.get_lines(), (1, 4), strict=True):
            assert list(line.get_xdata()) == [1000, 10_000, 100_000]
            expected = {point["passages"]: point[name] for point in POINTS if point["system"] == f"K_p = {masks}"}
            assert list(line.get_ydata()) == [expected[size] for size in (1000, 10_000, 100_000)]
        assert [line.get_color() for line in axes.get_lines()] == list(COLOURS[:2])
    assert faults(figure) == []
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "10 MB" in ticks
    assert "1 GB" in ticks


def test_latency_draws_encoding_and_search(tmp_path: Path) -> None:
    parts, made_on = read_latency(write(tmp_path / "latency.json", LATENCY))
    figure = plot_latency(parts, made_on, "A title")
    assert made_on == "a machine\n2 layers"
    for axes, part, ticks in zip(figure.axes, parts, ((8, 32, 256), (1000, 10_000, 100_000)), strict=True):
        lines = axes.get_lines()
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)  # all told apart
        for line, system in zip(lines, dict.fromkeys(point["system"] for point in parts[part]), strict=True):
            took = {point.get("tokens", point.get("passages")): point["latency_ms"] for point in parts[part]
                    if point["system"] == system}  # fmt: skip
            assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(tick, took[tick]) for tick in ticks]
    assert faults(figure) == []


def framed(figure: Any) -> tuple[float, float]:
    """Return column and row of the framed cell."""
    frame = figure.axes[0].patches[0]
    return frame.get_x() + frame.get_width() / 2, frame.get_y() + frame.get_height() / 2


def test_budget_draws_a_cell_for_each_pair(tmp_path: Path) -> None:
    grid, score = read_grid(write(tmp_path / "grid.json", {"metric": "nDCG@10", "grid": GRID}))
    assert len(grid) == 5
    assert grid[4, 16] == pytest.approx(0.656)
    figure = plot_budget(grid, score, "title")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "4"]
    texts = {tuple(text.get_position()): text for text in axes.texts}
    assert {place: text.get_text() for place, text in texts.items()} == {
        (0, 0): "0.611", (1, 0): "0.614", (0, 1): "0.641", (1, 1): "0.644", (2, 1): "0.656"
    }  # fmt: skip
    assert [place for place, text in texts.items() if text.get_fontweight() == "bold"] == [(2, 1)]
    assert framed(figure) == pytest.approx((2, 1))
    assert figure.axes[1].get_ylabel() == "fused nDCG@10"
    assert faults(figure) == []
    for place, text in texts.items():  # light on dark, dark on light
        shade = sum(axes.images[0].cmap(axes.images[0].norm(float(text.get_text())))[:3]) / 3
        assert (text.get_color() == "white") == (shade < 0.5), place


def test_the_short_form_of_a_grid_and_equal_scores(tmp_path: Path) -> None:
    grid, _ = read_grid(write(tmp_path / "grid.json", {"16,4": 0.5, "1, 4": 0.5, "1,1": 0.5}))
    assert grid == {(1, 1): 0.5, (1, 4): 0.5, (16, 4): 0.5}
    figure = plot_budget(grid)
    assert framed(figure) == pytest.approx((0, 0))  # the cheapest of equals
    assert faults(figure) == []


def test_large_grids_and_many_systems_stay_readable() -> None:
    counts = (1, 2, 4, 8, 16, 32)
    assert faults(plot_budget({(k_q, k_p): 0.5 + k_q * k_p / 5000 for k_q in counts for k_p in counts})) == []
    systems = [{**point, "system": f"$K_q$ = 4, $K_p$ = {number}"} for point in POINTS for number in range(7)]
    assert faults(plot_scaling(systems, "AMD EPYC, 2 threads; torch 2.13.0", "A title of some length")) == []
    with pytest.raises(ValueError, match="8 systems are too many for one picture; at most 7"):
        plot_scaling([*systems, {**POINTS[0], "system": "one more"}])
    releases = [Timed(f"release {number}", "multi_dense", 1.0, 0.5) for number in range(len(MARKERS) + 1)]
    with pytest.raises(ValueError, match="8 different series are too many for one picture"):
        plot_quality(releases, "AP")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_command_writes_pictures(plot: Command, tmp_path: Path, ending: str) -> None:
    evaluation = write(tmp_path / "evaluation.json", EVALUATION)
    storage = write(tmp_path / "storage.json", {"hardware": "a machine", "points": POINTS})
    grid = write(tmp_path / "grid.json", {"grid": GRID})
    latency = write(tmp_path / "latency.json", LATENCY)
    for kind, source in (("quality", evaluation), ("scaling", storage), ("latency", latency), ("budget", grid)):
        output = tmp_path / "new" / f"{kind}.{ending}"
        assert plot(kind, "--input", source, "--output", output, "--title", "A title") == 0
        start = output.read_bytes()[:5]
        assert start == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[ending]


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("quality", {"multi_dense": {"nDCG@10": 0.5}}, "no mode has 'latency_ms'; write the file with"),
        (
            "quality",
            {"multi_dense": {"AP": 0.5, "latency_ms": 1.0}},
            "multi_dense has no 'nDCG@10', only AP, latency_ms",
        ),
        ("quality", [], "expected a JSON object, got list"),
        (
            "quality",
            {"multi_dense": {"nDCG@10": [], "latency_ms": 1}},
            "'nDCG@10' of multi_dense is []; expected a num",
        ),
        (
            "quality",
            {"multi_dense": {"nDCG@10": math.nan, "latency_ms": 1}},
            "'nDCG@10' of multi_dense is nan; expected a number",
        ),
        ("scaling", {"points": []}, 'expected a list "points"'),
        (
            "scaling",
            {"points": [POINTS[0], {**POINTS[1], "bytes": math.inf}]},
            "point 1 (from 0): 'bytes' is inf; expected a number",
        ),
        (
            "scaling",
            {"points": [POINTS[0], {**POINTS[1], "bytes": 0}]},
            "point 1 (from 0): 'bytes' is 0; expected a number",
        ),
        ("scaling", {"points": [{**POINTS[1], "system": 4}]}, "point 0 (from 0): 'system' is 4; expected a text"),
        ("latency", {"encoding": POINTS}, "point 0 (from 0): 'tokens' is None; expected a number above 0"),
        (
            "latency",
            {**LATENCY, "search": []},
            'expected a list "search" with at least one entry, as benchmarks/latency',
        ),
        ("budget", {"grid": [{"num_query_masks": 1, "fused": 0.5}]}, "entry 0 (from 0) of the grid needs"),
        ("budget", {"grid": [GRID[0], GRID[0]]}, "K_q = 1, K_p = 1 stands there twice"),
        ("budget", {"grid": [{**GRID[0], "fused": "high"}]}, "entry 0 (from 0) of the grid needs"),
        ("budget", {"grid": [{**GRID[0], "fused": math.nan}]}, "'fused', numbers; it has {'num_query_masks': 1"),
        ("budget", {"1,4": -math.inf}, "got '1,4': -inf"),
        ("budget", {"grid": [7]}, "entry 0 (from 0) of the grid is no object"),
        ("budget", {"grid": []}, '"grid" must be a list with at least one entry'),
        ("budget", {"one,four": 0.5}, "got 'one,four': 0.5"),
        ("budget", {}, "holds no budget"),
    ],
)
def test_wrong_input_is_status_2(
    plot: Command, tmp_path: Path, kind: str, content: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "input.json", content)
    assert plot(kind, "--input", source, "--output", tmp_path / "picture.png") == 2
    said = capsys.readouterr().err
    assert words in said
    assert "input.json" in said
    assert not (tmp_path / "picture.png").exists()


def test_wrong_files_and_a_missing_package(
    plot: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = write(tmp_path / "grid.json", {"grid": GRID})
    assert plot("budget", "--input", grid, "--output", tmp_path / "picture.docx") == 2
    assert "picture.docx: the picture's file must end in one of .png, .svg, .pdf" in capsys.readouterr().err
    assert plot("budget", "--input", tmp_path / "absent.json", "--output", tmp_path / "picture.png") == 2
    assert "absent.json" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert plot("budget", "--input", tmp_path / "broken.json", "--output", tmp_path / "picture.png") == 2
    assert "broken.json: not valid JSON" in capsys.readouterr().err
    assert plot("budget", "--input", grid, "--score", "speed", "--output", tmp_path / "picture.png") == 2
    assert "'speed', numbers; it has {'num_query_masks': 1" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot("budget", "--input", grid, "--output", tmp_path / "picture.png") == 2
    assert 'plots need matplotlib: pip install -e ".[retrieval]"' in capsys.readouterr().err
