"""Judgements: the header is known by its words, grades are whole numbers however they are written."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from diffretriever.data.qrels import read_qrels


def test_qrels_of_beir_and_of_trec(tmp_path: Path) -> None:
    expected = {"q 1": {"d1": 1, "d2": 0}, "q2": {"d1": -1}}
    beir = tmp_path / "test.tsv"
    beir.write_text("query-id\tcorpus-id\tscore\nq 1\td1\t1\nq 1\td2\t0\n\nq2\td1\t-1\nq2\td1\t-1\n")
    assert read_qrels(beir) == expected
    (tmp_path / "headless.tsv").write_text("q 1\td1\t1\nq 1\td2\t0\nq2\td1\t-1\n")
    assert read_qrels(tmp_path / "headless.tsv") == expected
    with gzip.open(tmp_path / "trec.txt.gz", "wt") as stream:
        stream.write("q1 0 d1 3\nq1\t0\td2\t0\n")
    assert read_qrels(tmp_path / "trec.txt.gz") == {"q1": {"d1": 3, "d2": 0}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("query-id\tcorpus-id\tscore\nq\td\n", "line 2: expected the 3 columns of the first line; got 2 columns"),
        ("q 0 d 1.5\n", r"line 1: the grade must be a whole number, .* got '1\.5'"),
        ("q\td\t1\nq\td\t2\n", "line 2: query 'q' and passage 'd' were judged before, otherwise"),
        ("query-id\tcorpus-id\tscore\nq\td\t0.5\n", "line 2: the grade must be a whole number, .* got '0.5'"),
        (f"q\td\t{'9' * 5000}\n", "line 1: the grade must be a whole number"),
        ("q\td\t1000001\n", "line 1: the grade 1000001 is beyond 1,000,000; is it in another column?"),
        ("q\td\tgood\n", "line 1: the grade must be a whole number"),
        ("what\tever\tthis\nq\td\t1\n", "line 1: the grade must be .* a header names its columns query-id, corpus-id"),
        ("query-id\tcorpus-id\nq\td\n", "line 1: expected columns for query id, passage id and grade, each once"),
        ("qid\tpid\tdocid\tscore\nq\td\td\t1\n", "line 1: expected columns for query id, passage id and grade, each"),
        ("q\t\t1\n", "line 1: expected query id, passage id and a whole-number grade"),
        ("q\td\n", "line 1: expected query id, passage id and a whole-number grade .*; got 2 columns"),
        ("query-id\tcorpus-id\tscore\n", "no judgements"),
        ("", "no judgements"),
    ],
)
def test_bad_qrels(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "qrels.tsv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_qrels(file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("1\t11\t1.0\n1\t12\t0.0\n", {"1": {"11": 1, "12": 0}}),  # no header: the first line is a judgement
        ("1 11 2.\n", {"1": {"11": 2}}),
        ("corpus-id\tquery-id\tscore\nd\tq\t1\n", {"q": {"d": 1}}),
        ("score\tquery-id\tcorpus-id\n2\tq\td\n", {"q": {"d": 2}}),
        ("Query_ID,\n".replace(",", "\tdoc_id\trelevance") + "q\td\t3\n", {"q": {"d": 3}}),
        ("query_id iteration doc_id relevance\nq 0 d 1\n", {"q": {"d": 1}}),
        ("qid\tpid\tlabel\tannotator\nq\td\t1\tanna\n", {"q": {"d": 1}}),
        ("\n\ufeff".lstrip() + "topic\tdocno\tgrade\nq\td\t1\n", {"q": {"d": 1}}),
        ("q Q0 d 1\n", {"q": {"d": 1}}),
    ],
)
def test_the_header_says_the_order(tmp_path: Path, content: str, expected: dict[str, dict[str, int]]) -> None:
    file = tmp_path / "qrels.tsv"
    file.write_text(content)
    assert read_qrels(file) == expected
