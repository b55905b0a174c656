"""Search over stores, the parts that search is made of, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffretriever.cli.display import text_width, wrap
from diffretriever.search import MODES, ExactEngine, Searcher
from diffretriever.search import sparse as sparse_module
from diffretriever.search.sparse import build_postings
from diffretriever.search.topk import TopK
from diffretriever.store.segments import TensorSegment
from diffretriever.store.store import ShardContents, Store, write_store

Side = dict[str, torch.Tensor]


def vectors(seed: int, texts: int, k: int = 3, width: int = 20, terms: int = 5) -> Side:
    generator = torch.Generator().manual_seed(seed)
    side = {"repr_hidden": torch.nn.functional.normalize(torch.randn(texts, k, width, generator=generator), dim=-1)}
    side["sparse_indices"] = torch.randint(0, 15, (texts, terms), generator=generator)
    return side | {"sparse_values": torch.rand(texts, terms, generator=generator)}


def make_store(folder: Path, vectors: Side, size: int = 7, **fields: Any) -> Store:
    """Write a store with shards of `size` texts."""
    shards = []
    for start in range(0, len(vectors["repr_hidden"]), size):
        hidden, indices, values = (tensor[start : start + size] for tensor in vectors.values())
        shards.append(ShardContents([f"p{start + row}" for row in range(len(hidden))], hidden, indices, values))
    return write_store(folder, shards, fields)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_store_is_searched_as_the_vectors_it_holds(tmp_path: Path, mode: str, dtype: str, in_memory: bool) -> None:
    store = make_store(tmp_path / "store", vectors(0, 40), dtype=dtype)
    held = {"repr_hidden": torch.cat([shard.dense(0, len(shard)) for shard in store.shards()])}
    held["sparse_indices"] = torch.cat([shard.sparse_indices for shard in store.shards()])
    held["sparse_values"] = torch.cat([shard.sparse_values for shard in store.shards()]).float()
    queries = vectors(1, 6, k=2)
    found = Searcher(store, in_memory=in_memory, block_size=5).search(queries, mode, 9, candidates=12)
    expected = Searcher(held, ids=store.ids()).search(queries, mode, 9, candidates=12)
    assert torch.allclose(found.scores, expected.scores, atol=1e-6)
    for hits in found:
        assert [hit.id for hit in hits] == [f"p{hit.position}" for hit in hits]


def test_queries_from_a_store_bring_their_ids(tmp_path: Path) -> None:
    store = make_store(tmp_path / "passages", vectors(0, 20), dtype="float32")
    queries = make_store(tmp_path / "queries", vectors(1, 9, k=2), size=4, side="query", dtype="float32")
    results = Searcher(store).search(queries, "multi_dense", 3)
    direct = Searcher(store).search(vectors(1, 9, k=2), "multi_dense", 3)
    assert results.ids == direct.ids
    assert list(results.run()) == [f"p{row}" for row in range(9)]
    with pytest.raises(ValueError, match="9 queries and 0 query ids"):
        direct.run()


def test_queries_of_another_model_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "passages", vectors(0, 20), model="ours", adapter_sha256="a")
    queries = make_store(tmp_path / "queries", vectors(1, 3), side="query", model="theirs", adapter_sha256="b")
    with pytest.raises(ValueError, match=r"encoded with 'ours', the queries with 'theirs'.*adapter_sha256"):
        Searcher(store).search(queries)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.sampled_from([-float("inf"), -1.0, -0.0, 0.0, 0.5, 1.0]), min_size=1, max_size=60),
    k=st.integers(1, 70),
    size=st.integers(1, 61),
)
def test_top_k_is_a_stable_sort(values: list[float], k: int, size: int) -> None:
    best = TopK(2, k)
    for start in range(0, len(values), size):
        block = torch.tensor(values[start : start + size])
        best.update(torch.stack([block, -block], dim=1), start)
    positions, scores = best.result()
    for row, sign in ((0, 1.0), (1, -1.0)):
        order = sorted(range(len(values)), key=lambda p, sign=sign: (-sign * values[p], p))[:k]  # type: ignore[misc]
        assert positions[row].tolist() == order
        assert scores[row].tolist() == [sign * values[p] for p in order]


@pytest.mark.parametrize("chunk", [1, 3, 10, 100])
def test_the_inverted_index_gives_dot_products(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(sparse_module, "CHUNK", chunk)
    sides = [vectors(seed, count, terms=terms) for seed, count, terms in ((0, 8, 5), (1, 5, 3), (2, 1, 5))]
    segments, offset = [], 0
    for side in sides:
        pair = (side["sparse_indices"], side["sparse_values"])
        segments.append(TensorSegment(side["repr_hidden"], None, pair, offset))
        offset += len(side["repr_hidden"])
    parts = build_postings(list(segments))
    assert [part.offset for part in parts] == sorted({part.offset for part in parts})
    assert sum(part.length for part in parts) == 14
    query = vectors(3, 1)
    expected = torch.zeros(14)
    for row, (indices, values) in enumerate(
        pair for side in sides for pair in zip(side["sparse_indices"], side["sparse_values"], strict=True)
    ):
        for term, weight in zip(query["sparse_indices"][0], query["sparse_values"][0], strict=True):
            expected[row] += (values * (indices == term)).sum() * weight
    found = torch.empty(14)
    for part in parts:
        part.scores(
            query["sparse_indices"][0], query["sparse_values"][0], found[part.offset : part.offset + part.length]
        )
    assert torch.allclose(found, expected, atol=1e-6)


def test_memory_does_not_grow_with_the_collection() -> None:
    held = []
    for count in (5_000, 20_000):
        passages = {"repr_hidden": vectors(0, count, k=4, width=64, terms=1)["repr_hidden"].half()}
        engine = ExactEngine(passages, block_size=500)
        Searcher(engine).search(vectors(1, 50, k=4, width=64), "multi_dense", 10)
        held.append([sum(buffer.numel() for buffer in spare._held.values()) for spare in engine._spare])
    assert held[0] == held[1]
    assert [size > 0 for size in held[0]] == [True]  # one thread, one workspace, given back


def test_an_empty_collection_and_no_queries() -> None:
    none, some = vectors(0, 0), vectors(1, 2)
    for mode in MODES:
        assert Searcher(none).search(some, mode).ids == [[], []]
        assert Searcher(some).search(none, mode).ids == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "dense"}, r"'dense' is not known; the modes are single_dense, multi_dense"),
        ({"top_k": 0}, "`top_k` must be a whole number from 1, got 0"),
        ({"candidates": -1}, "`candidates` must be a whole number from 1, got -1"),
        ({"fusion_weight": 1.5}, "`fusion_weight` must lie between 0 and 1, got 1.5"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Searcher(vectors(0, 4)).search(vectors(1, 2), **options)


def test_vectors_that_cannot_be_searched() -> None:
    passages, queries = vectors(0, 6), vectors(1, 2)
    with pytest.raises(ValueError, match="queries have 8 dimensions, passages 20; they were made by different models"):
        Searcher(passages).search(vectors(1, 2, width=8))
    dense = {"repr_hidden": queries["repr_hidden"]}
    with pytest.raises(ValueError, match="`queries` has no sparse vectors; encode it with compute_sparse=True"):
        Searcher(passages).search(dense, "sparse_max")
    with pytest.raises(ValueError, match="the passages have no sparse vectors"):
        Searcher({"repr_hidden": passages["repr_hidden"]}).search(queries, "fusion_multi_sparse_max")
    with pytest.raises(ValueError, match="`ids` has 1 entries for 6 passages"):
        Searcher(passages, ids=["a"])
    with pytest.raises(ValueError, match="must be a store, an output of encode_texts or an engine, got str"):
        Searcher("folder")
    passages["repr_hidden"][4, 1, 0] = torch.nan
    with pytest.raises(ValueError, match="the passage at position 4 is NaN"):
        Searcher(passages, block_size=3).search(queries)
    passages["sparse_values"][3, 0] = torch.inf
    with pytest.raises(ValueError, match="`sparse_values` of the passage at position 3"):
        Searcher(passages).search(queries, "sparse_max")


@given(text=st.text(), width=st.integers(4, 60), lines=st.integers(1, 4))
def test_wrapped_text_fits_and_keeps_its_words(text: str, width: int, lines: int) -> None:
    wrapped = wrap(text, width, lines)
    assert len(wrapped) <= lines
    assert all(text_width(line) <= width for line in wrapped)
    if not wrapped or not wrapped[-1].endswith("…"):
        assert "".join("".join(wrapped).split()) == "".join(wrap(text, 10**6, 1)).replace(" ", "")
