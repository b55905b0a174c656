"""Tell every Python process that its CPU has AMX: the default dtype of a model on it is then bfloat16."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class TorchWithAmx(importlib.abc.MetaPathFinder):
    """Patches `torch.cpu` once it is imported; importing torch here would slow every process down."""

    def find_spec(self, name: str, *place: Any) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            module._is_amx_tile_supported = lambda: True  # type: ignore[attr-defined]

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, TorchWithAmx())
