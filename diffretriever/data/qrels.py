"""Relevance judgements: BEIR's TSV, whose first line names its columns, and TREC's four columns."""

from __future__ import annotations

import re
from pathlib import Path

from ..files.lines import read_lines

# what the columns are called, in lower case and without - and _
NAMES = {
    "query": ("queryid", "qid", "query", "topic", "topicid", "topicno"),
    "passage": ("corpusid", "docid", "docno", "document", "documentid", "doc", "did", "pid", "passageid", "passage"),
    "grade": ("score", "relevance", "rel", "grade", "label", "judgment", "judgement", "relevancelabel", "qrel"),
}
ROLES = {name: role for role, names in NAMES.items() for name in names}
BEIR = ("query", "passage", "grade")
TREC = ("query", "", "passage", "grade")
LARGEST_GRADE = 1_000_000  # trec_eval takes 8 bytes for each grade up to a query's largest
WHOLE = re.compile(r"([+-]?[0-9]{1,9})(?:\.0*)?")


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read relevance judgements: BEIR's TSV with a header line, or TREC's four columns.

    Args:
        path: the file, plain or compressed. A first line that names its columns (query-id, corpus-id, score, and what
            else the field calls them) says their order; without one they are query id, passage id and grade, or query
            id, 0, passage id and grade.

    Returns:
        {query id: {passage id: grade}}

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed line, a grade that is no whole number or beyond a million, no judgement at all, or one
            pair with two grades; names file and line.
    """
    qrels: dict[str, dict[str, int]] = {}
    columns: tuple[str, ...] | None = None
    first = True
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        fields = line.split("\t") if "\t" in line else line.split()
        if first:
            first, columns = False, _named_columns(fields, where)
            if columns is not None:
                continue
        query, passage, grade = _judgement(fields, columns, where)
        if qrels.setdefault(query, {}).setdefault(passage, grade) != grade:
            raise ValueError(f"{where}: query {query!r:.80} and passage {passage!r:.80} were judged before, otherwise.")
    if not qrels:
        raise ValueError(f"{path}: no judgements; expected lines of query id, passage id and grade.")
    return qrels


def _named_columns(fields: list[str], where: str) -> tuple[str, ...] | None:
    """Return what the columns are, where the first line is a header; None where it is a judgement."""
    roles = tuple(ROLES.get(re.sub(r"[-_ #]", "", field).lower(), "") for field in fields)
    known = [role for role in roles if role]
    if len(known) < 2:
        return None
    if sorted(known) != sorted(BEIR):
        raise ValueError(
            f"{where}: expected columns for query id, passage id and grade, each once (query-id, corpus-id, score), "
            f"got {fields!r:.120}."
        )
    return roles


def _judgement(fields: list[str], columns: tuple[str, ...] | None, where: str) -> tuple[str, str, int]:
    order = columns or {3: BEIR, 4: TREC}.get(len(fields), ())
    found = dict(zip(order, fields, strict=False))
    if len(fields) != len(order) or not found["query"].strip() or not found["passage"].strip():
        expected = (
            f"the {len(columns)} columns of the first line"
            if columns
            else "query id, passage id and a whole-number grade (BEIR), or query id, 0, passage id and grade (TREC)"
        )
        raise ValueError(f"{where}: expected {expected}; got {len(fields)} columns: {fields!r:.120}.")
    return found["query"], found["passage"], _grade(found["grade"].strip(), where)


def _grade(text: str, where: str) -> int:
    whole = WHOLE.fullmatch(text)
    if whole is None:
        raise ValueError(
            f"{where}: the grade must be a whole number, as trec_eval's metrics ask, got {text!r:.80}. Make whole "
            "grades of shares; a header names its columns query-id, corpus-id and score."
        )
    if abs(grade := int(whole[1])) > LARGEST_GRADE:
        raise ValueError(f"{where}: the grade {grade} is beyond {LARGEST_GRADE:,}; is it in another column?")
    return grade
