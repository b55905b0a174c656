"""Checkpoints of a run: folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

PARTIAL = ".partial"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint was made after."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_partial(folder: Path) -> None:
    """Removes what a save left behind that did not end."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def publish_checkpoint(folder: Path, step: int, keep: int) -> None:
    """Moves a whole checkpoint out of the partial folder, then removes the oldest ones.

    Args:
        folder: the run's.
        step: names the checkpoint.
        keep: how many stay.
    """
    made, place = folder / PARTIAL / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    if place.exists():  # a checkpoint that this run has gone on from, made again
        shutil.rmtree(place)
    os.replace(made, place)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
