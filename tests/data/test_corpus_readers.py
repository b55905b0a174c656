"""Corpora, queries and judgements: every format gives the same records, and bad ones are named."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from store_helpers import write_jsonl

from diffretriever.data.corpus import Passage, Query, read_corpus, read_queries, read_small_corpus
from diffretriever.data.qrels import read_qrels

RECORDS: list[dict[str, Any]] = [
    {"_id": "doc 1", "title": "Tilt", "text": "The axis tilts\nby 23.4 degrees."},
    {"_id": "日本-2", "title": "", "text": ""},
    {"_id": "3\u2028x", "title": None, "text": " blank at both ends \u0085"},
    {"_id": " 4 ", "text": "no title"},
]
EXPECTED = [
    Passage("doc 1", "Tilt. The axis tilts\nby 23.4 degrees."),
    Passage("日本-2", ""),
    Passage("3\u2028x", " blank at both ends \u0085"),
    Passage(" 4 ", "no title"),
]
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": zstandard.open, "": open}


def as_jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


@pytest.mark.parametrize("suffix", OPENERS)
def test_jsonl_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    for name in (f"corpus.jsonl{suffix}", f"anything.jsonl{suffix}"):
        with OPENERS[suffix](tmp_path / name, "wb") as stream:
            stream.write(as_jsonl(RECORDS))
        assert list(read_corpus(tmp_path / name)) == EXPECTED
    assert list(read_corpus(tmp_path)) == EXPECTED  # the folder, as BEIR has it


def test_a_beir_folder_has_a_corpus_and_queries(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(as_jsonl(RECORDS))
    (tmp_path / "queries.jsonl").write_bytes(as_jsonl([{"_id": "q", "text": "why", "metadata": {"a": 1}}]))
    assert list(read_corpus(tmp_path)) == EXPECTED
    assert list(read_queries(tmp_path)) == [Query("q", "why")]


def test_parquet_file_and_parts(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{**record, "title": record.get("title")} for record in RECORDS])
    pyarrow.parquet.write_table(table, tmp_path / "corpus.parquet")
    assert list(read_corpus(tmp_path / "corpus.parquet")) == EXPECTED
    parts = tmp_path / "parts" / "corpus"
    parts.mkdir(parents=True)
    for part in range(2):
        pyarrow.parquet.write_table(table.slice(2 * part, 2), parts / f"part-{part}.parquet")
    assert list(read_corpus(tmp_path / "parts")) == EXPECTED


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(as_jsonl([{**record, "title": record.get("title")} for record in RECORDS]))
    assert list(read_corpus(f"hf:{folder}:train")) == EXPECTED
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    assert list(read_corpus(f"hf:{tmp_path / 'saved'}")) == EXPECTED
    with pytest.raises(ValueError, match=r"hf:a::b: expected hf:NAME, hf:NAME:SPLIT"):
        list(read_corpus("hf:a::b"))
    with pytest.raises(ValueError, match="nosplit"):
        list(read_corpus(f"hf:{folder}:nosplit"))


def test_tsv_of_two_and_three_columns_and_with_a_header(tmp_path: Path) -> None:
    file = tmp_path / "collection.tsv"
    file.write_bytes("0\tThe first\u2028passage \r\n1\t\n".encode())
    assert list(read_corpus(file)) == [Passage("0", "The first\u2028passage "), Passage("1", "")]
    assert list(read_corpus(tmp_path)) == list(read_corpus(file))
    file.write_text("id\ttitle\ttext\n7\tTitle\tbody\n8\t\tbody\n")
    assert list(read_corpus(file)) == [Passage("7", "Title. body"), Passage("8", "body")]
    file.write_text("id\ttext\ttitle\n7\tbody\tTitle\n")
    assert list(read_corpus(file)) == [Passage("7", "Title. body")]
    assert list(read_queries(file)) == [Query("7", "Title. body")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"id": 12, "contents": "a"}, Passage("12", "a")),
        ({"docid": "x", "passage": "a", "title": "b"}, Passage("x", "b. a")),
        ({"_id": "x", "text": "half \ud83d a pair"}, Passage("x", "half � a pair")),
        ({"_id": "x", "text": "a", "title": "  "}, Passage("x", "a")),
    ],
)
def test_other_names_and_kinds_of_fields(tmp_path: Path, fields: dict[str, Any], expected: Passage) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(fields))
    assert list(read_corpus(file)) == [expected]


@given(st.lists(st.tuples(st.text(min_size=1), st.text()), min_size=1, max_size=5))
def test_ids_and_texts_are_kept_exactly(tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]) -> None:
    file = tmp_path_factory.mktemp("exact") / "a.jsonl"
    encodable = [(i, t) for i, t in texts if not any("\ud800" <= c <= "\udfff" for c in i + t)]
    write_jsonl(file, encodable)
    assert [(passage.id, passage.text) for passage in read_corpus(file)] == encodable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"_id": "1", "text": "a"}\n{"_id": "2", "te', r"line 2: not valid JSON \(Unterminated string"),
        (b'{"_id": "1", "text": "a"}\n\n[1]\n', "line 3: expected a JSON object, got list"),
        (b'{"_id": "1", "text": "a\xff"}\n', r"line 1: not valid UTF-8 \(byte 24 of the line is 0xff\)"),
        (b'{"text": "a"}\n', r"line 1: the id is missing; the field of ids is one of _id, id, docid, .*, qid\."),
        (b'{"_id": "", "text": "a"}\n', r"line 1: the id '_id' is empty or no text \(''\); the field"),
        (b'{"_id": true, "text": "a"}\n', r"line 1: the id '_id' is empty or no text \(True\)"),
        (b'{"_id": "\\ud800", "text": "a"}\n', "line 1: the id .* holds half a surrogate pair"),
        (b'{"_id": "1"}\n', "line 1: the text is missing; its field is one of text, contents, passage, body, query"),
        (b'{"_id": "1", "text": ["a"]}\n', "line 1: 'text' is no text"),
        (b'{"_id": "1", "text": "a", "title": 5}\n', "line 1: 'title' is no text"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_corpus(file))
    assert str(caught.value).startswith(f"{file}, line ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\ta\n2\n", "line 2: expected 2 columns between tabs, id and text, got 1"),
        ("1\ta\n2\ta\tb\n", "line 2: expected 2 columns between tabs, id and text, got 3"),
        ("1\n", "line 1: expected 2 columns between tabs, id and text, got 1"),
        ("7\tpassage\ttitle\n", "line 1: expected 2 columns .*, got 3. Other columns need names: begin the file with"),
        ("id\ttext\ttext\n1\ta\tb\n", "line 1: two columns have one name"),
        ("\ta\n", "line 1: the id 'id' is empty"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.tsv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_corpus(file))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_cut_off_compressed_file_is_said(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    with OPENERS[suffix](file, "wb") as stream:
        stream.write(as_jsonl([{"_id": str(number), "text": str(hash(str(number)))} for number in range(5000)]))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"after line \d+: the compressed file is damaged or cut off"):
        list(read_corpus(file))
    file.write_bytes(b"not compressed at all")
    with pytest.raises(ValueError, match="after line 0: the compressed file is damaged or cut off"):
        list(read_corpus(file))


def test_zstandard_files_of_several_frames(tmp_path: Path) -> None:
    packed = [zstandard.compress(as_jsonl([record])) for record in RECORDS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(packed))
    assert list(read_corpus(tmp_path / "a.jsonl.zst")) == EXPECTED


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_said_to_be_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "63")  # as a shell makes one of <(zcat corpus.gz)
    with pytest.raises(FileNotFoundError, match="63: a pipe or a device, which cannot be read more than once"):
        list(read_corpus(tmp_path / "63"))
    with pytest.raises(FileNotFoundError, match="63: no file, but a folder, a pipe or a device"):
        read_qrels(tmp_path / "63")


def test_what_is_not_there_or_not_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file or folder; expected a BEIR folder, .jsonl"):
        list(read_corpus(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"the folder holds no queries file; expected queries.jsonl"):
        list(read_queries(tmp_path))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"a.csv: not a format that can be read; expected a BEIR folder"):
        list(read_corpus(tmp_path / "a.csv"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a.parquet, after row 0: not a whole Parquet file"):
        list(read_corpus(tmp_path / "a.parquet"))
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"], pyarrow.binary()).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"id": ["1"], "text": text}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, after row 0: not a whole Parquet file .*UTF8"):
        list(read_corpus(tmp_path / "a.parquet"))


@pytest.mark.parametrize("read", [read_queries, read_small_corpus])
def test_an_id_that_occurs_twice_is_refused(tmp_path: Path, read: Callable[[Path], Iterator[object]]) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", [("a", "x"), ("b", "y"), ("a", "z")])
    with pytest.raises(ValueError, match=r"line 3: the id 'a' is already that of .*line 1"):
        list(read(file))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".tsv", ".parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for count in (1000, 15000):
        file = tmp_path / f"{count}{suffix}"
        rows = [{"_id": str(number), "text": f"{number} {'x' * 200}"} for number in range(count)]
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=500)
        elif suffix == ".tsv":
            file.write_text("".join(f"{row['_id']}\t{row['text']}\n" for row in rows))
        else:
            with OPENERS[suffix.removeprefix(".jsonl")](file, "wb") as stream:
                stream.write(as_jsonl(rows))
        del rows
        tracemalloc.start()
        assert sum(1 for _ in read_corpus(file)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300_000  # the larger file holds 3 MB


def test_a_folder_of_numbered_parts_is_read_in_their_order(tmp_path: Path) -> None:
    passages = [(str(number), f"text {number}") for number in range(12)]
    names = {
        "plain": "part{}.jsonl",
        "named": "corpus-{:05d}-of-00012.tsv",
        "corpus": "{}.jsonl",
        "zst": "p{}.jsonl.zst",
    }
    for folder in (tmp_path / "plain", tmp_path / "named", tmp_path / "kinds" / "corpus", tmp_path / "zst"):
        folder.mkdir(parents=True)
        for number, passage in enumerate(passages):
            file = folder / names[folder.name].format(number)
            content = "{}\t{}\n".format(*passage).encode()
            if ".jsonl" in file.name:
                content = as_jsonl([{"_id": passage[0], "text": passage[1]}])
            file.write_bytes(zstandard.compress(content) if file.suffix == ".zst" else content)
    (tmp_path / "named" / "queries-00000-of-00001.tsv").write_text("q\twhy\n")
    write_jsonl(tmp_path / "plain" / "queries.jsonl", [("q", "why")])
    (tmp_path / "plain" / "_SUCCESS").touch()
    (tmp_path / "plain" / ".part0.jsonl.crc").touch()
    for folder in (tmp_path / "plain", tmp_path / "named", tmp_path / "kinds", tmp_path / "zst"):
        assert [(passage.id, passage.text) for passage in read_corpus(folder)] == passages
    for folder in (tmp_path / "plain", tmp_path / "named"):
        assert list(read_queries(folder)) == [Query("q", "why")]


def test_a_folder_of_several_things_or_without_a_part_is_refused(tmp_path: Path) -> None:
    for name in ("a0.jsonl", "a1.jsonl", "b0.jsonl"):
        write_jsonl(tmp_path / name, [(name, "x")])
    assert [passage.id for passage in read_corpus(tmp_path)] == ["a0.jsonl", "a1.jsonl", "b0.jsonl"]
    (tmp_path / "c.tsv").write_text("c\tx\n")
    with pytest.raises(ValueError, match=r"which files are the corpus\? There are a[01]\.jsonl, b0\.jsonl, c\.tsv"):
        list(read_corpus(tmp_path))
    (tmp_path / "c.tsv").unlink()
    (tmp_path / "b0.jsonl").rename(tmp_path / "a-00000-of-00003.jsonl")
    (tmp_path / "a0.jsonl").unlink()
    (tmp_path / "a1.jsonl").rename(tmp_path / "a-00002-of-00003.jsonl")
    with pytest.raises(ValueError, match=r"2 parts, which are called a-00000-of-00003\.jsonl; some are missing"):
        list(read_corpus(tmp_path))
    (tmp_path / "qrels").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no queries file"):  # a benchmark's parts are its corpus
        list(read_queries(tmp_path))
