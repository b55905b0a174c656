"""A small benchmark to evaluate on, in BEIR's layout and in MS MARCO's."""

from __future__ import annotations

import json
from pathlib import Path

CORPUS = {
    "player": ("Audio", "Plays MP3 and Ogg Vorbis files."),
    "daemon": ("", "A fast HTTP daemon."),
    "editor": ("Text", "Edits text files in a terminal."),
    "compiler": ("", "Compiles C programs into machine code."),
    "mail": ("Mail", "Reads electronic mail in a terminal."),
    "image": ("", "Converts images between many formats."),
    "backup": ("", "Makes encrypted backups of files."),
    "clock": ("", "Shows the time in many time zones."),
    "chess": ("Games", "Plays chess against the computer."),
    "q-own": ("", "listen to audio files"),
}
QUERIES = {
    "q-play": "audio player",
    "q-web": "web server daemon",
    "q-mail": "read mail in a terminal",
    "q-own": "listen to audio files",
    "q-dev1": "encrypted backups",
    "q-dev2": "image formats",
    "q-dev3": "machine code",
    "q-none": "nobody judged this one",
}
QRELS = {
    "test": "q-play player 2\nq-play chess 1\nq-web daemon 1\nq-mail mail 1\nq-mail editor 1\nq-own player 1\n",
    "dev": "q-dev1 backup 1\nq-dev2 image 1\nq-dev3 compiler 1\n",
}


def write_benchmark(folder: Path) -> Path:
    """Write the benchmark in BEIR's layout."""
    (folder / "qrels").mkdir(parents=True)
    passages = [{"_id": name, "title": title, "text": text} for name, (title, text) in CORPUS.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    queries = [{"_id": name, "text": text} for name, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    for split, lines in QRELS.items():
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines.replace(" ", "\t"))
    return folder


def write_ms_marco(folder: Path) -> Path:
    """Write the same in MS MARCO's layout."""
    folder.mkdir(parents=True)
    (folder / "collection.tsv").write_text("".join(f"{name}\t{text}\n" for name, (_, text) in CORPUS.items()))
    (folder / "queries.dev.small.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in QUERIES.items()))
    lines = [line.split() for line in QRELS["test"].splitlines()]
    (folder / "qrels.dev.small.tsv").write_text(
        "".join(f"{query}\t0\t{name}\t{grade}\n" for query, name, grade in lines)
    )
    (folder / "msmarco-test2019-queries.tsv").write_bytes((folder / "queries.dev.small.tsv").read_bytes())
    (folder / "2019qrels-pass.txt").write_bytes((folder / "qrels.dev.small.tsv").read_bytes())
    return folder


def qrels_of(split: str) -> dict[str, dict[str, int]]:
    """Return the judgements of a split."""
    qrels: dict[str, dict[str, int]] = {}
    for line in QRELS[split].splitlines():
        query, passage, grade = line.split()
        qrels.setdefault(query, {})[passage] = int(grade)
    return qrels
