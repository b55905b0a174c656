"""Checkpoints that survive an interruption while they are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes a state in one step: a crash or a full disk while writing leaves the previous file.

    Args:
        path: the file.
        state: tensors, numbers, strings, lists and dicts.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """Reads a state written by `save_checkpoint`; None where there is none yet."""
    path = Path(path)
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
