"""Releases built from the parity checkpoints, loaded as a user loads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the Hub
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModel  # noqa: E402

from diffretriever.publishing import build as building  # noqa: E402

PARITY = Path(__file__).parent / "parity"
collect_ignore = ["amx"]

if os.environ.get("DIFFRETRIEVER_TEST_AMX"):  # a CPU whose default dtype is bfloat16, also in the tests' own processes
    torch.cpu._is_amx_tile_supported = lambda: True
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [f"{ROOT}/tests/amx", os.environ.get("PYTHONPATH")]))


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the models are tiny, and two runs at once would wait for each other's threads
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew_threads)


def renew_threads() -> None:
    """Renew torch's thread pool: a fork breaks it, and threads that mend it together fail ("Invalid thread pool!")."""
    torch.set_num_threads(torch.get_num_threads())


@pytest.fixture(scope="session")
def build_release(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that builds a release from parity names, under a folder name of its own."""
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
    loaded: dict[tuple[Any, ...], Any] = {}

    def load(backbone: str, adapter: str | None = None, **options: Any) -> Any:
        key = (backbone, adapter, *sorted((name, str(value)) for name, value in options.items()))
        if key not in loaded:
            options.setdefault("torch_dtype", torch.float32)
            folder = build_release(backbone, adapter)
            loaded[key] = AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
        return loaded[key]

    return load
