"""The sub-command `diffretriever plot`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command
from .exit_status import DONE, IN_WORDS

WHAT = "draw measurements as pictures, PNG, SVG or PDF"


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = commands.add_parser("plot", help=WHAT, description=f"D{WHAT[1:]}.", epilog=IN_WORDS)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    quality = _kind(kinds, "quality", "quality against latency", run_quality, several=True)
    quality.add_argument("--metric", default="nDCG@10", help="of the evaluation (default: nDCG@10)")
    quality.add_argument("--dataset", help="that the evaluations are of, to be named beside the metric")
    _kind(kinds, "scaling", "storage and latency against corpus size", run_scaling)
    _kind(kinds, "latency", "encoding and search latency of the methods", run_latency)
    budget = _kind(kinds, "budget", "the landscape of K_q and K_p", run_budget)
    budget.add_argument("--score", default="fused", help="which score of the grid's entries (default: fused)")


def _kind(kinds: Any, name: str, text: str, run: Any, several: bool = False) -> argparse.ArgumentParser:
    sources = {
        "quality": "JSON files of `diffretriever evaluate --latency N --json FILE`",
        "scaling": "JSON file of `benchmarks/storage.py`",
        "latency": "JSON file of `benchmarks/latency.py`",
        "budget": "JSON file of `diffretriever select-budget`",
    }
    parser: argparse.ArgumentParser = add_command(kinds, name, text, run, f"Draw {text}.")
    parser.add_argument(
        "--input", type=Path, nargs="+" if several else None, required=True, metavar="FILE", help=sources[name]
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture: .png, .svg or .pdf")
    parser.add_argument("--title", help="above the picture")
    return parser


def run_quality(options: argparse.Namespace) -> int:
    """Run `diffretriever plot quality`."""
    from ..evaluation.plots.quality import plot_quality, read_evaluations
    from ..evaluation.plots.style import save

    points = read_evaluations(options.input, options.metric)
    save(plot_quality(points, options.metric, options.title, options.dataset), options.output)
    return DONE


def run_scaling(options: argparse.Namespace) -> int:
    """Run `diffretriever plot scaling`."""
    from ..evaluation.plots.scaling import plot_scaling, read_points
    from ..evaluation.plots.style import save

    points, hardware = read_points(options.input)
    save(plot_scaling(points, hardware, options.title), options.output)
    return DONE


def run_latency(options: argparse.Namespace) -> int:
    """Run `diffretriever plot latency`."""
    from ..evaluation.plots.latency import plot_latency, read_latency
    from ..evaluation.plots.style import save

    parts, made_on = read_latency(options.input)
    save(plot_latency(parts, made_on, options.title), options.output)
    return DONE


def run_budget(options: argparse.Namespace) -> int:
    """Run `diffretriever plot budget`."""
    from ..evaluation.plots.budget import plot_budget, read_grid
    from ..evaluation.plots.style import save

    grid, score = read_grid(options.input, options.score)
    save(plot_budget(grid, score, options.title), options.output)
    return DONE
