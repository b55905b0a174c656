"""Lines and JSON of files that a stranger made: no bound is left open, and every error names file and line."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard

from diffretriever.evaluation.plots.budget import read_grid
from diffretriever.evaluation.report import read_per_query
from diffretriever.files.lines import read_blocks, read_lines, read_object, read_objects
from diffretriever.store.manifest import Manifest

DEEP = "[" * 200_000
DIGITS = "9" * 4301


def zstandard_file(path: Path, plain_bytes: int) -> Path:
    """Write lines of 100 bytes, which pack well, as one frame."""
    path.write_bytes(zstandard.compress((b"x" * 99 + b"\n") * (plain_bytes // 100)))
    return path


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def test_reading_zstandard_takes_time_in_proportion(tmp_path: Path) -> None:
    small, large = (zstandard_file(tmp_path / f"{mib}.zst", mib << 20) for mib in (16, 128))
    took = [seconds(lambda file=file: sum(map(len, read_blocks(file)))) for file in (small, large)]  # type: ignore[misc]
    assert took[1] < 24 * took[0] + 0.5, f"8 times as much took {took[1]:.2f} s after {took[0]:.2f} s"


def test_a_small_zstandard_file_of_much_takes_little_memory(tmp_path: Path) -> None:
    file = zstandard_file(tmp_path / "a.zst", 256 << 20)
    assert file.stat().st_size < 1 << 17
    tracemalloc.start()
    assert sum(map(len, read_blocks(file))) == (256 << 20) // 100 * 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_many_small_frames_and_a_cut_in_any_place(tmp_path: Path) -> None:
    file, frames = tmp_path / "a.zst", [zstandard.compress(f"line {number}\n".encode()) for number in range(300)]
    file.write_bytes(b"".join(frames))
    assert [line for _, line in read_lines(file)] == [f"line {number}" for number in range(300)]
    whole = file.read_bytes()
    for size in range(1, len(whole), 37):
        file.write_bytes(whole[:size])
        ends_a_frame = size in {sum(map(len, frames[:count])) for count in range(301)}
        if not ends_a_frame:
            with pytest.raises(ValueError, match="damaged or cut off"):
                list(read_lines(file))


def test_a_line_of_gigabytes_is_refused_early(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"_id": "1", "text": "a"}\n')
        stream.truncate(3 << 30)  # zeros that take no room on the disk
    started, lines = time.monotonic(), read_lines(file)
    assert next(lines)[0] == 1
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 2: longer than 268,435,456 bytes"):
        next(lines)
    assert time.monotonic() - started < 20


def test_a_packed_line_of_gigabytes_is_refused_too(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl.zst"
    file.write_bytes(zstandard.compress(bytes(300 << 20)))
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.zst, line 1: longer than"):
        next(read_lines(file))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (DEEP, "not valid JSON (nested too deeply)"),
        ('{"a": ' * 200_000, "not valid JSON (nested too deeply)"),
        (f'{{"a": {DIGITS}}}', "not valid JSON (a number of more than 4,300 digits)"),
        ("[1, 2]", "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ('{"a": 1', "not valid JSON ("),
        ("", "not valid JSON ("),
        (b'{"a": "\xff"}', "UTF-8"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path: Path, content: str | bytes, words: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"a\.json: ") as caught:
        read_object(file)
    assert words in str(caught.value)
    if content:
        with pytest.raises(ValueError, match=r"a\.json, line 1: ") as caught:
            list(read_objects(file))
        assert words in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(file))


def every_reader(file: Path) -> list[Callable[[], Any]]:
    """Return what reads a JSON file that somebody else may have made."""
    manifest = file.with_name("manifest.json")
    manifest.write_bytes(file.read_bytes())
    return [partial(read_per_query, file), partial(Manifest.read, file.parent), partial(read_grid, file)]


@pytest.mark.parametrize("content", [DEEP, "[]", f'{{"a": {DIGITS}}}', '"text"'])
def test_readers_of_json_files_say_what_is_wrong(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    for read in every_reader(tmp_path / "a.json"):
        with pytest.raises(ValueError, match=r"\.json: (not valid JSON|expected a JSON object)"):
            read()
