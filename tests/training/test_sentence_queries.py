"""`make-pairs`: sentences that ask for the text that they were taken out of."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from training_data import write_lines

from diffretriever.cli.main import main
from diffretriever.data.pair_files import PairFiles
from diffretriever.training.sentence_queries import SentenceChoice, WordCounts, split_sentences

SHARED = "The ministry publishes the same sentence under every single page."
LEANING = "This makes gneiss and quartzite much harder than most other rocks."
ASKING = "Gneiss and quartzite form where great pressure folds older sediments deeply."
SECOND = "Geologists map schist belts with magnetometers carried below small aircraft."
FILLER = (
    "It is so and it was so before it came to be so as it had been said to be so when it was said that so it is to be."
)
TEXT = f"{LEANING} {ASKING} {FILLER} {SECOND} {SHARED} Why is it so?"
OTHERS = [f"{FILLER} {SHARED} Another text of {word} says it twice, {word}." for word in ("one", "two", "three")]


def made(tmp_path: Path, texts: list[str], *options: str) -> list[tuple[str, str]]:
    """Run the command on a corpus and return its pairs."""
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"_id": str(n), "text": text} for n, text in enumerate(texts)])
    out = tmp_path / "pairs.jsonl"
    assert main(["make-pairs", "--corpus", str(corpus), "--output", str(out), *options]) == 0
    records: list[dict[str, Any]] = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert all(record.keys() == {"query", "positive"} for record in records)
    return [(record["query"], record["positive"]) for record in records]


def test_a_sentence_asks_for_the_rest_of_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that stands alone: not shared with other texts, not vague, with words that few texts have."""
    pairs = made(tmp_path, [TEXT, *OTHERS], "--per-text", "5", "--keep-share", "0")
    rest = TEXT.replace(f"{ASKING} ", "").replace(f"{SECOND} ", "")
    assert pairs == [(ASKING, rest), (SECOND, rest)]  # one passage, or each would be a negative of the other
    assert "2 pairs of 4 texts; 3 texts have no sentence that asks" in capsys.readouterr().out


def test_some_texts_keep_their_sentences(tmp_path: Path) -> None:
    assert made(tmp_path, [TEXT, *OTHERS], "--keep-share", "1")[0][1] == TEXT
    many = [TEXT.replace("Gneiss", f"Gneiss{n}").replace("Geologists", f"Number{n}") for n in range(300)]
    pairs = made(tmp_path, many, "--rare-words", "1")
    kept = sum(query in passage for query, passage in pairs)
    assert len(pairs) == 300
    assert 15 <= kept <= 45  # a tenth
    assert {re.sub(r"\d", "", query.split()[0]) for query, _ in pairs} == {"Gneiss", "Number"}


def test_the_same_seed_makes_the_same_pairs(tmp_path: Path) -> None:
    many = [TEXT.replace("Gneiss", f"Gneiss{n}").replace("Geologists", f"Number{n}") for n in range(40)]
    first = made(tmp_path, many, "--rare-words", "1")
    assert made(tmp_path, many, "--rare-words", "1") == first
    assert made(tmp_path, many, "--rare-words", "1", "--seed", "7") != first


def test_words_are_rare_by_the_texts_that_have_them() -> None:
    counted = WordCounts.of([f"{TEXT} end{n}" for n in range(3)] + OTHERS)
    assert counted.texts_with["gneiss"] == 3
    assert counted.few(0.01) == 1
    assert counted.few(0.5) == 3
    assert SentenceChoice().pairs_of(TEXT, counted, 0) == []  # three texts have each sentence
    few_repeat = WordCounts(counted.texts, counted.texts_with)
    assert SentenceChoice(rare_share=0.4).pairs_of(TEXT, few_repeat, 0) == []
    assert len(SentenceChoice(rare_share=0.5).pairs_of(TEXT, few_repeat, 0)) == 1


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", [""]),
        ("One. Two! Three? four", ["One.", "Two!", "Three? four"]),
        ("See Fig. 3 of J. Doe et al. Nature", ["See Fig. 3 of J. Doe et al. Nature"]),
        ('He left. "Why?" She knew. (Not he.)', ["He left.", '"Why?" She knew.', "(Not he.)"]),
        ("It was 3.5 m long.\n\n5 of them fit.", ["It was 3.5 m long.", "5 of them fit."]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_pairs_of_pairs_can_be_trained_on(tmp_path: Path) -> None:
    """Each passage of several files is a text once, compressed files too; no unpacked copy stays."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    write_lines(first, [{"query": "q", "positive": TEXT}])
    lines = [{"query": "r", "positives": [TEXT, OTHERS[0]], "negatives": OTHERS[1:]}]
    second.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    out = tmp_path / "made" / "pairs.jsonl"
    assert main(["make-pairs", "--pairs", str(first), str(second), "--output", str(out)]) == 0
    assert [file.name for file in out.parent.iterdir()] == ["pairs.jsonl"]
    (item,) = PairFiles([out])
    assert item.query in (ASKING, SECOND)
    assert item.query not in item.positives[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--min-words", "9", "--max-words", "8"], "--min-words 9 is above --max-words 8; lower it"),
        (
            ["--rare-words", "20"],
            "no sentence of 4 texts can be a query: 9 to 32 words and a full stop, 20 of the words",
        ),
    ],
)
def test_what_cannot_be_made(options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_lines(
        tmp_path / "c.jsonl", [{"_id": str(n), "text": text} for n, text in enumerate([TEXT, *OTHERS])]
    )
    out = tmp_path / "pairs.jsonl"
    assert main(["make-pairs", "--corpus", str(corpus), "--output", str(out), *options]) == 2
    assert told in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "some"])
def test_shares_are_shares(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["make-pairs", "--corpus", "c", "--output", str(tmp_path / "o"), f"--keep-share={value}"])
    assert f"--keep-share: expected a number from 0 to 1, got '{value}'" in capsys.readouterr().err
