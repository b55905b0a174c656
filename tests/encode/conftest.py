"""A small model, small corpora, and the command as a user calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_helpers import made_up_texts, write_jsonl

from diffretriever.cli import main as cli


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus of 11 passages: three shards of 4, 4 and 3."""
    return write_jsonl(tmp_path / "passages.jsonl", made_up_texts(11))


@pytest.fixture
def tiny(load_release: Callable[..., Any]) -> Any:
    return load_release("tiny-llada", "llada-q4p4")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs `diffretriever …` in this process and returns its exit status."""
    return lambda *arguments: cli.main([str(argument) for argument in arguments])
