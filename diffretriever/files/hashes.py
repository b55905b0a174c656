"""Hashes of texts, JSON values and files, the same in every process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .durable import BLOCK


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
