"""The command `diffretriever`: one module a sub-command, one way in which they end."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from .. import __version__
from ..files.memory import memory_is_full
from . import (
    analyze_budget,
    average_adapters,
    compress,
    demo,
    encode,
    evaluate,
    export,
    export_vllm,
    fetch_backbone,
    import_vectors,
    index,
    make_pairs,
    mine_negatives,
    plot,
    pretrain,
    publish,
    search,
    select_budget,
    train,
)
from .console import open_what_is_closed, quiet_libraries, replace_what_cannot_be_shown
from .examples import EXAMPLES
from .exit_status import (
    DONE,
    EXPECTED,
    IN_WORDS,
    TRY_AGAIN,
    cache_hint,
    is_failing_storage,
    status_of,
    told_of_full_memory,
)
from .parser import Parser
from .threads import wait_asleep

# Each has `register`, which adds its sub-command; that sets `run`, which takes the parsed arguments.
COMMANDS = (
    demo,
    encode,
    import_vectors,
    search,
    index,
    compress,
    export,
    export_vllm,
    evaluate,
    plot,
    fetch_backbone,
    pretrain,
    train,
    average_adapters,
    make_pairs,
    mine_negatives,
    select_budget,
    analyze_budget,
    publish,
)


def build_parser() -> Parser:
    """Return the parser with every sub-command."""
    what = "Diffusion language models as retrievers. Each command has its own help: diffretriever encode --help."
    parser = Parser(
        prog="diffretriever", description=what, epilog=f"Example:\n  diffretriever {EXAMPLES['search']}\n\n{IN_WORDS}"
    )
    parser.add_argument("--version", action="version", version=f"diffretriever {__version__}")
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
    prepare_process()
    options = build_parser().parse_args(arguments)
    return run(options, f"diffretriever {options.command}")


def prepare_process() -> None:
    """Do what comes before the parser, which may print a help or look for a device."""
    open_what_is_closed()
    replace_what_cannot_be_shown()
    wait_asleep()


@contextmanager
def interrupted_when_terminated() -> Iterator[None]:
    """Handle SIGTERM, a scheduler's polite stop, as Ctrl-C: folders for what is unfinished are removed."""
    if threading.current_thread() is not threading.main_thread():  # which alone may choose
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)  # None: a C library's


def run(options: argparse.Namespace, program: str) -> int:
    """Run a parsed command; print what stops it to stderr and return the exit status."""
    try:
        with interrupted_when_terminated(), quiet_libraries():
            status: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted. {options.again}", file=sys.stderr)
        return TRY_AGAIN
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except EXPECTED as error:
        again = f". {options.again}" if is_failing_storage(error) else ""
        print(f"{program}: {error}{again}{cache_hint(error)}", file=sys.stderr)
        return status_of(error)
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        print(f"{program}: {told_of_full_memory(error, options)}", file=sys.stderr)
        return TRY_AGAIN
    return status
