"""Whole runs of `diffretriever train` for the tests, in this process or in a fork that may die."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from training_data import made_up_pairs, small_recipe, write_lines

from diffretriever.cli.main import main

RECIPE_KEYS = (
    "max_length max_steps global_batch_size hard_negatives rank alpha learning_rate warmup bf16 save_steps log_steps "
    "temperature"
).split()


def write_recipe(path: Path, **changes: Any) -> Path:
    recipe = small_recipe(**changes)
    path.write_text(yaml.safe_dump({name: getattr(recipe, name) for name in {*RECIPE_KEYS, *changes}}))
    return path


def write_pairs(path: Path, count: int = 24, negatives: int = 2) -> Path:
    return write_lines(path, made_up_pairs(count, negatives))


def arguments(recipe: Path, release: Path, pairs: Path, out: Path, *more: str) -> list[str]:
    paths = ["--recipe", recipe, "--model", release, "--pairs", pairs, "--out", out]
    return ["train", *map(str, paths), *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "adapter_model.safetensors"))


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def fork_train(command: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Starts a run in a forked process and returns its id; `prepare` may arrange an accident there."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout = sys.stderr = stream
            with _errors_shown():
                prepare()
                status = main(command)
    finally:
        os._exit(status)


@contextlib.contextmanager
def _errors_shown() -> Iterator[None]:
    """Prints what would be lost where a process ends by `os._exit`."""
    try:
        yield
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stderr.flush()


def wait(child: int) -> int:
    """Exit status of a child; minus the signal's number where one ended it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def wait_for(path: Path, seconds: float = 500) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
