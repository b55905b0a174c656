"""A numba that is there and does not work: what it would have compiled runs as written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REFUSAL = "Numba needs NumPy 2.4 or less. Got NumPy 2.9."
SEARCH = """
import torch
from diffretriever.search import Searcher, exact
exact.COMPILED_FROM = 0
side = {"repr_hidden": torch.eye(3)[:, None]}
print(Searcher(side).search(side, "multi_dense", 1).ids)
"""
BM25 = """
from diffretriever.evaluation import bm25
bm25.COMPILED_FROM = 0
print(bm25.BM25(["a", "b"], ["an apple", "a pear"]).search({"q": "pears"}, 2))
"""


@pytest.mark.parametrize(
    ("code", "printed", "kind"),
    [
        (SEARCH, "[['0'], ['1'], ['2']]", "ImportError"),
        (SEARCH, "[['0'], ['1'], ['2']]", "OSError"),
        (BM25, "{'q': {'b': ", "ImportError"),  # bm25s, which imports it too, takes nothing else
    ],
)
def test_search_and_bm25_go_on_without_it(tmp_path: Path, code: str, printed: str, kind: str) -> None:
    (tmp_path / "numba.py").write_text(f"raise {kind}({REFUSAL!r})\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert printed in ran.stdout, ran.stderr
    assert f"numba is installed and cannot be imported, so nothing is compiled: {REFUSAL}" in ran.stderr
