"""Backbones, adapters and loaded baselines; equal calls share what they get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_backbones import make_adapter, make_backbone

from diffretriever.baselines import load_baseline


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes the backbone of a kind."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_backbone(kind, tmp_path_factory.mktemp("backbones") / kind)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, backbone: Callable[[str], Path]) -> Callable[..., Path]:
    """Return a function that makes an adapter for the backbone of a kind."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, head: bool = False) -> Path:
        if (kind, head) not in made:
            folder = tmp_path_factory.mktemp("adapters") / kind
            made[kind, head] = make_adapter(backbone(kind), folder, head)
        return made[kind, head]

    return make


@pytest.fixture(scope="session")
def load(backbone: Callable[[str], Path]) -> Callable[..., Any]:
    """Return a function that loads a baseline of a kind of backbone in float32."""
    loaded: dict[tuple[Any, ...], Any] = {}

    def make(method: str, kind: str, **options: Any) -> Any:
        key = (method, kind, *sorted((name, str(value)) for name, value in options.items()))
        if key not in loaded:
            loaded[key] = load_baseline(backbone(kind), method, dtype=torch.float32, **options)
        return loaded[key]

    return make
