"""Search over stores, the parts that search is made of, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffretriever.cli.display import text_width, wrap
from diffretriever.model import scoring
from diffretriever.model.scoring import score
from diffretriever.search import MODES, ExactEngine, Searcher, exact, topk
from diffretriever.search import searcher as searcher_module
from diffretriever.search import sparse as sparse_module
from diffretriever.search.modes import FUSED
from diffretriever.search.sparse import Postings, build_postings
from diffretriever.search.topk import TopK
from diffretriever.search.workspace import Workspace
from diffretriever.store.segments import Rows, TensorSegment, query_vectors
from diffretriever.store.store import Shard, ShardContents, Store, write_store

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


class Encoded(dict[str, torch.Tensor]):
    """An output that knows its side, as `encode_texts` returns it."""

    side = "passage"


def test_an_output_in_the_other_side_s_place_is_refused() -> None:
    passages = Encoded(vectors(0, 5))
    with pytest.raises(ValueError, match="the queries: these are vectors of passages, where queries belong"):
        Searcher(passages).search(passages)
    passages.side = "query"
    with pytest.raises(ValueError, match="`passages`: these are vectors of queries, where passages belong"):
        Searcher(passages)


def test_queries_of_another_model_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "passages", vectors(0, 20), model="ours", adapter_sha256="a")
    queries = make_store(tmp_path / "queries", vectors(1, 3), side="query", model="theirs", adapter_sha256="b")
    with pytest.raises(ValueError, match=r"made by model 'ours', not 'theirs': `adapter` 'a', not 'b'"):
        Searcher(store).search(queries)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.sampled_from([-float("inf"), -1.0, -0.0, 0.0, 0.5, 1.0]), min_size=1, max_size=60),
    k=st.integers(1, 70),
    size=st.integers(1, 61),
    waiting=st.integers(1, 130),
    border=st.integers(0, 60),
)
def test_top_k_is_a_stable_sort(values: list[float], k: int, size: int, waiting: int, border: int) -> None:
    halves = [TopK(2, k), TopK(2, k)]
    with patch.object(topk, "WAITING", waiting):
        for best, first, end in zip(halves, (0, border), (min(border, len(values)), len(values)), strict=True):
            for start in range(first, end, size):
                block = torch.tensor(values[start : min(start + size, end)])
                best.update(torch.stack([block, -block], dim=1), start)
    halves[0].merge(halves[1])
    positions, scores = halves[0].result()
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
    found = torch.cat([part.scores(query["sparse_indices"][0], query["sparse_values"][0]) for part in parts])
    assert torch.allclose(found, expected, atol=1e-6)


def test_memory_does_not_grow_with_the_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[tuple[str, tuple[int, ...]], set[int]] = {}
    take = Workspace.take

    def noted(self: Workspace, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        held = take(self, name, shape)
        taken.setdefault((name, shape), set()).add(held.data_ptr())
        return held

    monkeypatch.setattr(Workspace, "take", noted)
    needs = []
    for count in (5_000, 20_000):
        taken.clear()
        passages = {"repr_hidden": vectors(0, count, k=4, width=64, terms=1)["repr_hidden"].half()}
        searcher = Searcher(passages, block_size=500)
        for _ in range(2):
            searcher.search(vectors(1, 50, k=4, width=64), "multi_dense", 10)
        assert all(len(places) == 1 for places in taken.values())  # every block and search uses the same memory
        needs.append(set(taken))
    assert needs[0] == needs[1]


def test_chosen_passages_have_the_scores_of_the_ranking(tmp_path: Path) -> None:
    """To the last bit for sparse scores, whichever way is the faster one."""
    side = vectors(0, 1200)
    side["sparse_indices"][:, 1] = side["sparse_indices"][:, 0]  # a term may stand twice in a passage
    queries = query_vectors(vectors(1, 4))
    for passages in (side, make_store(tmp_path / "store", side, size=100, dtype="float32")):
        engine = ExactEngine(passages)
        for kind in ("single_dense", "multi_dense", "sparse_max"):
            positions, scores = engine.rank(queries, kind, 1200)
            by_position = torch.empty(4, 1200).scatter_(1, positions, scores)
            chosen = [torch.tensor(rows, dtype=torch.int64) for rows in ([0, 99, 100, 1199], [7], [], list(range(600)))]
            for row, (wanted, found) in enumerate(zip(chosen, engine.scores_at(queries, kind, chosen), strict=True)):
                expected = by_position[row, wanted]
                assert torch.allclose(found, expected, atol=1e-6)
                assert kind != "sparse_max" or torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_chosen_passages_have_one_query_s_scores_to_the_last_bit(tmp_path: Path, dtype: str, k: int) -> None:
    """Wherever they lie in a shard, so that copies of a passage tie in a fusion."""
    side = vectors(0, 150, k=4, width=40)
    side["repr_hidden"][50:100] = side["repr_hidden"][:50]
    engine = ExactEngine(make_store(tmp_path / "store", side, size=70, dtype=dtype))
    query = query_vectors(vectors(1, 1, k=k, width=40))
    positions, scores = engine.rank(query, "multi_dense", 150)
    ranked = torch.empty(150).scatter_(0, positions[0], scores[0])
    assert torch.equal(ranked[50:100], ranked[:50])
    wanted = torch.tensor([0, 3, 53, 69, 70, 149])
    assert torch.equal(engine.scores_at(query, "multi_dense", [wanted])[0], ranked[wanted])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_vectors_without_a_length_or_with_a_great_one_are_ranked_exactly(dtype: str) -> None:
    held = vectors(0, 60, k=4, width=33)["repr_hidden"] * torch.logspace(-6, 4, 60)[:, None, None]
    held[7] = 0.0
    held = held.to(getattr(torch, dtype))
    query = vectors(1, 1, k=4, width=33)["repr_hidden"]
    expected = (query[0].double() @ held.double().transpose(1, 2)).amax(dim=2).mean(dim=1)
    found = Searcher({"repr_hidden": held}).search({"repr_hidden": query}, "multi_dense", 60)
    assert found.positions[0].tolist() == torch.sort(expected, descending=True, stable=True).indices.tolist()
    assert torch.allclose(found.scores[0].double(), expected[found.positions[0]], rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_told_or_ranked_as_it_is(bad: float) -> None:
    held = vectors(0, 30, k=2, width=16)["repr_hidden"].half()
    held[20, 1, 3] = bad
    query = {"repr_hidden": torch.ones(1, 2, 16)}
    if math.isnan(bad):
        with pytest.raises(ValueError, match="position 20 is NaN"):
            Searcher({"repr_hidden": held}).search(query, "multi_dense", 5)
        return
    found = Searcher({"repr_hidden": held}).search(query, "multi_dense", 30)
    assert (found.positions[0, 0] == 20) == (bad > 0)  # of two vectors the better one counts
    assert found.positions.shape == (1, 30)


def test_few_chosen_passages_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ExactEngine(make_store(tmp_path / "store", vectors(0, 1000), size=10))
    queries = query_vectors(vectors(1, 1))
    engine.rank(queries, "sparse_max", 5)  # makes the index
    read: list[int] = []
    rows, similarities, scores = Shard.rows, Shard.similarities, Postings.scores

    def noted_rows(self: Shard, wanted: torch.Tensor) -> torch.Tensor:
        read.append(len(wanted))
        return rows(self, wanted)

    def noted_similarities(self: Shard, wanted: torch.Tensor, *others: Any) -> torch.Tensor:
        read.append(len(wanted))
        return similarities(self, wanted, *others)

    def noted_scores(self: Postings, *query: torch.Tensor) -> torch.Tensor:
        read.append(self.length)
        return scores(self, *query)

    monkeypatch.setattr(Shard, "rows", noted_rows)
    monkeypatch.setattr(Shard, "similarities", noted_similarities)
    monkeypatch.setattr(Postings, "scores", noted_scores)
    means = [("single_dense", [2, 1, 2, 1]), ("single_dense", [2, 1])]  # their lengths are read for once
    for kind, counts in [*means, ("multi_dense", [2, 1]), ("sparse_max", [3])]:
        engine.scores_at(queries, kind, [torch.tensor([11, 15, 777])])
        assert read == counts
        read.clear()


def test_lengths_of_wide_vectors_are_read_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is ranked at once would be a gigabyte of a large model's."""
    monkeypatch.setattr(exact, "CPU_FEW_BLOCK_NUMBERS", 600)
    side, query, read = vectors(0, 500), vectors(1, 1), []
    expected = score(query, side, "single_dense")[0].sort(descending=True)
    block = TensorSegment.block

    def noted(self: TensorSegment, start: int, stop: int) -> torch.Tensor:
        read.append(stop - start)
        return block(self, start, stop)

    monkeypatch.setattr(TensorSegment, "block", noted)
    found = Searcher(side).search(query, "single_dense", 500)
    assert max(read) == 10  # of 3 vectors of 20 dimensions
    assert torch.allclose(found.scores[0], expected.values, atol=1e-6)


