"""Hashes of texts, JSON values and files, the same in every process."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .durable import BLOCK

SETTLED = 3.0  # seconds: clocks of file systems tick every 2 s at the coarsest (FAT), and a server's may differ
_remembered: dict[tuple[Path, int, int, int, int], str] = {}


def hash64(text: str | bytes) -> int:
    """Return a hash of a text or of bytes, 63 bits, so that it fits every 64-bit integer type.

    >>> hash64("a")
    2340832890917691671
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def hash_json(values: Any) -> str:
    """Return the SHA-256 of JSON values, whatever the order of their fields, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def hash_file(file: Path, start: int = 0) -> str:
    """Return the SHA-256 of a file's bytes from `start` on, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start)
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_once(file: Path) -> str:
    """Return `hash_file` of a file that a process asks for again and again, read anew once it may have changed.

    What a file system says of a file tells one state of it from the next only when its clock ticked in between, so a
    hash is remembered only of a file that was left alone for `SETTLED` seconds.
    """
    now, status = time.time(), os.stat(file)
    state = (file, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    digest = _remembered.get(state) or hash_file(file)
    if now - max(status.st_mtime, status.st_ctime) >= SETTLED:
        _remembered[state] = digest
    return digest


def with_own_hash(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file together with a hash of itself, which `check_own_hash` compares."""
    return {**content, "sha256": hash_json(content)}


def check_own_hash(whole: Mapping[str, Any], file: Path, beside: Collection[str] = ()) -> dict[str, Any]:
    """Return the content of a JSON file that holds a hash of itself.

    Args:
        whole: what the file holds.
        file: for messages.
        beside: fields that stand beside the content and are not hashed.

    Raises:
        ValueError: it was altered.
    """
    content = {name: value for name, value in whole.items() if name != "sha256" and name not in beside}
    if whole.get("sha256") != hash_json(content):
        raise ValueError(f"{file}: the content does not match its own hash; it was damaged or edited.")
    return content
