"""What the parsers of several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..search.modes import FUSIONS
from .examples import EXAMPLES
from .exit_status import IN_WORDS
from .parser import suggestion

AGAIN = "Run the same command again."
RESUMED = "The same command goes on from what is there."


def add_command(
    commands: Any,
    name: str,
    help_text: str,
    run: Callable[[argparse.Namespace], int],
    description: str | None = None,
    again: str = AGAIN,
) -> Any:
    """Add a sub-command to a parser's `add_subparsers` object.

    Args:
        commands: that object.
        name: of the sub-command.
        help_text: a line for the list of commands.
        run: takes the parsed arguments and returns the exit status.
        description: what its help begins with (default: the line); it ends with an example and the exit statuses.
        again: what to say where another try helps: after Ctrl-C, on a full disk.

    Returns:
        Its parser.
    """
    parser = commands.add_parser(
        name,
        help=help_text,
        description=description or f"{help_text[0].upper()}{help_text[1:]}.",
    )
    known_as = parser.prog.split(" ", 1)[1]
    example = EXAMPLES.get(known_as) or EXAMPLES[f"publish {known_as}"].removeprefix("publish ")  # of publish.py
    parser.epilog = f"Example:\n  {parser.prog.split()[0]} {example}\n\n{IN_WORDS}"
    parser.set_defaults(run=run, again=again)
    return parser


COLLECTION, TIMEOUT = "passages", 60.0


def add_qdrant_options(parser: Any, required: bool) -> None:
    """Add the options that say where a Qdrant collection is."""
    parser.add_argument(
        "--qdrant",
        required=required,
        help="a Qdrant server's address (http://… or https://…; its key is read from the environment variable "
        "QDRANT_API_KEY), or a folder, for Qdrant's engine in this process",
    )
    parser.add_argument("--collection", help=f"its name (default: {COLLECTION})")
    parser.add_argument("--api-key", "--api", action=_RefusedKey, help=argparse.SUPPRESS)
    parser.add_argument("--timeout", type=seconds, help=f"seconds for an answer (default: {TIMEOUT:g})")


def collection_of(options: argparse.Namespace) -> tuple[str, float]:
    """Return the Qdrant collection's name and the seconds for an answer."""
    return COLLECTION if options.collection is None else options.collection, options.timeout or TIMEOUT


class _RefusedKey(argparse.Action):
    """A key on the command line: everybody on the machine may read it there."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error("--api-key: the list of processes shows it; set the environment variable QDRANT_API_KEY instead")


def seconds(text: str) -> float:
    """Return the positive number of seconds that an argument is."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r:.80}")
    return found


def add_fusion_options(parser: Any) -> None:
    """Add the options that say how the fusion modes fuse."""
    add_fusion_option(parser)
    add_weight_option(parser)


def add_weight_option(parser: Any) -> None:
    """Add --fusion-weight."""
    told = "the dense share in the fusion modes (default: the release's own, else half)"
    parser.add_argument("--fusion-weight", type=float, metavar="SHARE", help=told)


def add_fusion_option(parser: Any) -> None:
    """Add --fusion."""
    parser.add_argument(
        "--fusion",
        choices=FUSIONS,
        default="exact",
        help="exact: both scores of each candidate; runs: the two rankings alone, as in the paper's tables (default: "
        "%(default)s)",
    )


def count(text: str, least: int = 1) -> int:
    """Return the whole number of at least `least` that an argument is."""
    if not text.isdecimal() or len(text) > 18 or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r:.80}")
    return int(text)


def count_or_none(text: str) -> int:
    """Return the whole number that an argument is, 0 included."""
    return count(text, least=0)


def share(text: str) -> float:
    """Return the number from 0 to 1 that an argument is."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r:.80}")
    return found


def usable_device(text: str) -> str:
    """Return the device that an argument names, where this machine has it."""
    import torch

    try:
        if torch.empty(0, device=text).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        words = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"no such device on this machine: {text!r:.80} ({words:.200})") from error
    return text


def usable_device_or_auto(text: str) -> str:
    """Return the same, or "auto", which the model's loading reads."""
    return text if text == "auto" else usable_device(text)


def add_recipe_option(parser: Any, part: str) -> None:
    """Add --recipe.

    Args:
        parser: of a command.
        part: whose recipes come with the package, "training" or "pretraining".
    """
    names = ", ".join(path.stem for path in _packaged_recipes(part))
    parser.add_argument("--recipe", required=True, help=f"YAML file, or the name of one of ours: {names}")


def find_recipe(given: str, part: str) -> Path:
    """Return the file that --recipe names: a path, or the name of a recipe that comes with the package.

    Raises:
        FileNotFoundError: neither; the message has the names.
    """
    if Path(given).is_file():
        return Path(given)
    packaged = {path.stem: path for path in _packaged_recipes(part)}
    if given not in packaged:
        near = suggestion(Path(given).stem, packaged)
        raise FileNotFoundError(
            f"--recipe: {given}: no such recipe; expected a YAML file or one of {', '.join(packaged)}{near or '.'}"
        )
    return packaged[given]


def _packaged_recipes(part: str) -> list[Path]:
    return sorted((Path(__file__).parents[1] / part / "recipes").glob("*.yaml"))
