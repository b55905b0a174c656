"""The sub-command `diffretriever average-adapters`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command
from .exit_status import DONE
from .train import find_adapter


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    what = "make the mean of adapters that went on from one"
    parser = add_command(commands, "average-adapters", what, run_average_adapters)
    told = "two or more, or releases that hold them: folders or Hub ids; the first one's lengths are the mean's"
    parser.add_argument("--adapters", nargs="+", required=True, metavar="ADAPTER", help=told)
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")


def run_average_adapters(options: argparse.Namespace) -> int:
    """Run `diffretriever average-adapters`."""
    from ..training.averaging import FILES, average_adapters

    cosine = average_adapters([find_adapter(name, FILES) for name in options.adapters], options.output)
    count = len(options.adapters)
    print(f"{options.output}: the mean of {count} adapters, whose factors A have a cosine of {cosine:.2f} or more")
    return DONE
