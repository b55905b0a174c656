"""Records of TSV files: MS MARCO's, in which quotation marks are text, and pandas', in which they may hold a field."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ..files.lines import MAX_LINE, read_lines

QUOTED = re.compile(r'"([^"]*(?:""[^"]*)*)"(?=\t|\Z)')  # a quotation mark within is doubled
LEFT_OPEN = re.compile(r'"[^"]*(?:""[^"]*)*\Z')
CLOSING = re.compile(r'[^"]*(?:""[^"]*)*"(?!")')
ADVICE = "Write the file as .jsonl, or as pandas' to_csv(sep='\\t', index=False) does."


def read_tsv(file: Path, ids: Collection[str], texts: Collection[str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield (where, fields) of each record.

    Columns are named by a first line that has one of `ids` and one of `texts` in it; without one there are two, id and
    text. A field in quotation marks is read as it was before it was quoted where only quoting explains it: it holds a
    tab, a line end or doubled quotation marks, or every field of the first line is quoted. Else the marks are text.

    Args:
        file: plain or compressed.
        ids: names of the id's column.
        texts: names of the text's column.

    Raises:
        ValueError: another number of columns, three or more without names, a first line that names the id's alone, or a
            quoted field that is not closed or could also be read otherwise; the message names file and line.
    """
    lines = ((number, line) for number, line in read_lines(file))
    first = next(((number, line) for number, line in lines if line), None)
    if first is None:
        return
    number, line = first
    everywhere = all(QUOTED.fullmatch(field) for field in line.split("\t"))
    names = [name.strip().lower() for name in _split(line, everywhere) or []]
    headed = not {*ids}.isdisjoint(names) and not {*texts}.isdisjoint(names)
    if not headed and len(names) == 2 and names[0] in ids:
        raise ValueError(
            f"{file}, line {number}: {', '.join(names)!r:.200} look like names of columns, of which none is a text's; "
            f"name it one of {', '.join(texts)}."
        )
    columns = names if headed else ["id", "text"]
    if len(set(columns)) < len(columns):
        raise ValueError(f"{file}, line {number}: two columns have one name: {', '.join(columns)!r:.200}.")
    for number, fields in _rows(file, None if headed else first, lines, len(columns), headed, everywhere):
        if len(fields) != len(columns):
            raise ValueError(f"{file}, line {number}: {_misfit(len(fields), len(columns), headed)}")
        yield f"{file}, line {number}", dict(zip(columns, fields, strict=True))


def _misfit(found: int, expected: int, headed: bool) -> str:
    if headed:
        return f"expected {expected} columns between tabs, as the first line has, got {found}."
    return (
        f"expected 2 columns between tabs, id and text, got {found}. Other columns need names: begin the file with a "
        "line such as id<TAB>title<TAB>text."
    )


def _rows(
    file: Path,
    line: tuple[int, str] | None,
    lines: Iterator[tuple[int, str]],
    width: int,
    headed: bool,
    everywhere: bool,
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and fields of each record of `line` and `lines`; blank lines between records are passed over."""
    line = line or next(lines, None)
    while line is not None:
        number, text = line
        line = next(lines, None)
        if not text:
            continue
        fields = _split(text, everywhere)
        if fields is None:
            plain = text.split("\t")
            if len(plain) == width and (line is None or len(line[1].split("\t")) == width):
                if headed:  # MS MARCO's own files, in which no mark quotes, have no header
                    raise ValueError(f"{file}, line {number}: a field opens with a quotation mark, unclosed. {ADVICE}")
                fields = plain
            else:
                fields = _split(_joined(file, number, text, line, lines), everywhere) or []
                line = next(lines, None)
        yield number, fields


def _joined(file: Path, number: int, text: str, line: tuple[int, str] | None, lines: Iterator[tuple[int, str]]) -> str:
    """Return a record that goes over several lines."""
    parts, size = [text], len(text)
    while line is not None and size <= MAX_LINE:
        parts.append(line[1])
        size += len(line[1]) + 1
        closing = CLOSING.match(line[1])
        if closing is not None:
            if closing.end() < len(line[1]) and line[1][closing.end()] != "\t":
                break
            joined = "\n".join(parts)
            if _split(joined, False) is not None:
                return joined
        line = next(lines, None)
    raise ValueError(f"{file}, line {number}: a field opens with a quotation mark, and no such field ends. {ADVICE}")


def _split(line: str, everywhere: bool) -> list[str] | None:
    """Return a record's fields; None where its last one is quoted and still open.

    Args:
        line: the record, or its beginning.
        everywhere: all fields are quoted, also those that need not be.
    """
    if '"' not in line:
        return line.split("\t")
    fields, place = [], 0
    while place <= len(line):
        quoted = QUOTED.match(line, place)
        if quoted is not None:
            needed = everywhere or '""' in quoted[1] or not {*"\t\r\n"}.isdisjoint(quoted[1])
            fields.append(quoted[1].replace('""', '"') if needed else quoted[0])
            place = quoted.end() + 1
            continue
        if LEFT_OPEN.match(line, place):
            return None
        end = line.find("\t", place)
        end = len(line) if end < 0 else end
        fields.append(line[place:end])
        place = end + 1
    return fields
