"""Stored bfloat16 where the processor multiplies it: rough scores choose, exact ones rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from diffretriever.model.scoring import PreparedQueries, maxsim_of
from diffretriever.search import ExactEngine, Searcher, exact, rough
from diffretriever.search.rough import longest_vectors, most_wrong, possible_best, rough_similarities
from diffretriever.search.workspace import Workspace
from diffretriever.store.segments import TensorSegment, query_vectors

Side = dict[str, torch.Tensor]


def made_up(seed: int, texts: int, k: int, width: int = 24, *, missing: bool = False) -> Side:
    generator = torch.Generator().manual_seed(seed)
    vectors = normalize(torch.randn(texts, k, width, generator=generator), dim=-1).bfloat16()
    side = {"repr_hidden": vectors}
    side["sparse_indices"] = torch.randint(0, 12, (texts, 4), generator=generator)
    side["sparse_values"] = torch.rand(texts, 4, generator=generator)
    if missing:
        side["repr_mask"] = torch.rand(texts, k, generator=generator) > 0.4
    return side


@pytest.fixture
def scored_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let rough scores pay on every processor, and count the passages that are then scored exactly."""
    counts: list[int] = []
    score_chosen = ExactEngine._dense_scores

    def counted(self: ExactEngine, kind: str, queries: PreparedQueries, chosen: torch.Tensor) -> torch.Tensor:
        counts.append(len(chosen))
        return score_chosen(self, kind, queries, chosen)

    monkeypatch.setattr(ExactEngine, "_dense_scores", counted)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    return counts


def widened(side: Side) -> Side:
    """The same vectors in float32, for which there are no rough scores."""
    return side | {"repr_hidden": side["repr_hidden"].float()}


@pytest.mark.parametrize("rough_range", [1024 * 1024, 700])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("asked", [1, 3])
@pytest.mark.parametrize("k_p", [1, 4])
@pytest.mark.parametrize("mode", ["single_dense", "multi_dense"])
def test_no_bit_of_a_ranking_changes(
    scored_again: list[int],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    k_p: int,
    asked: int,
    missing: bool,
    rough_range: int,
) -> None:
    monkeypatch.setattr(exact, "ROUGH_RANGE", rough_range)
    passages, queries = made_up(0, 2000, k_p, missing=missing), made_up(1, asked, 3, missing=missing)
    passages["repr_hidden"][1500:1600] = passages["repr_hidden"][:100]  # copies tie
    expected = Searcher(widened(passages)).search(queries, mode, 7)
    assert not scored_again
    searcher = Searcher(passages)
    for _ in range(2):  # lengths are measured, and known
        found = searcher.search(queries, mode, 7)
        assert found.ids == expected.ids
        assert torch.equal(found.scores, expected.scores)
    assert 0 < max(scored_again) < 2000 // exact.MOST_CHOSEN


