"""Exact search against plain loops."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_gpu import GPU, pretended_gpu
from store_helpers import other_defaults

from diffretriever.search import MODES, Searcher, exact
from diffretriever.search.exact import ExactEngine
from diffretriever.search.modes import FUSIONS
from diffretriever.store.segments import query_vectors

Side = dict[str, torch.Tensor]


def made_up(seed: int, texts: int, k: int, width: int, terms: int, *, whole: bool, missing: bool) -> Side:
    """Return random vectors; whole numbers make float arithmetic exact, so that ties are ties."""
    generator = torch.Generator().manual_seed(seed)
    if whole:
        vectors = torch.randint(-2, 3, (texts, k, width), generator=generator).float()
        values = torch.randint(0, 4, (texts, terms), generator=generator).float()
    else:
        vectors = torch.nn.functional.normalize(torch.randn(texts, k, width, generator=generator), dim=-1)
        values = torch.rand(texts, terms, generator=generator)
    indices = torch.randint(0, 12, (texts, terms), generator=generator)
    side = {"repr_hidden": vectors, "sparse_indices": indices, "sparse_values": values}
    if missing:
        side["repr_mask"] = torch.rand(texts, k, generator=generator) > 0.4
    return side


def loop_score(query: Side, passage: Side, kind: str) -> float:
    """Score one query and one passage with plain loops."""
    if kind == "sparse_max":
        pairs = [list(zip(side["sparse_indices"].tolist(), side["sparse_values"].tolist(), strict=True))
                 for side in (query, passage)]  # fmt: skip
        return sum(a * b for term, a in pairs[0] for other, b in pairs[1] if term == other)
    sides = []
    for side in (query, passage):
        mask = side.get("repr_mask", torch.ones(len(side["repr_hidden"]), dtype=torch.bool))
        sides.append([vector for vector, there in zip(side["repr_hidden"].double(), mask, strict=True) if there])
    if not sides[0] or not sides[1]:
        return -math.inf
    if kind == "single_dense":
        means = [torch.stack(vectors).mean(dim=0) for vectors in sides]
        lengths = [max(float(mean.norm()), 1e-12) for mean in means]
        return float(means[0] @ means[1]) / (lengths[0] * lengths[1])
    return sum(max(float(q @ p) for p in sides[1]) for q in sides[0]) / len(sides[0])


def loop_fused(
    queries: Side, passages: Side, kind: str, depth: int, weight: float, fusion: str
) -> list[dict[int, float]]:
    """Return each query's fused scores by position, with plain loops."""
    fused = []
    for query in rows(queries):
        dense = [loop_score(query, passage, kind) for passage in rows(passages)]
        sparse = [loop_score(query, passage, "sparse_max") for passage in rows(passages)]
        dense_run = {p for p in best_positions(dense)[:depth] if dense[p] > -math.inf}
        sparse_run = {p for p in best_positions(sparse)[:depth] if sparse[p] > 0}
        pool = dense_run | sparse_run
        if fusion == "exact":
            pool = set(range(len(dense))) if depth >= len(dense) else pool
            dense_run = sparse_run = pool
        total = dict.fromkeys(pool, 0.0)
        for scores, run, share in ((dense, dense_run, weight), (sparse, sparse_run, 1 - weight)):
            finite = [scores[p] for p in run if math.isfinite(scores[p])]
            for p in run:
                if math.isfinite(scores[p]) and max(finite) > min(finite):
                    total[p] += share * (scores[p] - min(finite)) / (max(finite) - min(finite))
        fused.append(total)
    return fused


def best_positions(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda p: (-scores[p], p))


def rows(side: Side) -> list[Side]:
    return [{name: tensor[row] for name, tensor in side.items()} for row in range(len(side["repr_hidden"]))]


def assert_same_ranking(hits: list[Any], expected: dict[int, float], top_k: int) -> None:
    """The scores are those of the best; each hit has its own score; nothing better is left out."""
    best = sorted(expected.values(), reverse=True)[:top_k]
    assert [hit.score for hit in hits] == pytest.approx(best, abs=2e-6)
    assert len({hit.position for hit in hits}) == len(hits)
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.position], abs=2e-6)


