"""Search in the five scoring modes: exact, compressed, or through an engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .modes import MODES

if TYPE_CHECKING:
    from ..store.compression import compress, open_store
    from .exact import ExactEngine
    from .qdrant.calls import EngineAwayError, EngineError
    from .qdrant.engine import QdrantEngine
    from .qdrant.upload import upload
    from .results import Hit, Results
    from .searcher import Searcher

__all__ = [
    "MODES",
    "EngineAwayError",
    "EngineError",
    "ExactEngine",
    "Hit",
    "QdrantEngine",
    "Results",
    "Searcher",
    "compress",
    "open_store",
    "upload",
]

_MODULES = {"EngineError": ".qdrant.calls", "ExactEngine": ".exact", "QdrantEngine": ".qdrant.engine"}
_MODULES |= {"EngineAwayError": ".qdrant.calls"}
_MODULES |= {"compress": "..store.compression", "open_store": "..store.compression", "upload": ".qdrant.upload"}
_MODULES |= {"Hit": ".results", "Results": ".results", "Searcher": ".searcher"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the command line needs none of them to print its help."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)
