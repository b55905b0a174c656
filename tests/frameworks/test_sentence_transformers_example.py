"""The sentence-transformers example, in the three classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from sentence_transformers_folders import CLASSES, MODES, Folders

sentence_transformers = pytest.importorskip("sentence_transformers")


@pytest.mark.parametrize("kind", CLASSES)
def test_example(folders: Folders, example: Callable[[str], Any], run_example: Callable[..., str], kind: str) -> None:
    if not hasattr(sentence_transformers, CLASSES[kind]):
        pytest.skip(f"{CLASSES[kind]} came with sentence-transformers 6")
    module, plain = example("sentence_transformers_search"), folders.plain("single")
    printed = run_example(module, "--model", str(folders.folder("single", kind)), "--kind", kind)
    queries, passages = plain.encode_texts(module.QUERIES, True), plain.encode_texts(module.PASSAGES, False)
    best = plain.score(queries, passages, MODES[kind]).max(dim=1)
    for query, score, place in zip(module.QUERIES, best.values.tolist(), best.indices.tolist(), strict=True):
        assert re.search(rf"^{query}\n +{score:.3f}  {re.escape(module.PASSAGES[place])}$", printed, re.MULTILINE)
    assert ("words of the first passage" in printed) == (kind == "sparse")
