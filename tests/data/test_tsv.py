"""TSV as MS MARCO and as pandas write it: read as it was meant, or refused."""

from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffretriever.data.corpus import read_corpus

CHARACTERS = st.text(st.sampled_from("ab \"\t\n'é,"), max_size=12)


def read(file: Path) -> list[tuple[str, str]]:
    return [(passage.id, passage.text) for passage in read_corpus(file)]


@given(st.lists(CHARACTERS, min_size=1, max_size=6), st.booleans(), st.booleans())
def test_what_pandas_writes_is_read_back_or_refused(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], index: bool, every_field: bool
) -> None:
    file = tmp_path_factory.mktemp("pandas") / "corpus.tsv"
    table = pandas.DataFrame({"id": [f"p{number}" for number in range(len(texts))], "text": texts})
    table.to_csv(file, sep="\t", index=index, quoting=csv.QUOTE_ALL if every_field else csv.QUOTE_MINIMAL)
    expected = list(zip(table["id"], texts, strict=True))
    if any("\n" in text and "\t" in text for text in texts):  # a line of it alone may look like a record
        with suppress(ValueError):
            assert read(file) == expected
    else:
        assert read(file) == expected


def test_quoted_fields(tmp_path: Path) -> None:
    file, texts = tmp_path / "corpus.tsv", ['a "b" c', "one\ttwo", "one\n\ntwo", '"all of it"', "plain", 'ends "so"']
    pandas.DataFrame({"pid": range(6), "title": ["", "t", 'a "t"', "", "t\nt", ""], "text": texts}).to_csv(
        file, sep="\t", index=False
    )
    titles = ["", "t. ", 'a "t". ', "", "t\nt. ", ""]
    expected = [(str(number), title + text) for number, (title, text) in enumerate(zip(titles, texts, strict=True))]
    assert read(file) == expected


def test_quotation_marks_of_ms_marco_are_text(tmp_path: Path) -> None:
    lines = ['"Yes" he said', '"wholly quoted"', '"never closed', 'foot 6"', 'in the "middle"', 'a ""b"" c', '"']
    file = tmp_path / "collection.tsv"
    file.write_text("".join(f"{number}\t{line}\n" for number, line in enumerate(lines)))
    assert read(file) == [(str(number), line) for number, line in enumerate(lines)]
    headed = tmp_path / "corpus.tsv"
    kept = [line for line in lines if line not in ('"never closed', '"')]
    headed.write_text("id\ttext\n" + "".join(f"{number}\t{line}\n" for number, line in enumerate(kept)))
    assert read(headed) == [(str(number), line) for number, line in enumerate(kept)]


def test_pandas_without_a_header(tmp_path: Path) -> None:
    file, texts = tmp_path / "collection.tsv", ['a "b" c', "one\ttwo", "one\ntwo\nthree", "plain"]
    pandas.DataFrame({"id": range(4), "text": texts}).to_csv(file, sep="\t", index=False, header=False)
    assert read(file) == [(str(number), text) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            'id\ttext\n1\t"open\n2\tclosed"\n',
            "line 2: a field opens with a quotation mark, unclosed. Write the",
        ),
        ('id\ttext\n1\t"open\nand on\n', "line 2: a field opens with a quotation mark, and no such field ends"),
        ('id\ttext\n1\t"open\nand "so" on\n', "line 2: a field opens with a quotation mark, and no such field ends"),
        ('1\t"open\nand on\n', "line 1: a field opens with a quotation mark, and no such field ends"),
        ("_id\tquestion\nq1\tchess\n", "line 1: '_id, question' look like names of columns, of which none is a text's"),
        ("0\t7\tpassage\n", "line 1: expected 2 columns between tabs, id and text, got 3"),
    ],
)
def test_what_could_be_read_two_ways_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "corpus.tsv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read(file)
