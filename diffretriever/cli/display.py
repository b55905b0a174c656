"""Search results as text that fits the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..search.explain import Explanation, Word

LINES = 3  # of a passage
WORDS = 12  # of a sparse vector


def char_width(char: str) -> int:
    """Return the terminal columns of a character: 0 for a combining one, 2 for a wide one, else 1."""
    if unicodedata.combining(char) or unicodedata.category(char) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def text_width(text: str) -> int:
    """Return the terminal columns of a text.

    >>> text_width("naïve 検索")
    10
    """
    return sum(map(char_width, text))


def plain(text: str) -> str:
    """Return a text in one line, its control characters (a terminal would obey them) as spaces."""
    return " ".join("".join(" " if unicodedata.category(char) == "Cc" else char for char in text).split())


def wrap(text: str, width: int, lines: int = LINES) -> list[str]:
    """Break a text into at most `lines` lines of at most `width` columns; a cut text ends in an ellipsis.

    >>> wrap("one two three four", width=9, lines=2)
    ['one two', 'three fo…']
    """
    width = max(2, width)
    rest = plain(text)
    wrapped: list[str] = []
    while rest and len(wrapped) < lines:
        if len(wrapped) == lines - 1 and text_width(rest) > width:
            return [*wrapped, _fitting(rest, width - 1).rstrip() + "…"]
        line = _fitting(rest, width)
        if len(line) < len(rest) and rest[len(line)] != " ":  # not in the middle of a word, if it has a space
            line = line[: line.rfind(" ")] if " " in line else line
        wrapped.append(line.rstrip())
        rest = rest[len(line) :].lstrip()
    return wrapped


def _fitting(text: str, width: int) -> str:
    used = 0
    for place, char in enumerate(text):
        used += char_width(char)
        if used > width:
            return text[:place]
    return text


def result_lines(rank: int, score: float, text_id: str, text: str | None, columns: int) -> list[str]:
    """Return the lines of one hit.

    >>> result_lines(1, 0.73214, "p7", "A fast HTTP daemon.", columns=40)
    [' 1  0.7321  p7', '    A fast HTTP daemon.']
    """
    head = f"{rank:>2}  {score:.4f}  {plain(text_id)}"
    return [head, *_indented(text or "", columns)]


def explanation_lines(explanation: Explanation, columns: int) -> Iterator[str]:
    """Yield the lines of a question and what was found for it: scores, and the words of the sparse vectors.

    >>> from diffretriever.search.explain import Explanation, Word
    >>> print(*explanation_lines(Explanation("Seasons?", [Word("seasons", 1.5)], []), columns=40), sep="\\n")
    Seasons?
        words: seasons 1.50
    no passage found
    """
    yield from wrap(explanation.question, columns)
    yield from _indented(f"words: {_words(explanation.words)}", columns)
    for rank, match in enumerate(explanation.matches, start=1):
        yield from result_lines(rank, match.fused, match.id, match.text, columns)
        yield from _indented(f"dense {match.dense:.4f}, sparse {match.sparse:.4f}: {_words(match.words)}", columns)
    if not explanation.matches:
        yield "no passage found"


def _words(words: Sequence[Word]) -> str:
    """Return the first words with their weights, those of both sides in brackets."""
    shown = [f"[{word.text} {word.weight:.2f}]" if word.shared else f"{word.text} {word.weight:.2f}" for word in words]
    return ", ".join(shown[:WORDS]) or "none"


def _indented(text: str, columns: int) -> list[str]:
    return [f"    {line}" for line in wrap(text, columns - 4)]
