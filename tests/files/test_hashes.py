"""Hashes against hashlib's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffretriever.files.hashes import hash64, hash_file, hash_json


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
