"""Training data on disk: JSONL pairs and Tevatron's MS MARCO layout, read a line at a time by offset."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files.durable import remove_temporaries, write_whole
from ..files.hashes import hash64, hash_file
from ..files.lines import COMPRESSIONS, decode_line, parse_object, read_blocks, read_raw_lines
from .ids import repeated_hashes
from .texts import join_title, text_key


@dataclass(frozen=True)
class TrainingItem:
    """One query with the passages that answer it and passages known not to."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    identity: str | None = None
    where: str = ""  # "file, line n"
    dropped: int = 0  # negatives left out: equal to a positive, or given twice


@dataclass
class DataReport:
    """What the scan of the data found."""

    items: int = 0
    dropped_negatives: int = 0
    without_negatives: int = 0
    most_negatives: int = 0
    counts: list[int] = field(default_factory=list)  # items of each file
    fingerprints: dict[str, str] = field(default_factory=dict)  # file name: sha256 of its (uncompressed) bytes
    fewest_negatives: int = -1


def read_item(line: str, where: str) -> TrainingItem:
    """Read one line of either layout.

    Args:
        line: JSON: {"query", "positive" or "positives", "negatives"}, or Tevatron's {"query_id", "query",
            "positive_passages": [{"docid", "title", "text"}], "negative_passages": [...]}.
        where: names file and line in errors.

    Returns:
        The item; negatives that say what a positive says, or come twice, are left out.

    Raises:
        ValueError: malformed, or a query or positive missing or empty.
    """
    record = parse_object(line, where)
    query = record.get("query")
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"{where}: 'query' must be a text that is not empty")
    if "positive_passages" in record:
        names = ("positive_passages", "negative_passages")
        positives, negatives = (_passages(record.get(name), where, name) for name in names)
    else:
        given = record["positives"] if "positives" in record else record.get("positive")
        names = ("positives" if "positives" in record else "positive", "negatives")
        positives, negatives = _texts(given, where, names[0]), _texts(record.get("negatives"), where, "negatives")
    if not positives:
        raise ValueError(f"{where}: '{names[0]}' is missing or empty; every query needs a passage that answers it")
    answers = set(map(text_key, positives))
    kept: dict[str, str] = {}
    for text in negatives:
        if (key := text_key(text)) not in answers:
            kept.setdefault(key, text)
    identity = record.get("query_id", record.get("_id"))
    identity, dropped = None if identity is None else str(identity), len(negatives) - len(kept)
    return TrainingItem(query, tuple(dict.fromkeys(positives)), tuple(kept.values()), identity, where, dropped)


def _texts(value: Any, where: str, name: str) -> list[str]:
    """Return one text or a list of texts as a list; blank ones are refused."""
    values = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(values, list):
        raise ValueError(f"{where}: '{name}' must be a text or a list of texts, got {type(value).__name__}")
    for text in values:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: '{name}' holds something that is not a text, or an empty one")
    return values


def _passages(value: Any, where: str, name: str) -> list[str]:
    """Return the texts of Tevatron's list of {"docid", "title", "text"}."""
    values = [] if value is None else value
    if not isinstance(values, list):
        raise ValueError(f"{where}: '{name}' must be a list of {{docid, title, text}}, got {type(value).__name__}")
    found = []
    for passage in values:
        if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
            raise ValueError(f"{where}: '{name}' holds an entry without a 'text'")
        title = passage.get("title")
        if not isinstance(title, str | None):
            raise ValueError(f"{where}: '{name}' holds a 'title' that is no text: {title!r:.80}")
        found.append(join_title(title, passage["text"]))
    return _texts(found, where, name)


