"""The command `diffretriever`: one module a sub-command, one way in which they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import (
    compress,
    encode,
    evaluate,
    evaluate_mean_pooling,
    export,
    index,
    mine_negatives,
    plot,
    pretrain,
    publish,
    search,
    select_budget,
    train,
)
from .exit_status import EXPECTED, TRY_AGAIN, status_of

# Each has `register`, which adds its sub-command; that sets `run`, which takes the parsed arguments.
COMMANDS = (
    encode,
    search,
    index,
    compress,
    export,
    evaluate,
    plot,
    pretrain,
    train,
    mine_negatives,
    select_budget,
    evaluate_mean_pooling,
    publish,
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every sub-command."""
    parser = argparse.ArgumentParser(prog="diffretriever", description="Diffusion language models as retrievers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        The exit status; see `exit_status`.
    """
    options = build_parser().parse_args(arguments)
    return run(options, f"diffretriever {options.command}")


def run(options: argparse.Namespace, program: str) -> int:
    """Run a parsed command and turn its errors into words on stderr and an exit status."""
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted. {_again(options)}", file=sys.stderr)
        return TRY_AGAIN
    except EXPECTED as error:
        status = status_of(error)
        print(f"{program}: {error}{f'. {_again(options)}' if status == TRY_AGAIN else ''}", file=sys.stderr)
    return status


def _again(options: argparse.Namespace) -> str:
    """Say that another try helps, in the command's own words where it has some."""
    return str(getattr(options, "again", "The same command goes on from what is there."))
