"""Checkpoints of a training run: folders that appear whole or not at all, named by their optimiser step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..files.durable import publish_folder

PARTIAL = ".partial"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step that a checkpoint was made after."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_partial(folder: Path) -> None:
    """Remove what a save left behind that did not end."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def publish_checkpoint(folder: Path, step: int, keep: int) -> None:
    """Move a whole checkpoint out of the partial folder, then remove the oldest ones.

    Args:
        folder: the run's.
        step: names the checkpoint.
        keep: how many stay.
    """
    name = f"checkpoint-{step}"
    publish_folder(folder / PARTIAL / name, folder / name)  # one that this run has gone on from is made again
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
