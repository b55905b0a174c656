"""Five modes in one pass: each side is ranked once, and the runs are those of single searches and of model.score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from diffretriever.data.benchmark import Benchmark
from diffretriever.evaluation import searching
from diffretriever.evaluation.runs import Run
from diffretriever.evaluation.searching import query_latency, search_benchmark
from diffretriever.model.scoring import score
from diffretriever.search.exact import ExactEngine
from diffretriever.search.modes import FUSED, MODES
from diffretriever.search.searcher import Searcher


def random_side(count: int, masks: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "repr_hidden": torch.nn.functional.normalize(torch.randn(count, masks, 8, generator=generator), dim=-1),
        "sparse_indices": torch.stack([torch.randperm(30, generator=generator)[:6] for _ in range(count)]),
        "sparse_values": torch.rand(count, 6, generator=generator) + 0.1,
    }


class MadeUpModel:
    """Encodes the text "7" as the seventh of its vectors."""

    def __init__(self, side: dict[str, torch.Tensor]) -> None:
        self.side = side
        self.calls: list[tuple[list[str], bool]] = []

    def encode_texts(
        self, texts: Sequence[str], is_query: bool, compute_sparse: bool = True, content_filter: bool = True
    ) -> dict[str, Any]:
        assert (is_query, content_filter) == (True, True)
        self.calls.append((list(texts), compute_sparse))
        rows = torch.tensor([int(text) for text in texts])
        kept = self.side if compute_sparse else {"repr_hidden": self.side["repr_hidden"]}
        return {name: values[rows] for name, values in kept.items()}


QUERIES = {f"q{number}": str(number) for number in range(9)}
QUERY_SIDE, PASSAGE_SIDE = random_side(9, 3, seed=1), random_side(40, 2, seed=2)


# own ids count, so that nothing is left out
BENCHMARK = Benchmark(Path("nowhere"), "test", QUERIES, {}, relevance_level=1, own_ids_count=True)


def search_modes(model: MadeUpModel, modes: Sequence[str], depth: int, weight: float = 0.5) -> dict[str, Run]:
    return search_benchmark(model, make_searcher(), BENCHMARK, {mode: (mode, weight) for mode in modes}, depth)


def make_searcher() -> Searcher:
    return Searcher(PASSAGE_SIDE, ids=[f"p{number}" for number in range(40)])


@pytest.mark.parametrize("window", [2, 1024])
@pytest.mark.parametrize("depth", [5, 1000])
def test_runs_equal_single_searches(monkeypatch: pytest.MonkeyPatch, window: int, depth: int) -> None:
    monkeypatch.setattr(searching, "QUERY_WINDOW", window)
    runs = search_modes(MadeUpModel(QUERY_SIDE), MODES, depth, 0.3)
    assert list(runs) == list(MODES)
    for mode in MODES:
        found = make_searcher().search(QUERY_SIDE, mode, depth, candidates=depth, fusion_weight=0.3)
        expected = found.run(list(QUERIES))
        assert list(runs[mode]) == list(QUERIES)
        for query in QUERIES:  # a product's last bit depends on how many queries are in it
            assert runs[mode][query] == pytest.approx(expected[query], abs=1e-5), (mode, query)


def test_runs_of_a_small_collection_equal_the_models_scores() -> None:
    runs = search_modes(MadeUpModel(QUERY_SIDE), MODES, depth=40)
    for mode in MODES:
        expected = score(QUERY_SIDE, PASSAGE_SIDE, mode)
        for row, query in enumerate(QUERIES):
            scores = {f"p{number}": value for number, value in enumerate(expected[row].tolist())}
            wanted = {name: value for name, value in scores.items() if mode != "sparse_max" or value > 0}
            assert runs[mode][query] == pytest.approx(wanted, abs=1e-5), (mode, query)


def test_each_side_is_ranked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[str] = []
    rank = ExactEngine.rank

    def counted(self: ExactEngine, queries: Any, kind: str, top_k: int) -> Any:
        ranked.append(kind)
        return rank(self, queries, kind, top_k)

    monkeypatch.setattr(ExactEngine, "rank", counted)
    model = MadeUpModel(QUERY_SIDE)
    rows = {mode: (mode, 0.5) for mode in MODES} | {
        f"{mode}@{weight}": (mode, weight) for mode in FUSED for weight in (0.1, 0.9)
    }
    runs = search_benchmark(model, make_searcher(), BENCHMARK, rows, depth=10)
    assert list(runs) == list(rows)
    assert sorted(ranked) == ["multi_dense", "single_dense", "sparse_max"]
    assert model.calls == [(list(QUERIES.values()), True)]


def test_a_passage_with_the_querys_own_id_is_left_out_and_the_depth_kept() -> None:
    queries = {f"p{number}": str(number) for number in range(9)}
    benchmark = Benchmark(Path("nowhere"), "test", queries, {}, relevance_level=1)
    [run] = search_benchmark(
        MadeUpModel(PASSAGE_SIDE), make_searcher(), benchmark, {"row": ("multi_dense", 0.5)}, 5
    ).values()
    found = make_searcher().search({name: tensor[:9] for name, tensor in PASSAGE_SIDE.items()}, "multi_dense", 6)
    for query, ids in zip(queries, found.ids, strict=True):
        assert ids[0] == query
        assert list(run[query]) == ids[1:]


def test_dense_modes_need_no_sparse_vectors() -> None:
    model = MadeUpModel(QUERY_SIDE)
    search_modes(model, ["multi_dense"], depth=10)
    assert model.calls == [(list(QUERIES.values()), False)]


def test_latency_is_of_single_queries_of_each_mode() -> None:
    model = MadeUpModel(QUERY_SIDE)
    found = query_latency(model, make_searcher(), QUERIES, ["multi_dense", "sparse_max"], depth=10, count=3)
    assert list(found) == ["multi_dense", "sparse_max"]
    assert all(0 < milliseconds < 10_000 for milliseconds in found.values())
    timed = [["0"], ["0"], ["3"], ["6"]]  # the first one warms up
    assert model.calls == [(texts, False) for texts in timed] + [(texts, True) for texts in timed]
