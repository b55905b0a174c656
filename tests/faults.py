"""A disk that fails, and a process that dies, at the n-th change of what is on the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Every way in which the code changes what is on the disk.
CHANGES = ("open", "write", "fsync", "replace", "link", "unlink", "mkdir", "rmdir", "rename", "truncate")


class Died(BaseException):
    """The process is dead: no handler of it changes the disk any more."""


@contextmanager
def fault_at(call: int, dies: bool) -> Iterator[list[int]]:
    """Let the n-th change of the disk fail; of a write, half has then been written.

    Args:
        call: n, from 0.
        dies: raise `Died` at it and at every later one; else it fails alone, for want of room.

    Yields:
        A list of one number, the changes that are left before the fault; below 0 once it has come.
    """
    left = [call]

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return original(*arguments, **options)  # reading changes nothing
            left[0] -= 1
            if left[0] == -1 and name == "write":
                original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            if left[0] < 0 and dies:
                raise Died
            if left[0] == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **options)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, watch(name, getattr(os, name)))
        yield left
