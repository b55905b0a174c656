"""Corpora, queries and relevance judgements, read one record at a time from the formats of the field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.lines import COMPRESSIONS, read_lines, read_objects
from ..model.tokenization_helpers import without_lone_surrogates
from .datasets_reader import read_dataset, read_parquet
from .texts import join_title

ID_FIELDS = ("_id", "id", "docid", "doc_id", "pid", "corpus-id", "query-id", "query_id", "qid")
TEXT_FIELDS = ("text", "contents", "passage", "body", "query")
TITLE_FIELDS = ("title",)
FORMATS = "a BEIR folder, .jsonl or .tsv (also .gz, .xz, .zst), .parquet, or hf:NAME[:SPLIT]"


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
            folder of .parquet parts, or a Hugging Face dataset, `hf:NAME[:SPLIT]` or `hf:NAME:CONFIG:SPLIT`.

    Yields:
        Passages; ids are kept exactly, numbers become their decimal digits.

    Raises:
        FileNotFoundError: no such file or folder, or no corpus in the folder.
        ValueError: a malformed record; the message names file and line.
        ImportError: the format needs a package that is not installed.
    """
    for where, record in _records(source, "corpus"):
        yield Passage(_id_of(record, where), _text_of(record, where))


def read_queries(source: str | Path) -> Iterator[Query]:
    """Read queries in their order, from the same formats as a corpus (a folder's `queries` file).

    Raises:
        As `read_corpus`; also ValueError for an id that occurs twice.
    """
    seen: dict[str, str] = {}
    for where, record in _records(source, "queries"):
        query = Query(_id_of(record, where), _text_of(record, where))
        if query.id in seen:
            raise ValueError(f"{where}: the id {query.id!r} is already that of {seen[query.id]}; ids must differ.")
        seen[query.id] = where
        yield query


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read relevance judgements: BEIR's TSV with a header line, or TREC's four columns.

    Args:
        path: the file, plain or compressed.

    Returns:
        {query id: {passage id: grade}}

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed line, no judgement at all, or one pair with two grades; names file and line.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        fields = line.split("\t") if "\t" in line else line.split()
        if number == 1 and len(fields) == 3 and not _is_whole(fields[2]):
            continue  # BEIR's header
        query, passage, grade = _judgement(fields, where)
        if qrels.setdefault(query, {}).setdefault(passage, grade) != grade:
            raise ValueError(f"{where}: query {query!r} and passage {passage!r} were judged before, otherwise.")
    if not qrels:
        raise ValueError(f"{path}: no judgements; expected lines of query id, passage id and grade.")
    return qrels


def _judgement(fields: list[str], where: str) -> tuple[str, str, int]:
    if len(fields) not in (3, 4) or not _is_whole(fields[-1]):
        raise ValueError(
            f"{where}: expected query id, passage id and a whole-number grade (BEIR), or query id, 0, passage id and "
            f"grade (TREC); got {len(fields)} columns: {fields!r:.120}."
        )
    return fields[0], fields[-2], int(fields[-1])


def _is_whole(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def _records(source: str | Path, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where, fields) of each record; `where` names file and line for messages."""
    if str(source).startswith("hf:"):
        yield from read_dataset(str(source), kind)
        return
    for file in source_files(source, kind):
        name = file.name
        for suffix in COMPRESSIONS:
            name = name.removesuffix(suffix)
        if name.endswith((".jsonl", ".ndjson")):
            yield from ((f"{file}, line {number}", record) for number, record in read_objects(file))
        elif name.endswith(".tsv"):
            yield from _read_tsv(file)
        elif name.endswith(".parquet"):
            yield from read_parquet(file, {*ID_FIELDS, *TEXT_FIELDS, *TITLE_FIELDS})
        else:
            raise ValueError(f"{file}: not a format that can be read; expected {FORMATS}.")


def source_files(source: str | Path, kind: str = "corpus") -> list[Path]:
    """Return the file or files that a source stands for.

    Args:
        source: a file or a folder.
        kind: "corpus" or "queries", the file to take from a BEIR folder.

    Raises:
        FileNotFoundError: nothing there to read.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder; expected {FORMATS}.")
    names = [kind, "collection"] if kind == "corpus" else [kind]
    endings = [kind_of + end for kind_of in (".jsonl", ".tsv") for end in ("", *COMPRESSIONS)]
    for name in names:
        for ending in (*endings, ".parquet"):
            if (path / f"{name}{ending}").is_file():
                return [path / f"{name}{ending}"]
    for folder in (path / kind, path):
        if parts := sorted(folder.glob("*.parquet")):
            return parts
    raise FileNotFoundError(f"{path}: the folder holds no {kind} file; expected {kind}.jsonl, .tsv or .parquet.")


def _read_tsv(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the records of a TSV file: MS MARCO's id and text, or id, title and text, or columns as its header says."""
    columns: list[str] | None = None
    for number, line in read_lines(file):
        if not line:
            continue
        fields = line.split("\t")
        if columns is None:
            if fields[0] in ID_FIELDS and set(fields[1:]) & {*TEXT_FIELDS}:
                columns = fields
                continue
            columns = {2: ["id", "text"], 3: ["id", "title", "text"]}.get(len(fields), [])
        if len(fields) != len(columns):
            expected = f"{len(columns)} columns" if columns else "2 columns (id, text) or 3 (id, title, text)"
            raise ValueError(f"{file}, line {number}: expected {expected} between tabs, got {len(fields)}.")
        yield f"{file}, line {number}", dict(zip(columns, fields, strict=True))


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
        shown = ", ".join(ID_FIELDS[:3])
        raise ValueError(f"{where}: the id is missing, empty or no text ({name!r}: {value!r:.80}); looked for {shown}.")
    if without_lone_surrogates(value) != value:
        raise ValueError(f"{where}: the id {value!r} holds half a surrogate pair, which UTF-8 cannot keep exactly.")
    return value


def _text_of(record: Mapping[str, Any], where: str) -> str:
    name, text = _field(record, TEXT_FIELDS)
    title_name, title = _field(record, TITLE_FIELDS)
    for field, value in ((name, text), (title_name, "" if title is None else title)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: {field!r} is missing or no text ({value!r:.80}).")
    return without_lone_surrogates(join_title(title, text))  # a store holds what was encoded
