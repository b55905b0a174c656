"""What reaches a terminal that cannot show every character."""

from __future__ import annotations

import io
import json
import sys
from typing import Any


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