class PairFiles:
    """Training items by number, read from disk when asked for; memory holds 32 bytes an item.

    Args:
        paths: JSONL files; .gz, .xz and .zst are unpacked into `scratch` first.
        scratch: folder for unpacked copies.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a malformed line, an id given twice in one file, or no items at all; names file and line.
    """

    def __init__(self, paths: Sequence[str | Path], scratch: Path | None = None) -> None:
        self.names = [str(path) for path in paths]
        self.paths = [_plain_file(Path(path), number, scratch) for number, path in enumerate(paths)]
        self.report = DataReport()
        self._offsets, self._lines, self._hashes, self.lengths, self._identities = (array("q") for _ in range(5))
        for number in range(len(self.paths)):
            self._scan(number)
        if not self.report.items:
            raise ValueError(f"{', '.join(self.names)}: no training pairs in it")
        self._starts = np.cumsum([0, *self.report.counts])
        self._handles: dict[tuple[int, int], int] = {}  # (process, file): descriptor; workers open their own

    def _scan(self, number: int) -> None:
        """Check every line of one file and note where it starts."""
        digest, offset, report = hashlib.sha256(), 0, self.report
        identities, before = array("q"), len(self._offsets)
        for line_number, raw in read_raw_lines(self.paths[number]):
            digest.update(raw)
            where = f"{self.names[number]}, line {line_number}"
            line = decode_line(raw, line_number, where)
            if line.strip():
                item = read_item(line, where)
                self._offsets.append(offset)
                self._lines.append(line_number)
                self._hashes.append(hash64(raw.removesuffix(b"\n")))
                self.lengths.append(len(item.positives[0]))
                identities.append(hash64(item.identity) if item.identity is not None else -line_number)
                self._count(item)
            offset += len(raw)
        report.counts.append(len(self._offsets) - before)
        report.fingerprints[self.names[number]] = digest.hexdigest()
        self._refuse_repeated(number, before, identities)
        self._identities += identities

    def _count(self, item: TrainingItem) -> None:
        report, count = self.report, len(item.negatives)
        report.items += 1
        report.dropped_negatives += item.dropped
        report.without_negatives += not count
        report.most_negatives = max(report.most_negatives, count)
        report.fewest_negatives = count if report.items == 1 else min(report.fewest_negatives, count)

    def _refuse_repeated(self, number: int, start: int, identities: array[int]) -> None:
        repeated = repeated_hashes(identities)
        if len(repeated):
            places = np.flatnonzero(np.asarray(identities) == repeated[0])[:2]
            first, second = (self._lines[start + int(place)] for place in places)
            raise ValueError(
                f"{self.names[number]}, line {second}: its id is also that of line {first}; give each query one line, "
                "with all its positives"
            )

    def refuse_ids_of_two_files(self) -> None:
        """Raise ValueError for an id that queries of two files have, which one file of all could not keep apart."""
        given = np.asarray(self._identities)
        repeated = repeated_hashes(array("q", given[given >= 0].tolist()))  # a query without an id has a number below 0
        if len(repeated):
            first, second = (self._where(int(number)) for number in np.flatnonzero(given == repeated[0])[:2])
            raise ValueError(f"{second}: its id is also that of {first}; give each query of all files an id of its own")

    def _file_of(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _where(self, number: int) -> str:
        return f"{self.names[self._file_of(number)]}, line {self._lines[number]}"

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> TrainingItem:
        """Read item `number`, from 0.

        Raises:
            ValueError: its line is no longer what it was when the files were opened.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        file = self._file_of(number)
        last = number + 1 == self._starts[file + 1]
        end = os.path.getsize(self.paths[file]) if last else self._offsets[number + 1]
        raw = os.pread(self._descriptor(file), max(end - self._offsets[number], 0), self._offsets[number])
        where = self._where(number)
        line = raw.split(b"\n", 1)[0]
        if hash64(line) != self._hashes[number]:
            raise ValueError(
                f"{where}: the file was changed since this run began to read it. Put it back, or begin anew with the "
                "file as it is; data must stay the same during a run"
            )
        return read_item(decode_line(line, self._lines[number], where), where)

    def __iter__(self) -> Iterator[TrainingItem]:
        return (self[number] for number in range(len(self)))

    def _descriptor(self, file: int) -> int:
        key = os.getpid(), file
        if key not in self._handles:
            self._handles[key] = os.open(self.paths[file], os.O_RDONLY)
        return self._handles[key]

    def close(self) -> None:
        """Close the files."""
        for (process, _), descriptor in self._handles.items():
            if process == os.getpid():
                os.close(descriptor)
        self._handles.clear()


def _plain_file(path: Path, number: int, scratch: Path | None) -> Path:
    """Return the file itself, or an unpacked copy of a compressed one, whose lines cannot be read by offset."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file; give the path of a JSONL file (also .gz, .xz, .zst)")
    if path.suffix not in COMPRESSIONS:
        return path
    if scratch is None:
        raise ValueError(f"{path}: unpack it first; lines of a compressed file cannot be read by offset")
    scratch.mkdir(parents=True, exist_ok=True)
    copy = scratch / f"data-{number}-{hash_file(path)[:16]}.jsonl"
    if not copy.is_file():
        remove_temporaries(scratch)
        write_whole(copy, read_blocks(path))
    return copy
