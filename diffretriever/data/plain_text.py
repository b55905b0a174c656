"""A text file as anyone writes one: a passage a line, or paragraphs where blank lines stand between them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from ..files.lines import read_lines
from .corpus import Passage, format_of, read_small_corpus


def read_text_or_corpus(source: str | Path) -> Iterator[Passage]:
    """Read the passages of a plain text file, or of whatever `read_small_corpus` reads.

    Args:
        source: a file that is not called as one of a corpus is holds plain text, whatever its ending.

    Yields:
        Passages in their order; a plain text's ids are `line N`, where each begins.

    Raises:
        FileNotFoundError, ValueError: as `read_small_corpus`; a text without a word, or not in UTF-8.
    """
    path = Path(source)
    yield from _read_plain_text(path) if path.is_file() and format_of(path.name) is None else read_small_corpus(source)


def _read_plain_text(path: Path) -> Iterator[Passage]:
    lines = list(read_lines(path))
    blocks = [list(group) for filled, group in groupby(lines, lambda line: bool(line[1].strip())) if filled]
    if not blocks:
        raise ValueError(f"{path}: no text in it; expected a passage a line, or paragraphs between blank lines.")
    if len(blocks) == 1:
        blocks = [[line] for line in blocks[0]]
    for block in blocks:
        yield Passage(f"line {block[0][0]}", " ".join(text.strip() for _, text in block))
