"""Scores compiled by numba, in one reading of what is stored: those of products in float64, and of torch's own way."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from diffretriever.model.scoring import multi_dense, single_dense
from diffretriever.search import ExactEngine, Searcher, compress, exact
from diffretriever.store.segments import query_vectors
from diffretriever.store.store import ShardContents, Store, write_store

pytest.importorskip("numba")
from numba.core.caching import IndexDataCacheFile

from diffretriever.search import compiled

Side = dict[str, torch.Tensor]
KINDS = {"single_dense": single_dense, "multi_dense": multi_dense}
STORED = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def compile_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "COMPILED_FROM", 0)


def made_up(
    seed: int, texts: int, k: int, width: int, dtype: torch.dtype = torch.float32, *, missing: bool = False
) -> Side:
    generator = torch.Generator().manual_seed(seed)
    side = {"repr_hidden": normalize(torch.randn(texts, k, width, generator=generator), dim=-1).to(dtype)}
    if missing:
        side["repr_mask"] = torch.rand(texts, k, generator=generator) > 0.4
    side["sparse_indices"] = torch.randint(0, 50, (texts, 4), generator=generator)
    side["sparse_values"] = torch.rand(texts, 4, generator=generator)
    return side


def store_of(folder: Path, side: Side, size: int, dtype: str) -> Store:
    """Write a store of all vectors with shards of `size` texts."""
    shards = []
    for start in range(0, len(side["repr_hidden"]), size):
        part = {name: tensor[start : start + size] for name, tensor in side.items()}
        ids = [f"p{start + row}" for row in range(len(part["repr_hidden"]))]
        sparse = part["sparse_indices"], part["sparse_values"]
        shards.append(ShardContents(ids, part["repr_hidden"], *sparse, repr_mask=part.get("repr_mask")))
    return write_store(folder, shards, {"dtype": dtype})


def expected_scores(queries: Side, passages: Side, kind: str) -> torch.Tensor:
    """Return the scores in float64 by `model.score`'s functions, [Q, P]."""
    sides = (queries["repr_hidden"].double(), passages["repr_hidden"].double())
    return KINDS[kind](*sides, queries.get("repr_mask"), passages.get("repr_mask"))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("asked", [1, 3])
@pytest.mark.parametrize("width", [20, 192, 1700])  # less than a register holds, whole ones, more than one part
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_plain_products(
    kind: str, dtype: torch.dtype, width: int, asked: int, missing: bool
) -> None:
    passages, queries = made_up(0, 150, 3, width, dtype, missing=missing), made_up(1, asked, 5, width, missing=missing)
    engine = ExactEngine(passages)
    positions, scores = engine.rank(query_vectors(queries), kind, 150)
    assert engine._compiled is compiled.scores_of_stored
    expected = expected_scores(queries, passages, kind)
    assert torch.allclose(scores.double(), expected.gather(1, positions), atol=2e-7, rtol=2e-6)
    assert torch.equal(positions.sort(dim=1).values[0], torch.arange(150))
    assert bool((scores == -math.inf).any()) == bool((expected == -math.inf).any())
    # a few chosen ones have the same bits as in the ranking
    chosen = torch.tensor([3, 64, 65, 149])
    again = engine.scores_at(query_vectors(queries), kind, [chosen] * asked)
    for query in range(asked):
        for position, score in zip(chosen.tolist(), again[query].tolist(), strict=True):
            assert score == float(scores[query][positions[query] == position])


@pytest.mark.parametrize("mode", [*KINDS, "fusion_multi_sparse_max"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_store_ranks_as_without_numba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, mode: str) -> None:
    side = made_up(0, 500, 4, 40, missing=True)
    store = store_of(tmp_path / "store", side, size=70, dtype=dtype)
    query = made_up(1, 2, 4, 40)
    engine = ExactEngine(store)
    found = Searcher(engine).search(query, mode, 20)
    assert engine._compiled is not None
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "numba", None)
        plain = ExactEngine(store)
        expected = Searcher(plain).search(query, mode, 20)
        assert plain._compiled is None
    assert found.ids == expected.ids
    assert torch.allclose(found.scores, expected.scores, atol=1e-6)


