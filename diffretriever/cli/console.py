"""What reaches the terminal: characters that it can show, and what its user can act on; and what is asked there."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

PROMPT = "question> "
# Libraries whose warnings a command's user cannot act on: of deprecated calls, of kernels that are not there
OTHERS = "accelerate bitsandbytes faiss huggingface_hub matplotlib peft qdrant_client torch transformers".split()


def open_what_is_closed() -> None:
    """Give standard streams that a process was begun without, as services may be, nothing to read and nowhere to print.

    Python has None for them, and the next file that is opened gets their number, which libraries print to.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # as long as the process


def replace_what_cannot_be_shown() -> None:
    """Let standard output and error print "?" for characters that their encoding lacks, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def json_line(value: Any) -> str:
    """Return JSON on one line, with escapes where standard output could not say its characters."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return line


def check_questions(questions: Sequence[str]) -> None:
    """Raise ValueError where a question has no words."""
    if any(not question.strip() for question in questions):
        raise ValueError('a question is empty; give its words: "what causes the seasons".')


def read_questions(place: str) -> Iterator[str]:
    """Yield questions, a line each of standard input; on a terminal with a prompt, and a word of what is asked."""
    asking = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # one byte of another encoding ends no session
    if asking:
        print(f"{place}: a question a line; Ctrl-D ends.", file=sys.stderr)
    while True:
        if asking:
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep other libraries' warnings back while a command runs; errors, and what is ours, are shown."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("bitsandbytes",)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=rf"({'|'.join(OTHERS)})(\.|$)")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)
