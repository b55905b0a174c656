"""Small releases for the frameworks' examples; each test file skips where its framework is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import ROOT
from pretend_cpu import pretend_cpu
from sentence_transformers_folders import Folders


@pytest.fixture(scope="module", autouse=True)
def cpu_without_bfloat16() -> Iterator[None]:
    """Make float32 the default dtype, in which the examples load; the tests compare at its tolerances."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_cpu(patch)
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("frameworks"))


@pytest.fixture(scope="session")
def release(folders: Folders) -> str:
    """The small release for SentenceTransformer."""
    return str(folders.folder("single", "dense"))


@pytest.fixture
def example() -> Callable[[str], Any]:
    """Return a function that imports one of examples/frameworks."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "frameworks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def vectors(folders: Folders) -> Callable[[list[str], bool], np.ndarray]:
    """Return a function that gives AutoModel's unit vectors of one side, from the release where it lies."""

    def encode(texts: list[str], is_query: bool) -> np.ndarray:
        means = folders.plain("single").encode_texts(texts, is_query).repr_hidden.mean(dim=1).numpy()
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    return encode


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs an example's main with arguments and gives what it printed."""

    def run(module: Any, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [module.__name__, *arguments])
        module.main()
        return capsys.readouterr().out

    return run
