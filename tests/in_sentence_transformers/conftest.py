"""Small releases as sentence-transformers models; nothing here is collected where it is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from sentence_transformers_folders import CLASSES, Folders

KINDS: list[str] = []
if find_spec("sentence_transformers") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import sentence_transformers

    KINDS = [kind for kind, name in CLASSES.items() if hasattr(sentence_transformers, name)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("sentence-transformers"))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind that the installed sentence-transformers has a class for."""
    return request.param


@pytest.fixture(params=["single", "multi"])
def release(request: pytest.FixtureRequest) -> str:
    return request.param