SHAPES = {
    "seed": st.integers(0, 2**31), "queries": st.integers(1, 5), "passages": st.integers(1, 40),
    "k_q": st.integers(1, 4), "k_p": st.integers(1, 5), "top_k": st.integers(1, 60),
    "block_size": st.one_of(st.none(), st.integers(1, 41)), "missing": st.booleans(),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(**SHAPES, mode=st.sampled_from(["single_dense", "multi_dense", "sparse_max"]))
def test_every_mode_equals_plain_loops(
    seed: int, queries: int, passages: int, k_q: int, k_p: int, top_k: int, block_size: int | None, missing: bool,
    mode: str,
) -> None:  # fmt: skip
    query_side = made_up(seed, queries, k_q, 6, 4, whole=False, missing=missing)
    passage_side = made_up(seed + 1, passages, k_p, 6, 5, whole=False, missing=missing)
    results = Searcher(passage_side, block_size=block_size).search(query_side, mode, top_k)
    for query, hits in zip(rows(query_side), results, strict=True):
        scores = {p: loop_score(query, passage, mode) for p, passage in enumerate(rows(passage_side))}
        floor = 0.0 if mode == "sparse_max" else -math.inf
        assert_same_ranking(hits, {p: score for p, score in scores.items() if score > floor}, top_k)


@settings(max_examples=100, deadline=None)
@given(**SHAPES, depth=st.integers(1, 45), weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
       kind=st.sampled_from(["single", "multi"]), fusion=st.sampled_from(FUSIONS))  # fmt: skip
def test_fusion_equals_plain_loops(
    seed: int, queries: int, passages: int, k_q: int, k_p: int, top_k: int, block_size: int | None, missing: bool,
    depth: int, weight: float, kind: str, fusion: str,
) -> None:  # fmt: skip
    query_side = made_up(seed, queries, k_q, 6, 4, whole=False, missing=missing)
    passage_side = made_up(seed + 1, passages, k_p, 6, 5, whole=False, missing=missing)
    searcher = Searcher(passage_side, fusion=fusion, block_size=block_size)
    results = searcher.search(query_side, f"fusion_{kind}_sparse_max", top_k, candidates=depth, fusion_weight=weight)
    used = min(max(depth, top_k), passages)
    expected = loop_fused(query_side, passage_side, f"{kind}_dense", used, weight, fusion)
    for hits, fused in zip(results, expected, strict=True):
        assert_same_ranking(hits, fused, top_k)


@settings(max_examples=100, deadline=None)
@given(**SHAPES)
def test_ties_go_to_the_first_position_whatever_the_block(
    seed: int, queries: int, passages: int, k_q: int, k_p: int, top_k: int, block_size: int | None, missing: bool
) -> None:
    query_side = made_up(seed, queries, k_q, 3, 4, whole=True, missing=missing)
    passage_side = made_up(seed + 1, passages, k_p, 3, 5, whole=True, missing=missing)
    searcher = Searcher(passage_side, block_size=block_size)
    for mode in ("multi_dense", "sparse_max"):
        floor = 0.0 if mode == "sparse_max" else -math.inf
        for query, hits in zip(rows(query_side), searcher.search(query_side, mode, top_k), strict=True):
            scores = [loop_score(query, passage, mode) for passage in rows(passage_side)]
            order = sorted((p for p in range(passages) if scores[p] > floor), key=lambda p: (-round(scores[p], 4), p))
            assert [hit.position for hit in hits] == order[:top_k]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [None, 1, 7])
def test_copies_of_a_passage_rank_by_position(mode: str, block_size: int | None) -> None:
    queries = made_up(1, 3, 4, 33, 6, whole=False, missing=False)
    once = made_up(2, 1, 4, 33, 6, whole=False, missing=False)
    once["sparse_indices"][0, 0], queries["sparse_indices"][:, 0] = 3, 3
    copies = {name: tensor.expand(50, *tensor.shape[1:]).contiguous() for name, tensor in once.items()}
    results = Searcher(copies, block_size=block_size).search(queries, mode, top_k=9)
    assert results.positions.tolist() == [list(range(9))] * 3


def test_similarities_that_are_all_negative_keep_their_order() -> None:
    passages = {"repr_hidden": -torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.8, 0.6]]])}
    passages["repr_hidden"] = torch.cat([passages["repr_hidden"], torch.zeros(3, 1, 2)], dim=1)
    passages["repr_mask"] = torch.tensor([[True, False]] * 3)  # a missing vector must not win with 0
    results = Searcher(passages).search({"repr_hidden": torch.tensor([[[1.0, 0.0]]])}, "multi_dense", top_k=3)
    assert results.positions.tolist() == [[1, 2, 0]]
    assert results.scores[0].tolist() == pytest.approx([-0.6, -0.8, -1.0])


