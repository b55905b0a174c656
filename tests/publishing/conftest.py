"""A release to push, and a Hub on loopback to push it to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fresh
import huggingface_hub
import pytest
from checkpoint_folders import PARITY
from fake_hub import NAME, TOKEN, FakeHub, forget_connections

import publish
from diffretriever.publishing import build as building
from diffretriever.publishing import check


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small release with its own backbone and recorded vectors; not to be changed."""
    out = tmp_path_factory.mktemp("built") / NAME
    backbone, adapter = PARITY / "backbones" / "tiny-llada", PARITY / "adapters" / "llada-single"
    building.build(str(backbone), out, str(adapter), with_backbone=True, recording=building.Recording("always"))
    return out


@pytest.fixture
def release(built: Path, tmp_path: Path) -> Path:
    """A copy of the release, to change."""
    return Path(shutil.copytree(built, tmp_path / NAME))


@pytest.fixture
def quick_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for what a check does in a fresh process, which has tests of its own."""

    def check_loaded(*arguments: Any) -> None:
        arguments[-1].passed.append("stood in for")

    monkeypatch.setattr(check, "check_loaded", check_loaded)


@pytest.fixture
def forked_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork a check's fresh process from one that has imported torch; test_push_load_check starts an interpreter."""

    def run(command: list[str], **options: Any) -> Any:
        return fresh.run(command[1:], env=options["env"], cwd=options["cwd"], input=options["input"])

    monkeypatch.setattr(check, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, quick_check: None) -> Iterator[FakeHub]:
    """A Hub on loopback that this process's huggingface_hub talks to, with one user's token."""
    server = FakeHub()
    server.tokens[TOKEN] = {"name": "someone", "role": "write"}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    forget_connections()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield server
    server.close()
    forget_connections()


@pytest.fixture
def push(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs `publish.py push` and returns the exit status and all that was printed."""

    def run(*arguments: Any) -> tuple[int, str]:
        capsys.readouterr()
        status = publish.main(["push", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run