@pytest.mark.parametrize("mode", sorted(FUSED))
def test_a_fusion_reads_each_side_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Beside it, what one side alone found is read for the other."""
    searcher = Searcher(make_store(tmp_path / "store", vectors(0, 4000, terms=2), size=500))
    query = vectors(1, 1, terms=2)
    for kind in ("sparse_max", "single_dense"):  # makes the index, and the lengths of the means
        searcher.search(query, kind, 5)
    read: dict[str, list[int]] = {"block": [], "rows": [], "scores": []}
    block, rows, similarities, scores = Shard.block, Shard.rows, Shard.similarities, Postings.scores

    def noted_similarities(self: Shard, wanted: Rows, *others: Any) -> torch.Tensor:
        if isinstance(wanted, slice):
            read["block"] += range(self.offset + wanted.start, self.offset + wanted.stop)
        else:
            read["rows"].append(len(wanted))
        return similarities(self, wanted, *others)

    def noted_block(self: Shard, start: int, stop: int) -> torch.Tensor:
        if stop - start > 1:  # one is asked for its shape
            read["block"] += range(self.offset + start, self.offset + stop)
        return block(self, start, stop)

    def noted_rows(self: Shard, wanted: torch.Tensor) -> torch.Tensor:
        read["rows"].append(len(wanted))
        return rows(self, wanted)

    def noted_scores(self: Postings, *query: torch.Tensor) -> torch.Tensor:
        read["scores"].append(self.length)
        return scores(self, *query)

    monkeypatch.setattr(Shard, "block", noted_block)
    monkeypatch.setattr(Shard, "rows", noted_rows)
    monkeypatch.setattr(Shard, "similarities", noted_similarities)
    monkeypatch.setattr(Postings, "scores", noted_scores)
    sides = searcher.rank_sides(query, mode, candidates=20)
    assert sorted(read["block"]) == list(range(4000))
    missing = len(sides.positions[0]) - 20
    assert missing > 0
    assert sum(read["rows"]) == missing
    assert read["scores"] == [4000, missing]


def test_the_two_halves_of_a_fusion() -> None:
    passages, queries = vectors(0, 60), vectors(1, 5)
    searcher = Searcher(passages)
    for mode in FUSED:
        sides = searcher.rank_sides(queries, mode, candidates=8)
        for pool, dense, sparse in zip(sides.positions, sides.dense, sides.sparse, strict=True):
            assert len(pool) == len(dense) == len(sparse)
            assert 8 <= len(pool) <= 16
        for weight in (0.0, 0.3, 1.0):
            found = sides.fuse(weight, top_k=6)
            expected = searcher.search(queries, mode, 6, candidates=8, fusion_weight=weight)
            assert found.ids == expected.ids
            assert torch.equal(found.scores, expected.scores)
    with pytest.raises(
        ValueError, match="'multi_dense' has one side; the fusion modes are fusion_single_sparse_max, fu"
    ):
        searcher.rank_sides(queries, "multi_dense")
    with pytest.raises(ValueError, match="`fusion_weight` must lie between 0 and 1, got nan"):
        sides.fuse(math.nan)


@pytest.mark.parametrize("mode", MODES)
def test_many_queries_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str) -> None:
    passages = vectors(0, 30)
    queries = make_store(tmp_path / "queries", vectors(1, 11), side="query", dtype="float32")
    whole = Searcher(passages).search(queries, mode, 4, candidates=9)
    monkeypatch.setattr(searcher_module, "BATCH_NUMBERS", 30)
    parts = Searcher(passages).search(queries, mode, 4, candidates=9)
    assert parts.ids == whole.ids
    assert parts.query_ids == whole.query_ids == queries.ids()
    assert torch.allclose(parts.scores, whole.scores, atol=1e-6)


def test_the_modes_of_the_command_line_are_the_models() -> None:
    assert (MODES, FUSED) == (scoring.SCORING_MODES, scoring.FUSED)


def test_a_fusion_of_unknown_name() -> None:
    with pytest.raises(ValueError, match="fusion 'rrf' is not known; it is one of exact, runs"):
        Searcher(vectors(0, 3), fusion="rrf")


def test_an_empty_collection_and_no_queries() -> None:
    none, some = vectors(0, 0), vectors(1, 2)
    for mode in MODES:
        assert Searcher(none).search(some, mode).ids == [[], []]
        assert Searcher(some).search(none, mode).ids == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "dense"}, r"'dense' is not known; the modes are single_dense, multi_dense"),
        ({"top_k": 0}, "`top_k` must be a whole number of at least 1, got 0"),
        ({"candidates": -1}, "`candidates` must be a whole number of at least 1, got -1"),
        ({"top_k": np.float32(3)}, "`top_k` must be a whole number of at least 1, got "),
        ({"top_k": True}, "`top_k` must be a whole number of at least 1, got True"),
        ({"fusion_weight": 1.5}, "`fusion_weight` must lie between 0 and 1, got 1.5"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Searcher(vectors(0, 4)).search(vectors(1, 2), **options)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_and_vectors_of_numpy(mode: str) -> None:
    passages, queries = vectors(0, 12), vectors(1, 3, k=2)
    expected = Searcher(passages, block_size=5).search(queries, mode, 4, candidates=6)
    arrays, asked = ({name: tensor.numpy() for name, tensor in side.items()} for side in (passages, queries))
    searcher = Searcher(arrays, ids=[str(row) for row in range(12)], block_size=np.int64(5))
    found = searcher.search(asked, mode, np.int32(4), candidates=np.int64(6))
    assert found.ids == expected.ids
    assert torch.equal(found.scores, expected.scores)
    arrays["repr_hidden"] = arrays["repr_hidden"].astype(np.float16)
    assert Searcher(arrays).search(asked, mode, 4, candidates=6).scores == pytest.approx(expected.scores, abs=2e-3)
    for name in ("repr_hidden", "repr_mask"):
        wrong = {**arrays, name: np.array([["x"]], dtype=object)}
        with pytest.raises(ValueError, match=name):
            Searcher(wrong)


def test_ids_that_are_not_one_for_each_passage() -> None:
    passages = vectors(0, 3)
    with pytest.raises(ValueError, match="`ids`: 'b' is the id of the passages 1 and 2"):
        Searcher(passages, ids=["a", "b", "b"])
    with pytest.raises(ValueError, match="`ids` has 1 entries for 3 passages"):
        Searcher(passages, ids="abc")
    by_row = pandas.Series(["a", "b", "c"], index=[7, 8, 9])
    assert sorted(Searcher(passages, ids=by_row).search(vectors(1, 1), top_k=3).ids[0]) == ["a", "b", "c"]


def test_a_run_has_one_ranking_for_each_query() -> None:
    results = Searcher(vectors(0, 3)).search(vectors(1, 2))
    with pytest.raises(ValueError, match="the query id 'q' is given twice"):
        results.run(["q", "q"])
    assert list(results.run(["q", "r"])) == ["q", "r"]


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
    with pytest.raises(ValueError, match="`queries` must be a store or an output of encode_texts, got list"):
        Searcher(passages).search(["which causes the seasons"])
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
