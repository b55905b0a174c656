"""Sealed folders: what is missing, cut off, altered or added is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffretriever.files.durable import write_json
from diffretriever.files.hashes import with_own_hash
from diffretriever.files.sealed import SEAL_FILE, Damaged, check_seal, seal


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "sealed"
    (folder / "inner").mkdir(parents=True)
    (folder / "one").write_bytes(b"1234")
    (folder / "inner" / "two").write_bytes(b"")
    seal(folder, {"made": "from ä", "of": [1, None]})
    return folder


def test_a_whole_folder_says_what_it_is_about(sealed: Path) -> None:
    assert check_seal(sealed) == {"made": "from ä", "of": [1, None]}
    (sealed / ".nfs0001").touch()  # what file systems and people leave beside the files
    assert check_seal(sealed) == {"made": "from ä", "of": [1, None]}
    seal(sealed, {})  # again
    assert check_seal(sealed) == {}


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "inner" / "two").unlink(), "lacks inner/two"),
        (lambda folder: (folder / "one").write_bytes(b"123"), "holds one with 3 bytes instead of 4"),
        (lambda folder: (folder / "one").write_bytes(b"1334"), "holds one with other content"),
        (lambda folder: (folder / SEAL_FILE).unlink(), "has no manifest.json: it was not written to its end"),
        (lambda folder: (folder / SEAL_FILE).write_bytes(b"\xff"), "holds a damaged file, "),
        (lambda folder: (folder / SEAL_FILE).write_text("[" * 100_000), "holds a damaged file, .*nested too deeply"),
        (lambda folder: (folder / SEAL_FILE).write_text("[]"), "holds a damaged file, .*expected a JSON object"),
        (lambda folder: (folder / SEAL_FILE).write_text('{"files": 5}'), "damaged file, .*not match its own hash"),
        (lambda folder: write_json(folder / SEAL_FILE, with_own_hash({"about": {}, "files": 5})), "files must be keys"),
        (lambda folder: write_json(folder / SEAL_FILE, with_own_hash({"about": 5, "files": {}})), "about must be keys"),
        (lambda folder: write_json(folder / SEAL_FILE, with_own_hash({"about": {}})), "lacks `files`"),
        (
            lambda folder: write_json(folder / SEAL_FILE, with_own_hash({"about": {}, "files": {"one": 5}})),
            r"files\.one: expected keys and values, got int",
        ),
    ],
)
def test_damage_is_told(sealed: Path, harm: Callable[[Path], Any], words: str) -> None:
    harm(sealed)
    with pytest.raises(Damaged, match=words):
        check_seal(sealed)


@pytest.mark.parametrize("field", ["about", "files"])
def test_an_edited_manifest_is_told(sealed: Path, field: str) -> None:
    content = json.loads((sealed / SEAL_FILE).read_text())
    content[field] = {}
    (sealed / SEAL_FILE).write_text(json.dumps(content))
    with pytest.raises(
        Damaged, match=r"holds a damaged file, .*manifest\.json: the content does not match its own hash"
    ):
        check_seal(sealed)
