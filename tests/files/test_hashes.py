"""Hashes against hashlib's own."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from diffretriever.files import hashes
from diffretriever.files.hashes import hash64, hash_file, hash_json, hash_once


def test_hashes_of_texts_are_the_same_everywhere() -> None:
    assert hash64("a") == int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "big") // 2
    assert hash64("a") != hash64("b")
    assert 0 <= hash64("half \ud83d a pair") < 2**63


def test_hashes_of_files_and_json(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(range(256)) * 70_000)  # more than one block
    assert hash_file(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert hash_file(file, 1000) == hashlib.sha256(file.read_bytes()[1000:]).hexdigest()
    assert hash_json({"b": [1], "a": None}) == hashlib.sha256(b'{"a": null, "b": [1]}').hexdigest()


def test_a_file_edited_within_one_tick_of_the_clock_has_another_hash(tmp_path: Path) -> None:
    """Same size, same times: what a file system with a coarse clock says of two edits close together."""
    file = tmp_path / "weights"
    for number in range(20):
        file.write_bytes(b"%04d" % number)
        os.utime(file, ns=(0, 0))
        assert hash_once(file) == hashlib.sha256(b"%04d" % number).hexdigest()


def test_a_file_left_alone_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Mock(return_value="0" * 64)
    monkeypatch.setattr(hashes, "hash_file", reading)
    file = tmp_path / "weights"
    file.write_bytes(b"a")
    hash_once(file)
    hash_once(file)
    assert reading.call_count == 2  # too young to be sure of
    changed = file.stat().st_ctime
    monkeypatch.setattr("time.time", lambda: changed + 60)
    for _ in range(3):
        hash_once(file)
    assert reading.call_count == 3
    file.write_bytes(b"ab")
    hash_once(file)
    assert reading.call_count == 4
