"""The Haystack example: each side is encoded as itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

haystack = pytest.importorskip("haystack")
embedders = pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers")
Vectors = Callable[[list[str], bool], np.ndarray]


def embed_query(embedder: Any, text: str) -> list[float]:
    embedder.warm_up()
    return embedder.run(text)["embedding"]


def test_sides(example: Callable[[str], Any], release: str, vectors: Vectors) -> None:
    module = example("haystack_search")
    documents = module.document_embedder(release)
    documents.warm_up()
    texts = [*module.PASSAGES, "two\nlines"]
    found = documents.run([haystack.Document(content=text) for text in texts])["documents"]
    assert np.allclose([document.embedding for document in found], vectors(texts, False), atol=3e-6)
    query = "songs\nfrom the internet"
    found = embed_query(module.query_embedder(release), query)
    assert np.allclose(found, vectors([query], True)[0], atol=3e-6)
    assert not np.allclose(found, vectors([query], False)[0], atol=1e-3)


def test_prefix_as_role_tag(release: str, vectors: Vectors) -> None:
    """Haystack's own way of putting a prompt in front of each text."""
    embedder = embedders.SentenceTransformersTextEmbedder(
        model=release, trust_remote_code=True, prefix="<|query|>", progress_bar=False
    )
    assert np.allclose(embed_query(embedder, "internet radio"), vectors(["internet radio"], True)[0], atol=3e-6)


def test_example(
    example: Callable[[str], Any], release: str, vectors: Vectors, run_example: Callable[..., str]
) -> None:
    module = example("haystack_search")
    printed = run_example(module, "--model", release, "database in one file").splitlines()
    scores = vectors(["database in one file"], True)[0] @ vectors(module.PASSAGES, False).T
    best = scores.argsort()[::-1][:2]
    found = [line.split("  ")[-1] for line in printed]
    assert found == [module.PASSAGES[place] for place in best]
