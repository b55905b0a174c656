"""Whole runs of `diffretriever train` for the tests, in this process or in a fork that may die."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState
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
    paths = ["--recipe", recipe, "--model", release, "--pairs", pairs, "--output", out]
    return ["train", *map(str, paths), *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "adapter_model.safetensors"))


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def fork(run: Callable[[], int], log: Path) -> int:
    """Starts a function in a forked process, which ends with the status that it returns; returns the process's id."""
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
                status = run()
    finally:
        os._exit(status)


def fork_train(command: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Starts a run in a forked process and returns its id; `prepare` may arrange an accident there."""

    def run() -> int:
        prepare()
        return main(command)

    return fork(run, log)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def fork_two(run: Callable[[], int], log: Path) -> list[int]:
    """Starts two forked processes that know of each other as a launcher's do, and returns their ids."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def launched(rank: int) -> int:
        os.environ.update(places, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
        AcceleratorState._reset_state(reset_partial_state=True)  # what runs of the parent left
        return run()

    return [fork(functools.partial(launched, rank), log.with_suffix(f".{rank}")) for rank in range(2)]


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