def test_a_fusion_and_threads(scored_again: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "RANGE_NUMBERS", 24 * 4 * 500)
    passages, queries = made_up(0, 4000, 4), made_up(1, 1, 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = Searcher(passages).search(queries, "fusion_multi_sparse_max", 5, candidates=5)
        expected = Searcher(widened(passages)).search(queries, "fusion_multi_sparse_max", 5, candidates=5)
    finally:
        torch.set_num_threads(threads)
    assert found.ids == expected.ids
    assert torch.equal(found.scores, expected.scores)
    assert len(scored_again) > 2


def test_vectors_of_any_length(scored_again: list[int]) -> None:
    passages, queries = made_up(0, 3000, 4), made_up(1, 1, 4)
    passages["repr_hidden"] *= torch.logspace(-6, 4, 3000)[:, None, None].bfloat16()
    passages["repr_hidden"][7] = 0.0
    for mode in ("single_dense", "multi_dense"):
        found = Searcher(passages).search(queries, mode, 20)
        expected = Searcher(widened(passages)).search(queries, mode, 20)
        assert found.ids == expected.ids
        assert torch.equal(found.scores, expected.scores)
    assert max(scored_again) < 3000 // exact.MOST_CHOSEN


def test_vectors_that_lie_together_are_all_scored_exactly(
    scored_again: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few questions no rough scores are computed any more."""
    tried: list[range] = []
    score_roughly = ExactEngine._rough_scores

    def counted(self: ExactEngine, *arguments: Any) -> Any:
        tried.append(arguments[-1])
        return score_roughly(self, *arguments)

    monkeypatch.setattr(ExactEngine, "_rough_scores", counted)
    apart, queries = made_up(0, 2000, 4), made_up(1, 1, 4)
    near = normalize(torch.ones(24) + 0.01 * apart["repr_hidden"].float(), dim=-1)
    passages = apart | {"repr_hidden": near.bfloat16()}
    searcher, expected = Searcher(passages), Searcher(widened(passages)).search(queries, "multi_dense", 5)
    for _ in range(exact.MOST_IN_VAIN + 3):
        found = searcher.search(queries, "multi_dense", 5)
        assert found.ids == expected.ids
        assert torch.equal(found.scores, expected.scores)
    assert not scored_again
    assert len(tried) == exact.MOST_IN_VAIN
    searcher = Searcher(apart)
    for _ in range(2 * exact.MOST_IN_VAIN):
        searcher.search(queries, "multi_dense", 5)
    assert len(scored_again) == 2 * exact.MOST_IN_VAIN


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 30])
def test_a_number_that_is_none_is_told_or_ranked_as_it_is(scored_again: list[int], bad: float, count: int) -> None:
    passages, queries = made_up(0, 2000, 2), {"repr_hidden": torch.ones(1, 2, 24)}
    passages["repr_hidden"][50 : 50 + count, 1, 3] = bad
    if math.isnan(bad):
        with pytest.raises(ValueError, match="position 50 is NaN"):
            Searcher(passages).search(queries, "multi_dense", 5)
        return
    found = Searcher(passages).search(queries, "multi_dense", 5)
    expected = Searcher(widened(passages)).search(queries, "multi_dense", 5)
    assert found.ids == expected.ids
    assert torch.equal(found.scores, expected.scores)


def test_no_passages(scored_again: list[int]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        positions, _ = ExactEngine(made_up(0, 0, 2)).rank(query_vectors(made_up(1, 1, 2)), "multi_dense", 5)
    finally:
        torch.set_num_threads(threads)
    assert positions.shape == (1, 0)
    assert not scored_again


def test_queries_of_another_width_are_refused(scored_again: list[int]) -> None:
    with pytest.raises(ValueError, match="queries have 16 dimensions, passages 24"):
        Searcher(made_up(0, 2000, 2)).search(made_up(1, 1, 2, width=16))
    assert not scored_again


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k_q=st.integers(1, 4),
    k_p=st.integers(1, 4),
    width=st.sampled_from([1, 3, 64, 1000]),
    near=st.floats(0.0, 1.0),
    scale=st.sampled_from([1e-5, 1.0, 300.0]),
    missing=st.booleans(),
)
def test_rough_scores_are_as_wrong_as_they_may_be(
    seed: int, k_q: int, k_p: int, width: int, near: float, scale: float, missing: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = normalize(torch.randn(2, k_q, width, generator=generator), dim=-1)
    passages = torch.randn(40, k_p, width, generator=generator) * torch.rand(40, 1, 1, generator=generator)
    passages = (scale * (near * queries[0, :1] + (1 - near) * passages)).bfloat16()
    there = torch.rand(2, k_q, generator=generator) > 0.4 if missing else torch.ones(2, k_q, dtype=torch.bool)
    prepared = PreparedQueries.of(queries, there)
    products = rough_similarities(passages.flatten(0, 1), prepared, Workspace(torch.device("cpu")).take)
    found = maxsim_of(products, None, k_p, prepared)
    similarity = torch.einsum("qiw,pkw->pqik", queries.double(), passages.double()).amax(dim=3)
    expected = (similarity * there).sum(dim=2) / there.sum(dim=1)
    wrong = longest_vectors(passages, None)[:, None] * most_wrong(prepared)
    asked = there.any(dim=1)
    assert bool(((found.double() - expected).abs() <= wrong)[:, asked].all())


def test_the_longest_vector_is_the_longest_of_those_there() -> None:
    vectors = torch.randn(50, 4, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.rand(50, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    for there in (None, mask):
        lengths = vectors.double().norm(dim=2) * (1.0 if there is None else there)
        found = longest_vectors(vectors, there).double()
        assert bool((found >= lengths.amax(dim=1)).all())
        assert torch.allclose(found, lengths.amax(dim=1), rtol=0.02)


def test_the_best_of_two_queries() -> None:
    scores = torch.tensor([[0.9, 0.0], [0.5, 0.6], [0.8, 0.1], [0.1, 0.2], [math.nan, 0.0]])
    assert possible_best(scores, torch.full((5, 2), 0.04), 2).tolist() == [0, 1, 3, 4]
    assert possible_best(scores, torch.full((5, 2), 0.06), 2).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("amx", "library", "dtype", "expected"),
    [
        (True, True, torch.bfloat16, True),
        (False, True, torch.bfloat16, False),
        (True, False, torch.bfloat16, False),
        (True, True, torch.float16, False),
        (True, True, torch.float32, False),
    ],
)
def test_where_rough_products_pay(
    amx: bool, library: bool, dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    assert rough.rough_products_pay([TensorSegment(torch.zeros(3, 2, 4, dtype=dtype))]) is expected


@pytest.mark.parametrize(("top_k", "asked", "used"), [(10, 1, True), (100, 1, False), (10, 6, False)])
def test_many_results_and_many_queries_are_ranked_at_once(
    scored_again: list[int], top_k: int, asked: int, used: Any
) -> None:
    Searcher(made_up(0, 2000, 4)).search(made_up(1, asked, 4), "multi_dense", top_k)
    assert bool(scored_again) is used
