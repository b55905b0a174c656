"""The LangChain example: each side is encoded as itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("langchain_huggingface")
Vectors = Callable[[list[str], bool], np.ndarray]


def test_sides(example: Callable[[str], Any], release: str, vectors: Vectors) -> None:
    module = example("langchain_search")
    found = module.embeddings(release)
    texts = [*module.PASSAGES, ""]
    assert np.allclose(found.embed_documents(texts), vectors(texts, False), atol=3e-6)
    assert np.allclose(found.embed_query("internet radio"), vectors(["internet radio"], True)[0], atol=3e-6)
    assert not np.allclose(found.embed_query("internet radio"), vectors(["internet radio"], False)[0], atol=1e-3)


def test_line_breaks_become_spaces(example: Callable[[str], Any], release: str, vectors: Vectors) -> None:
    """LangChain's doing, and what the README says of it."""
    found = example("langchain_search").embeddings(release).embed_query("songs\nfrom the internet")
    assert np.allclose(found, vectors(["songs from the internet"], True)[0], atol=3e-6)


def test_example(
    example: Callable[[str], Any], release: str, vectors: Vectors, run_example: Callable[..., str]
) -> None:
    module = example("langchain_search")
    printed = run_example(module, "--model", release, "database in one file").splitlines()
    scores = vectors(["database in one file"], True)[0] @ vectors(module.PASSAGES, False).T
    best = scores.argsort()[::-1][:2]
    assert printed == [f"{scores[place]:6.3f}  {module.PASSAGES[place]}" for place in best]
    assert "SQL" in printed[0]