def test_searches_at_the_same_time_do_not_share_memory() -> None:
    """Each of many threads gets what one gets alone."""
    passages = made_up(1, texts=4000, k=3, width=16, terms=4, whole=False, missing=True)
    queries = [made_up(seed, 5, 2, 16, 4, whole=False, missing=False) for seed in range(40)]
    searcher = Searcher(passages)
    alone = [searcher.search(asked, "multi_dense", 7) for asked in queries]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda asked: searcher.search(asked, "multi_dense", 7), queries))
    for found, expected in zip(together, alone, strict=True):
        assert found.ids == expected.ids
        assert torch.equal(torch.as_tensor(found.scores), torch.as_tensor(expected.scores))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", [1, 40])
def test_a_search_in_inference_mode_does_not_stop_those_outside(mode: str, asked: int) -> None:
    passages, queries = (made_up(n, size, 3, 18, 4, whole=False, missing=True) for n, size in ((0, 30), (1, asked)))
    searcher, found = Searcher(passages), []
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            found.append(searcher.search(queries, mode, 30).scores)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", [1, 40])
def test_another_default_device_and_dtype_of_torch(mode: str, asked: int) -> None:
    passages, queries = (made_up(n, size, 3, 18, 4, whole=False, missing=True) for n, size in ((0, 30), (1, asked)))
    expected = Searcher(passages).search(queries, mode, 30, candidates=5)
    with other_defaults():
        found = Searcher(passages).search(queries, mode, 30, candidates=5)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.positions, expected.positions)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", [1, 40])
def test_vectors_with_a_gradient_are_searched(mode: str, asked: int) -> None:
    passages, queries = (made_up(n, size, 3, 18, 4, whole=False, missing=True) for n, size in ((0, 30), (1, asked)))
    expected = Searcher(passages).search(queries, mode, 30)
    for side in (passages, queries):
        for name in ("repr_hidden", "sparse_values"):
            side[name] = side[name].clone().requires_grad_()
    assert torch.equal(Searcher(passages).search(queries, mode, 30).scores, expected.scores)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", [1, 40])
def test_passages_and_queries_may_be_on_an_accelerator(mode: str, asked: int) -> None:
    """As `model.encode` returns them there."""
    passages, queries = (made_up(n, size, 3, 18, 4, whole=False, missing=True) for n, size in ((0, 30), (1, asked)))
    expected = Searcher(passages).search(queries, mode, 5, candidates=5)
    with pretended_gpu():
        sides = [{name: tensor.to(GPU) for name, tensor in side.items()} for side in (passages, queries)]
        found = Searcher(sides[0]).search(sides[1], mode, 5, candidates=5)
    assert torch.equal(found.scores, expected.scores)


def test_what_was_asked_before_changes_no_bit_of_a_score() -> None:
    """Lengths of the passages' means are kept: of a ranking, or of chosen passages."""
    passages, queries = (made_up(n, texts, 3, 24, 4, whole=False, missing=True) for n, texts in ((1, 500), (2, 1)))
    first, second = ExactEngine(passages), ExactEngine(passages)
    ranked = first.rank(query_vectors(queries), "single_dense", 500)
    some = torch.arange(3, 400, 7)
    found = second.scores_at(query_vectors(queries), "single_dense", [some])[0]
    for again in (first, second):
        positions, scores = again.rank(query_vectors(queries), "single_dense", 500)
        assert torch.equal(positions, ranked[0])
        assert torch.equal(scores, ranked[1])
    assert torch.equal(found, ranked[1][0][ranked[0][0].argsort()][some])


@pytest.mark.parametrize("asked", [1, 5])
@pytest.mark.parametrize("mode", ["single_dense", "multi_dense"])
def test_ranges_in_threads_are_ranked_as_one(monkeypatch: pytest.MonkeyPatch, mode: str, asked: int) -> None:
    """Copies on both sides of a border tie, a better one in a later range goes first."""
    few = made_up(1, texts=60, k=3, width=16, terms=4, whole=False, missing=True)
    passages = {name: tensor.repeat(20, *[1] * (tensor.dim() - 1)) for name, tensor in few.items()}
    queries = made_up(2, asked, 2, 16, 4, whole=False, missing=True)
    alone, threads = Searcher(passages).search(queries, mode, 70), torch.get_num_threads()
    monkeypatch.setattr(exact, "RANGE_NUMBERS", 1)
    torch.set_num_threads(3)
    try:
        together = Searcher(passages).search(queries, mode, 70)
    finally:
        torch.set_num_threads(threads)
    assert together.positions.tolist() == alone.positions.tolist()
    assert torch.equal(together.scores, alone.scores)
    assert together.positions[0, 0] < 60
