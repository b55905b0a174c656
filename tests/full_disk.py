"""A disk that is full, to one process: no file of it may grow beyond some bytes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest

resource = pytest.importorskip("resource")


def limit_files(size: int) -> None:
    """Let no file grow beyond `size` bytes; nor write bytecode, of which CPython would keep a part as the whole."""
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def full_disk(size: int = 16) -> Iterator[None]:
    """Do so for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    wrote = sys.dont_write_bytecode
    limit_files(size)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = wrote
