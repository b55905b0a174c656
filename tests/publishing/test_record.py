"""Hashes of `release.json`, against git and sha256sum."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffretriever.publishing import hub, record


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@settings(max_examples=10, deadline=None)
@given(content=st.binary(max_size=3000))
def test_hashes_are_those_of_git(content: bytes) -> None:
    done = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
    assert hub.hash_content(content).git_sha1 == done.stdout.decode().strip()


@pytest.mark.parametrize("size", [0, 1, hub.CHUNK - 1, hub.CHUNK, 2 * hub.CHUNK + 3])
def test_a_file_is_hashed_in_pieces(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(content)
    blob = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    expected = hub.FileHash(size, hashlib.sha256(content).hexdigest(), blob)
    assert hub.hash_content(tmp_path / "file") == hub.hash_content(content) == expected


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_the_combined_hash_can_be_had_without_us(tmp_path: Path) -> None:
    files = {"b.py": b"second", "a.py": b"first", "sub/c.py": b""}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    command = "sha256sum a.py b.py sub/c.py | sha256sum | cut -d' ' -f1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    hashes = {name: hub.hash_content(content).sha256 for name, content in files.items()}
    assert record.combined_hash(hashes) == done.stdout.strip()


def test_which_files_a_release_has(tmp_path: Path) -> None:
    for name in ("b.txt", "a/x.json", ".gitattributes", ".cache/hub/x", "__pycache__/x.pyc", "a/__pycache__/y.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(record.release_files(tmp_path)) == ["a/x.json", "b.txt"]
