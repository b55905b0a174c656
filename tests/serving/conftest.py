"""A release and its export, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import PlainEngine, Served, serving

from diffretriever.serving.plain_model import export_plain


@pytest.fixture(scope="session")
def tiny(load_release: Callable[..., Any]) -> Any:
    return load_release("tiny-dream", "dream-q4p16")  # K_q is not K_p


@pytest.fixture(scope="session")
def plain(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    export_plain(tiny, folder)
    return folder


@pytest.fixture(scope="session")
def engine(plain: Path) -> PlainEngine:
    return PlainEngine(plain)


@pytest.fixture
def server(engine: PlainEngine) -> Iterator[Served]:
    with serving(engine) as running:
        yield running