def test_copies_tie_wherever_they_lie() -> None:
    """Of equal passages the first is first: each is added up in the same order."""
    side = made_up(0, 1, 3, 100, torch.float16)
    passages = {"repr_hidden": side["repr_hidden"].repeat(333, 1, 1)}
    for kind in KINDS:
        found = Searcher(passages).search(made_up(1, 1, 4, 100), kind, 333)
        assert found.positions[0].tolist() == list(range(333))
        assert len(set(found.scores[0].tolist())) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vector", [0, 2])
def test_nan_is_found_and_its_passage_named(kind: str, vector: int) -> None:
    passages = made_up(0, 200, 3, 48, torch.float16)
    passages["repr_hidden"][70, vector, 5] = math.nan
    with pytest.raises(ValueError, match=r"the passage at position 70 is NaN"):
        Searcher(passages).search(made_up(1, 1, 4, 48), kind, 5)
    passages["repr_mask"] = torch.ones(200, 3, dtype=torch.bool)
    passages["repr_mask"][70, vector] = False  # what does not exist may hold anything
    assert len(Searcher(passages).search(made_up(1, 1, 4, 48), kind, 200).ids[0]) == 200


def test_infinite_numbers_are_no_nan() -> None:
    passages = {"repr_hidden": torch.ones(2, 1, 4, dtype=torch.float16)}
    passages["repr_hidden"][1, 0, 2] = math.inf
    found = Searcher(passages).search({"repr_hidden": torch.ones(1, 1, 4)}, "multi_dense", 2)
    assert found.scores.tolist() == [[math.inf, 4.0]]


def test_other_dimensions_are_named() -> None:
    with pytest.raises(ValueError, match="queries have 24 dimensions, passages 48"):
        Searcher(made_up(0, 9, 1, 48)).search(made_up(1, 1, 1, 24), "multi_dense", 5)


def test_codes_doubles_and_few_passages_are_scored_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "store", made_up(0, 300, 2, 16), size=300, dtype="float16")
    codes = compress(store, tmp_path / "codes", 4)
    for passages in (codes, {"repr_hidden": torch.ones(3, 1, 4, dtype=torch.float64)}):
        assert ExactEngine(passages)._compiled is None
    assert ExactEngine(store)._compiled is not None
    monkeypatch.setattr(exact, "COMPILED_FROM", 300 * 2 * 16 + 1)
    assert ExactEngine(store)._compiled is None
    assert ExactEngine({"repr_hidden": torch.empty(0, 1, 4)})._compiled is None


def test_it_is_compiled_without_a_place_to_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in a folder that cannot be written, of a user without one."""
    njit = compiled.numba.njit

    def nowhere(*functions: Any, cache: bool = False, **settings: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")
        return njit(*functions, **settings)

    monkeypatch.setattr(compiled.numba, "njit", nowhere)
    assert compiled.kept(lambda number: number + 1)(1) == 2


def test_a_full_disk_stops_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def full(self: IndexDataCacheFile, key: Any, data: Any) -> None:
        tried.append(key)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "load", lambda self, key: None)
    monkeypatch.setattr(IndexDataCacheFile, "save", full)
    monkeypatch.setattr(compiled, "write_scores", compiled.kept(compiled.write_scores.py_func))
    side = {"repr_hidden": torch.ones(3, 1, 4)}
    for _ in range(2):
        assert Searcher(side).search(side, "multi_dense", 2).scores.tolist() == [[4.0, 4.0]] * 3
    assert len(tried) == 1


def test_small_searches_never_import_numba() -> None:
    """Importing it takes longer than such a search."""
    code = (
        "import sys, torch; from diffretriever.search import Searcher; side = {'repr_hidden': torch.ones(3, 1, 4)}; "
        "Searcher(side).search(side, 'multi_dense', 2); assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
