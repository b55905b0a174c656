"""argparse as all commands and benchmarks use it: whole option names, old ones for one version, suggestions."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

# Names of before, and those that took their place; where a command has several of these, each gets the value.
OLD_NAMES = {
    "--folder": ("--scratch",),
    "--masks": ("--num-query-masks", "--num-passage-masks"),
    "--num-masks": ("--num-query-masks", "--num-passage-masks"),
    "--out": ("--output",),
    "--passage-masks": ("--num-passage-masks",),
    "--passages": ("--num-passages",),
    "--queries": ("--num-queries",),
    "--query-masks": ("--num-query-masks",),
    "--release": ("--model",),
    "--repeats": ("--rounds",),
    "--results": ("--input",),
    "--runs": ("--run-folder",),
    "--texts": ("--num-texts",),
    "--width": ("--hidden-size",),
}
LAST_VERSION = "0.2"  # the first one without the old names


class Parser(argparse.ArgumentParser):
    """A parser that takes option names as a whole.

    An old name of `OLD_NAMES` stands for the new ones, with a line on stderr, in commands that have these and not the
    old one. An unknown option ends the program with the usage of the command that it was given to, and the name nearest
    to it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Do as argparse does, which calls this for sub-commands, too; but leave nothing unknown."""
        found, rest = super().parse_known_args(list(self._current(sys.argv[1:] if args is None else args)), namespace)
        many = next((action for action in self._actions if action.nargs == "*" and not action.option_strings), None)
        if rest and (many is None or any(word.startswith("-") for word in rest)):
            self.error(f"unexpected: {' '.join(rest)}")
        if rest and many is not None:  # words behind an option, where argparse took those before it for all
            setattr(found, many.dest, [*getattr(found, many.dest), *rest])
        return found, []

    def _current(self, words: Sequence[str]) -> Iterator[str]:
        """Yield a command line with today's names; a sub-command's part is left to its own parser."""
        ours = self._option_string_actions
        rest = iter(words)
        for word in rest:
            name, sign, value = word.partition("=")
            is_option = name.startswith("--") and len(name) > 2 and " " not in name
            if word == "--" or (self._subparsers is not None and not is_option):
                yield from (word, *rest)
            elif not is_option or name in ours:
                yield word
            elif new := [option for option in OLD_NAMES.get(name, ()) if option in ours]:
                told = f"{name} is called {' and '.join(new)} now; the old name works until version {LAST_VERSION}"
                print(f"{self.prog}: {told}", file=sys.stderr)
                values = [value] if sign else [one for one in (next(rest, None),) if one is not None]
                yield from (part for option in new for part in (option, *values))
            else:
                self.error(f"unknown option {name}{suggestion(name, ours)}")

    def error(self, message: str) -> NoReturn:
        """End the program with the usage and a message; a wrong choice gets the one nearest to it."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        super().error(message + (suggestion(wrong[1], re.findall(r"[\w.-]+", wrong[2])) if wrong else ""))


def suggestion(name: str, known: Any) -> str:
    """Return a question with the name that was perhaps meant, or nothing.

    >>> suggestion("--topk", ["--top-k", "--mode"])
    '; did you mean --top-k?'
    """
    longer = [one for one in known if one.startswith(name)]
    near = longer[:1] if len(longer) == 1 else difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
