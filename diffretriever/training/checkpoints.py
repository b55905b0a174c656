"""Checkpoints of a training run: folders that appear whole or not at all, named by their optimiser step."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files.durable import publish_folder
from ..files.removal import refuse_link, remove_folder
from ..files.sealed import SEAL_FILE, Damaged, check_seal, seal

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


def newest_whole(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint to go on from; every file of it is read and compared with its hash.

    Args:
        folder: the run's.
        say: told of each damaged checkpoint that is passed over.

    Returns:
        The checkpoint and the record of the run that it belongs to; None where none is whole.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            record = check_seal(checkpoint)
        except Damaged as damage:
            say(f"{checkpoint} {damage}; it is passed over")
        else:
            return checkpoint, record
    if found:
        say("no whole checkpoint is left: the run begins anew")
    return None


def partial_checkpoint(folder: Path, step: int) -> Path:
    """Return where a checkpoint is filled before `publish_checkpoint`."""
    return folder / PARTIAL / f"checkpoint-{step}"


def remove_partial(folder: Path) -> None:
    """Remove what a save left behind that did not end.

    Raises:
        FileExistsError: it is a link; the next checkpoint would be filled behind it.
    """
    refuse_link(folder / PARTIAL)
    with suppress(OSError):  # what a file system keeps for a while is overwritten
        remove_folder(folder / PARTIAL)


def publish_checkpoint(folder: Path, step: int, keep: int, record: dict[str, Any]) -> Path:
    """Seal a whole checkpoint and move it out of the partial folder, then remove those that are no longer needed.

    Args:
        folder: the run's.
        step: names the checkpoint.
        keep: how many stay. Later ones than this do not: they were damaged, and the run went on from before them.
            Links and folders without a manifest stay, too: no save of this version left them.
        record: of the run; kept in the checkpoint's manifest.

    Returns:
        The checkpoint.
    """
    made = partial_checkpoint(folder, step)
    place = folder / made.name
    seal(made, record)
    publish_folder(made, place)  # one that this run has gone on from is made again
    kept = [path for path in checkpoints(folder) if step_of(path) <= step][-keep:]
    for old in checkpoints(folder):
        if old not in kept and not old.is_symlink() and (old / SEAL_FILE).is_file():
            remove_folder(old)
    return place
