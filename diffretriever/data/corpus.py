"""Corpora and queries, read one record at a time from the formats of the field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.lines import COMPRESSIONS, read_objects
from ..model.tokenization_helpers import without_lone_surrogates
from .datasets_reader import read_dataset, read_parquet
from .texts import join_title
from .tsv import read_tsv

ID_FIELDS = ("_id", "id", "docid", "doc_id", "pid", "corpus-id", "query-id", "query_id", "qid")
TEXT_FIELDS = ("text", "contents", "passage", "body", "query")
TITLE_FIELDS = ("title",)
LINE_FORMATS = (".jsonl", ".ndjson", ".tsv")
KINDS = {"corpus": ("corpus", "collection"), "queries": ("queries",), "qrels": ("qrels",)}  # what files are called
FORMATS = "a BEIR folder, .jsonl or .tsv (also .gz, .xz, .zst), .parquet, a folder of such parts, or hf:NAME[:SPLIT]"


@dataclass(frozen=True)
class Passage:
    """One passage of a corpus; a title stands before its text as "title. text"."""

    id: str
    text: str


@dataclass(frozen=True)
class Query:
    """One query."""

    id: str
    text: str


def read_corpus(source: str | Path) -> Iterator[Passage]:
    """Read the passages of a corpus in their order; memory does not grow with it.

    Args:
        source: a BEIR folder (its `corpus` file), a .jsonl or .tsv file (also .gz, .xz, .zst), a .parquet file, a
            folder of such files (`part0.jsonl` …; all of one format), or a Hugging Face dataset, `hf:NAME[:SPLIT]` or
            `hf:NAME:CONFIG:SPLIT`.

    Yields:
        Passages; ids are kept exactly, numbers become their decimal digits.

    Raises:
        FileNotFoundError: no such file or folder, or no corpus in the folder.
        ValueError: a malformed record; the message names file and line.
        ImportError: the format needs a package that is not installed.
    """
    for where, record in _records(source, "corpus"):
        yield Passage(_id_of(record, where), _text_of(record, where))


def read_small_corpus(source: str | Path) -> Iterator[Passage]:
    """Read a corpus that is to be held in memory, as this does with its ids.

    Raises:
        As `read_corpus`; also ValueError for an id that occurs twice.
    """
    yield from (Passage(name, text) for name, text in _each_once(source, "corpus"))


def read_queries(source: str | Path) -> Iterator[Query]:
    """Read queries in their order, from the same formats as a corpus (a folder's `queries` file).

    Raises:
        As `read_corpus`; also ValueError for an id that occurs twice.
    """
    yield from (Query(name, text) for name, text in _each_once(source, "queries"))


def _each_once(source: str | Path, kind: str) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of each record; refuse an id that occurs twice."""
    seen: dict[str, str] = {}
    for where, record in _records(source, kind):
        name = _id_of(record, where)
        if name in seen:
            raise ValueError(f"{where}: the id {name!r:.80} is already that of {seen[name]}; ids must differ.")
        seen[name] = where
        yield name, _text_of(record, where)


def _records(source: str | Path, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where, fields) of each record; `where` names file and line for messages."""
    if str(source).startswith("hf:"):
        yield from read_dataset(str(source), kind)
        return
    for file in source_files(source, kind):
        ending = format_of(file.name)
        if ending in (".jsonl", ".ndjson"):
            yield from ((f"{file}, line {number}", record) for number, record in read_objects(file))
        elif ending == ".tsv":
            yield from read_tsv(file, ID_FIELDS, TEXT_FIELDS)
        elif ending == ".parquet":
            yield from read_parquet(file, {*ID_FIELDS, *TEXT_FIELDS, *TITLE_FIELDS})
        else:
            raise ValueError(f"{file}: not a format that can be read; expected {FORMATS}.")


def format_of(name: str) -> str | None:
    """Return the ending of a file's name that says its format."""
    if name.endswith(".parquet"):
        return ".parquet"
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return next((ending for ending in LINE_FORMATS if name.endswith(ending)), None)


def source_files(source: str | Path, kind: str = "corpus") -> list[Path]:
    """Return the file or files that a source stands for.

    Args:
        source: a file or a folder.
        kind: "corpus" or "queries", the file to take from a BEIR folder.

    Raises:
        FileNotFoundError: nothing there to read.
        ValueError: a folder of several things, or one that lacks parts.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        what = "a pipe or a device, which cannot be read more than once" if path.exists() else "no such file or folder"
        raise FileNotFoundError(f"{source}: {what}; expected {FORMATS}.")
    compressed = [ending + packed for ending in LINE_FORMATS for packed in ("", *COMPRESSIONS)]
    for name in KINDS[kind]:
        for ending in (*compressed, ".parquet"):
            if (path / f"{name}{ending}").is_file():
                return [path / f"{name}{ending}"]
    if parts := _parts(path / kind, kind) or _parts(path, kind):
        return parts
    raise FileNotFoundError(
        f"{path}: the folder holds no {kind} file; expected {kind}.jsonl, .tsv or .parquet, or parts such as "
        f"part0.jsonl, part1.jsonl."
    )


def _parts(folder: Path, kind: str) -> list[Path]:
    """Return the parts that a folder holds, in the order of their numbers; [] where it holds none."""
    groups: dict[str, list[Path]] = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        ending = format_of(file.name)
        if ending is not None and file.is_file() and not file.name.startswith((".", "_")):
            # parts' names have all but their numbers in common; a folder `corpus` may hold any names
            groups.setdefault(ending if folder.name == kind else re.sub("[0-9]+", "#", file.name), []).append(file)
    named = {name: files for name, files in groups.items() if folder.name == kind or name.startswith(KINDS[kind])}
    if not named and not (kind == "queries" and (folder / "qrels").is_dir()):  # a benchmark's parts are its corpus
        others = tuple(name for names in KINDS.values() for name in names)
        named = {name: files for name, files in groups.items() if not name.startswith(others)}
        endings = {format_of(name) for name in named}
        if kind == "corpus" and len(endings) == 1:  # whatever the files of one format are called
            named = {"": [file for files in named.values() for file in files]}
    if len(named) > 1:
        some = ", ".join(sorted(files[0].name for files in named.values())[:4])
        raise ValueError(
            f"{folder}: which files are the {kind}? There are {some}; keep the parts in a folder of their own."
        )
    parts = sorted((file for files in named.values() for file in files), key=_by_numbers)
    of = {int(found[1]) for file in parts if (found := re.search(r"-of-([0-9]+)", file.name))}
    if of and of != {len(parts)}:
        raise ValueError(f"{folder}: {len(parts)} parts, which are called {parts[0].name}; some are missing.")
    return parts


def _by_numbers(file: Path) -> list[tuple[int, str]]:
    """Sort part10 after part2."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split("([0-9]+)", file.name)]


def _field(record: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    for name in names:
        if record.get(name) is not None:
            return name, record[name]
    return names[0], None


def _id_of(record: Mapping[str, Any], where: str) -> str:
    name, value = _field(record, ID_FIELDS)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        found = "is missing" if value is None else f"{name!r} is empty or no text ({value!r:.80})"
        raise ValueError(f"{where}: the id {found}; the field of ids is one of {', '.join(ID_FIELDS)}.")
    if without_lone_surrogates(value) != value:
        raise ValueError(f"{where}: the id {value!r:.80} holds half a surrogate pair, which UTF-8 cannot keep exactly.")
    return value


def _text_of(record: Mapping[str, Any], where: str) -> str:
    name, text = _field(record, TEXT_FIELDS)
    title_name, title = _field(record, TITLE_FIELDS)
    for field, value in ((name, text), (title_name, "" if title is None else title)):
        if value is None:
            raise ValueError(f"{where}: the text is missing; its field is one of {', '.join(TEXT_FIELDS)}.")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {field!r} is no text ({value!r:.80}).")
    return without_lone_surrogates(join_title(title, text))  # a store holds what was encoded
