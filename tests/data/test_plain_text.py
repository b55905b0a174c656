"""Plain text files as corpora."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffretriever.data.corpus import Passage
from diffretriever.data.plain_text import read_text_or_corpus


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n two \r\nthree", {"line 1": "one", "line 2": "two", "line 3": "three"}),
        ("\nalone\n\n", {"line 2": "alone"}),
        ("first\nwraps\n\n \t\nsecond\n", {"line 1": "first wraps", "line 5": "second"}),
        ("\ufeffmark\u2028inside\n", {"line 1": "mark\u2028inside"}),
    ],
)
def test_a_line_is_a_passage_or_a_paragraph_where_blank_lines_separate(
    tmp_path: Path, text: str, expected: dict[str, str]
) -> None:
    file = tmp_path / "notes.md"
    file.write_bytes(text.encode())
    assert list(read_text_or_corpus(file)) == [Passage(name, words) for name, words in expected.items()]


def test_a_corpus_is_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "one"}\n')
    for source in (tmp_path, tmp_path / "corpus.jsonl"):
        assert list(read_text_or_corpus(source)) == [Passage("a", "one")]


@pytest.mark.parametrize(("content", "said"), [(b" \n\n", "no text in it"), (b"a\nb\xff", "line 2: not valid UTF-8")])
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"notes\.txt.*{said}"):
        list(read_text_or_corpus(tmp_path / "notes.txt"))
