"""Reading training data: both layouts, by offset, with errors that name file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_data import write_lines

from diffretriever.data.pair_files import PairFiles, read_item

TEVATRON = {
    "query_id": "17",
    "query": "what is a fjord",
    "positive_passages": [{"docid": "1", "title": "Fjord", "text": "A long narrow inlet."}],
    "negative_passages": [
        {"docid": "2", "title": "", "text": "A car maker."},
        {"docid": "1", "title": "Fjord", "text": "A long narrow inlet."},
        {"docid": "2", "title": "", "text": "A car maker."},
    ],
}
PAIR = {"query": "q", "positives": ["a", "b"], "negatives": ["c", "a"]}


def test_both_layouts(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n" + json.dumps(TEVATRON) + "\n\n" + json.dumps(PAIR) + "\n" + '{"query": "x", "positive": "y"}')
    files = PairFiles([path])
    first, second, third = files
    assert (first.query, first.identity) == ("what is a fjord", "17")
    assert first.positives == ("Fjord. A long narrow inlet.",)
    assert first.negatives == ("A car maker.",)
    assert (second.positives, second.negatives) == (("a", "b"), ("c",))
    assert (third.query, third.positives, third.negatives) == ("x", ("y",), ())
    assert [item.where for item in files] == [f"{path}, line {number}" for number in (2, 4, 5)]
    report = files.report
    assert (report.items, report.dropped_negatives, report.without_negatives, report.most_negatives) == (3, 3, 1, 1)
    assert report.fingerprints[str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(IndexError, match="item 3 of 3"):
        files[3]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.booleans()), min_size=1, max_size=12))
def test_every_item_is_read_from_its_own_place(texts: list[tuple[str, bool]]) -> None:
    import tempfile

    kept = [(f"q{text}", blank) for text, blank in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        lines = [
            json.dumps({"query": text, "positive": text + "!"}, ensure_ascii=False) + "\n" * (1 + blank)
            for text, blank in kept
        ]
        path.write_text("".join(lines), encoding="utf-8", newline="")
        files = PairFiles([path, path])
        assert [files[number].query for number in reversed(range(len(files)))] == [t for t, _ in [*kept, *kept]][::-1]
        files.close()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "pairs.jsonl, line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ('{"positive": "p"}', "line 2: 'query' must be a text that is not empty"),
        ('{"query": " ", "positive": "p"}', "line 2: 'query' must be a text that is not empty"),
        ('{"query": "q"}', "line 2: 'positive' is missing or empty; every query needs a passage that answers it"),
        ('{"query": "q", "positives": []}', "line 2: 'positives' is missing or empty"),
        ('{"query": "q", "positive": " "}', "line 2: 'positive' holds something that is not a text, or an empty one"),
        ('{"query": "q", "positive": "p", "negatives": [3]}', "line 2: 'negatives' holds something that is not a text"),
        ('{"query": "q", "positive": "p", "negatives": {}}', "'negatives' must be a text or a list of texts, got dict"),
        ('{"query": "q", "positive_passages": []}', "line 2: 'positive_passages' is missing or empty"),
        (
            '{"query": "q", "positive_passages": [{"docid": "1"}]}',
            "'positive_passages' holds an entry without a 'text'",
        ),
        ('{"query": "q", "positive_passages": "p"}', "must be a list of {docid, title, text}, got str"),
        (
            '{"query": "q", "positive_passages": [{"title": 7, "text": "t"}]}',
            "'positive_passages' holds a 'title' that is no text: 7",
        ),
        ("[" * 100_000, "line 2: not valid JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "q", "positive": "p"}\n' + line + "\n")
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("[", r"\[")):
        PairFiles([path])


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"query": "q", "positive": "p"}\n{"query": "\xff", "positive": "p"}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 2: not valid UTF-8 \(byte 12 of the line is 0xff\)"):
        PairFiles([path])


def test_a_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"query": "q", "positive": "p"}\r\n\r\n{"query": "r", "positive": "s"}\r\n')
    files = PairFiles([path])
    assert [(item.query, item.positives) for item in files] == [("q", ("p",)), ("r", ("s",))]
    assert files.report.fingerprints[str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_negatives_that_say_what_a_positive_says_are_dropped() -> None:
    line = {"query": "q", "positive": "a  river\n", "negatives": [" a river", "a lake", "a  lake ", "a sea"]}
    item = read_item(json.dumps(line), "here")
    assert (item.negatives, item.dropped) == (("a lake", "a sea"), 2)


def test_repeated_ids_are_named_with_both_lines(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"query_id": name, "query": "q", "positive": "p"} for name in ("a", "b", "c", "b")]
    path = write_lines(tmp_path / "pairs.jsonl", records)
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 4: its id is also that of line 2; give each query one"):
        PairFiles([path])
    other = write_lines(tmp_path / "other.jsonl", records[:2])
    third = write_lines(tmp_path / "third.jsonl", [*records[2:3], {"query": "q", "positive": "p"}, *records[:2]])
    files = PairFiles([other, third, write_lines(tmp_path / "none.jsonl", [{"query": "q", "positive": "p"}])])
    assert len(files) == 7  # ids are a file's own
    with pytest.raises(
        ValueError, match=r"third.jsonl, line [34]: its id is also that of .*other.jsonl, line [12]; give"
    ):
        files.refuse_ids_of_two_files()
    PairFiles([path.with_name("none.jsonl"), other]).refuse_ids_of_two_files()


def test_absent_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data file; give the path of a JSONL file"):
        PairFiles([tmp_path / "absent.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty.jsonl: no training pairs in it"):
        PairFiles([tmp_path / "empty.jsonl"])


def zstandard_compress(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard_compress)]
)
def test_compressed_files_are_unpacked_once(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"pairs.jsonl{suffix}"
    path.write_bytes(pack(json.dumps(PAIR).encode() + b"\n"))
    for _ in range(2):
        files = PairFiles([path], tmp_path / "scratch")
        assert files[0].query == "q"
        assert files[0].where == f"{path}, line 1"
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"pairs.jsonl{suffix}: the compressed file is damaged or cut off"):
        PairFiles([path], tmp_path / "scratch")
    assert len(list((tmp_path / "scratch").iterdir())) == 1


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    import tracemalloc

    path = write_lines(tmp_path / "long.jsonl", [{"query": f"q{n}", "positive": "x" * 20_000} for n in range(500)])
    tracemalloc.start()
    files = PairFiles([path])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 10_000_000
    assert held < 200_000
    assert peak < 1_000_000
    assert files[499].query == "q499"


def test_a_number_is_an_id() -> None:
    assert read_item('{"query": "a", "positive": "b", "_id": 7}', "here").identity == "7"


@pytest.mark.parametrize(
    ("line", "change"),
    [
        (1, lambda content: content.replace(b"q1", b"qx")),
        (2, lambda content: content.replace(b"p2", b"\xff\xff")),
        (3, lambda content: content[:-4]),
        (3, lambda content: b""),
    ],
    ids=["edited", "no longer UTF-8", "cut off", "emptied"],
)
def test_a_line_that_changed_after_it_was_counted_is_named(
    tmp_path: Path, line: int, change: Callable[[bytes], bytes]
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [{"query": f"q{n}", "positive": f"p{n}"} for n in (1, 2, 3)])
    files = PairFiles([path])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"pairs.jsonl, line {line}: the file was changed since this run began"):
        files[line - 1]


def test_data_may_grow_at_their_end(tmp_path: Path) -> None:
    """What was counted is still there, word by word."""
    path = write_lines(tmp_path / "pairs.jsonl", [{"query": f"q{n}", "positive": "p"} for n in range(3)])
    files = PairFiles([path])
    with path.open("a") as stream:
        stream.write('{"query": "late", "positive": "p"}\n')
    assert [item.query for item in files] == ["q0", "q1", "q2"]
