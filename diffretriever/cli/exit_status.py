"""What a command's exit status says, one table for all of them.

0: done. 2: an input or an option is wrong; the message says which, and trying again cannot help. 3: interrupted, or a
disk, the memory, an engine or the Hub is full or away; the same command goes on from what is kept. 130 and 143, as
launchers expect them: `train` was stopped by SIGINT or SIGTERM after saving a checkpoint.
"""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path

from ..files.durable import FULL_DISK
from ..files.memory import in_short
from ..publishing.hub import Conflict, Passing
from ..search.qdrant.calls import EngineAwayError, EngineError

DONE, WRONG_INPUT, TRY_AGAIN = 0, 2, 3
FAILING_STORAGE = (*FULL_DISK, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
IN_WORDS = """Exit status: 0 done; 2 wrong input or options; 3 interrupted, or something is full or away: run again;
130, 143 training was stopped by a signal and has saved: run again."""
EXPECTED = (OSError, ValueError, ImportError, FloatingPointError, EngineError)  # told in words, without a traceback


def status_of(error: BaseException) -> int:
    """Return the exit status that an error stands for.

    >>> status_of(ValueError("no such mode")), status_of(OSError(errno.ENOSPC, "No space left on device"))
    (2, 3)
    """
    passing = isinstance(error, (EngineAwayError, Passing, Conflict))
    return TRY_AGAIN if passing or is_failing_storage(error) else WRONG_INPUT


def is_failing_storage(error: BaseException) -> bool:
    """Return whether a disk is full or does not answer."""
    return isinstance(error, OSError) and error.errno in FAILING_STORAGE


def cache_hint(error: BaseException) -> str:
    """Return what to do where a file in the cache of Hugging Face's libraries cannot be written; else nothing."""
    refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
    if not isinstance(error, OSError) or error.errno not in refused or not isinstance(error.filename, str):
        return ""
    from huggingface_hub import constants

    caches = {constants.HF_HOME, constants.HF_HUB_CACHE, os.environ.get("HF_MODULES_CACHE", constants.HF_HOME)}
    if not any(Path(error.filename).is_relative_to(cache) for cache in caches):
        return ""
    return ". It is in the cache of models and their code; set HF_HOME to a folder that can be written"


def told_of_full_memory(error: BaseException, options: argparse.Namespace) -> str:
    """Return what to say of a GPU's or the machine's memory that is full, and what makes a command take less.

    >>> told_of_full_memory(MemoryError(), argparse.Namespace(command="search"))
    'the memory is full (MemoryError). Free it of other programs, and run again'
    """
    less = ""
    if getattr(options, "command", None) == "train":
        less = (
            ", or train with fewer texts whose activations are held at once: --set grad_cache_chunk=8, another --output"
        )
    elif hasattr(options, "tokens_per_batch"):
        less = ", with a smaller --tokens-per-batch"
    return f"the memory is full ({in_short(error)}). Free it of other programs, and run again{less}"
