"""The command `diffretriever`. Each package of tools registers its own sub-commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .retrieval import encode_command as encode
from .retrieval.evaluation import command as evaluation
from .retrieval.plots import command as plots
from .retrieval.search import command as search
from .training import commands as training

# Functions that add sub-commands; a command sets `run`, which takes the parsed arguments and returns the exit status.
REGISTER: tuple[Callable[[Any], None], ...] = (
    encode.register,
    search.register,
    evaluation.register,
    plots.register,
    training.register,
)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with every sub-command."""
    parser = argparse.ArgumentParser(prog="diffretriever", description="Diffusion language models as retrievers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for register in REGISTER:
        register(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        Exit status: 0, or 2 where an input is wrong (the message on stderr says which and what was expected).
    """
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (FileNotFoundError, ValueError, FloatingPointError, ImportError) as error:
        print(f"diffretriever {options.command}: {error}", file=sys.stderr)
        return 2
    return status
