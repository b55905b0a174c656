"""The LlamaIndex example: its instructions are the role tags."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_index.embeddings.huggingface")
Vectors = Callable[[list[str], bool], np.ndarray]


def test_sides(example: Callable[[str], Any], release: str, vectors: Vectors, caplog: pytest.LogCaptureFixture) -> None:
    module = example("llama_index_search")
    found = module.embedding(release)
    texts = [*module.PASSAGES, "two\nlines", "<|query|> in a text"]
    assert np.allclose(found.get_text_embedding_batch(texts), vectors(texts, False), atol=3e-6)
    query = "songs\nfrom the internet"
    assert np.allclose(found.get_query_embedding(query), vectors([query], True)[0], atol=3e-6)
    assert not np.allclose(found.get_query_embedding(query), vectors([query], False)[0], atol=1e-3)
    assert "takes them as documents" not in caplog.text


def test_without_instructions_it_says_what_happens(
    example: Callable[[str], Any], release: str, vectors: Vectors, caplog: pytest.LogCaptureFixture
) -> None:
    """LlamaIndex then replaces the stored prompts by nothing, and queries are encoded as documents."""
    module = example("llama_index_search")
    plain = module.HuggingFaceEmbedding(model_name=release, trust_remote_code=True)
    with caplog.at_level(logging.WARNING):
        assert np.allclose(plain.get_query_embedding("radio"), vectors(["radio"], False)[0], atol=3e-6)
    assert caplog.text.count("takes them as documents") == 1


def test_example(
    example: Callable[[str], Any], release: str, vectors: Vectors, run_example: Callable[..., str]
) -> None:
    module = example("llama_index_search")
    printed = run_example(module, "--model", release, "database in one file").splitlines()
    scores = vectors(["database in one file"], True)[0] @ vectors(module.PASSAGES, False).T
    best = scores.argsort()[::-1][:2]
    assert printed == [f"{scores[place]:6.3f}  {module.PASSAGES[place]}" for place in best]
