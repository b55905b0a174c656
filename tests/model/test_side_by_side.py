"""On a CPU batches run side by side: the same vectors, in order, errors and threads as they should be."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from diffretriever.model import batching
from diffretriever.model.batching import count_workers, run_side_by_side

TEXTS = [f"passage {number} " + "about water, light and energy " * (number % 7) for number in range(40)]


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(load_release: Callable[..., Any]) -> Any:
    return load_release("tiny-llada", "llada-q4p4")


def test_the_vectors_are_those_of_one_batch_at_a_time(model: Any, four_threads: None) -> None:
    side_by_side = model.encode_texts(TEXTS, is_query=False, tokens_per_batch=256)
    torch.set_num_threads(1)
    alone = model.encode_texts(TEXTS, is_query=False, tokens_per_batch=256)
    assert torch.allclose(side_by_side.repr_hidden, alone.repr_hidden, rtol=0, atol=3e-6)
    assert torch.equal(side_by_side.sparse_indices, alone.sparse_indices)
    assert torch.allclose(side_by_side.sparse_values, alone.sparse_values, rtol=0, atol=2e-5)


def test_batches_run_at_the_same_time_with_their_share_of_the_threads(four_threads: None) -> None:
    together = threading.Barrier(2)  # breaks, and raises, if the second batch does not begin while the first one runs

    def work(rows: list[int]) -> tuple[list[int], int]:
        together.wait(timeout=30)
        return rows, torch.get_num_threads()

    batches = [[number] for number in range(10)]
    results = list(run_side_by_side(work, batches, workers=2))
    assert results == [(batch, (batch, 2)) for batch in batches]


def test_the_threads_are_as_before(four_threads: None) -> None:
    list(run_side_by_side(len, [[1], [2], [3]], workers=4))
    assert torch.get_num_threads() == 4
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 4


@pytest.mark.parametrize("code", ["the same", "a release's own"])
def test_the_threads_are_as_before_when_two_callers_overlap(
    code: str, four_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run begins with the first one's share, and would leave that to the process."""
    begun, ended = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    other = run_side_by_side
    if code == "a release's own":
        spec: Any = importlib.util.spec_from_file_location("diffretriever.model.once_more", batching.__file__)
        once_more = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, once_more)  # where dataclasses look
        spec.loader.exec_module(once_more)
        other = once_more.run_side_by_side

    def work(rows: list[int]) -> None:
        begun[rows[0]].set()
        assert ended[rows[0]].wait(timeout=30)

    with ThreadPoolExecutor(2) as pool:
        runs = []
        for caller, run in enumerate((run_side_by_side, other)):
            runs.append(pool.submit(lambda run, rows: list(run(work, [rows, rows], workers=2)), run, [caller]))
            assert begun[caller].wait(timeout=30)
        for caller in (0, 1):
            ended[caller].set()
            runs[caller].result()
    assert torch.get_num_threads() == 4
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 4


def test_an_error_reaches_the_caller_and_drops_what_has_not_begun(four_threads: None) -> None:
    done: list[int] = []

    def work(rows: list[int]) -> None:
        done.append(rows[0])
        if rows[0] == 1:
            raise ValueError("row 1 is broken")

    with pytest.raises(ValueError, match="row 1 is broken"):
        list(run_side_by_side(work, [[number] for number in range(100)], workers=2))
    assert len(done) < 20
    assert torch.get_num_threads() == 4


def test_a_broken_model_says_so_from_a_worker(model: Any, four_threads: None) -> None:
    weight = model.backbone.norm.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] = float("nan")
        with pytest.raises(ValueError, match=r"backbone\.norm\.weight hold NaN"):
            model.encode_texts(TEXTS, is_query=False, tokens_per_batch=256)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_reader_that_stops_early_stops_the_work(four_threads: None) -> None:
    done: list[int] = []
    results = run_side_by_side(lambda rows: done.append(rows[0]), [[number] for number in range(100)], workers=2)
    next(results)
    results.close()
    assert len(done) < 20
    assert torch.get_num_threads() == 4


def test_how_many(model: Any, four_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_workers(model) == 4
    monkeypatch.setattr("diffretriever.model.batching.MOST_WORKERS", 3)
    assert count_workers(model) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert count_workers(model) == 1
    monkeypatch.setattr(model.backbone.norm, "_hf_hook", object(), raising=False)  # accelerate offloads this part
    assert count_workers(model) == 1


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models_take_one_batch_at_a_time(inside: bool, four_threads: None) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert count_workers(model) == 4
    if inside:
        model[0] = torch.compile(model[0])  # type: ignore[assignment]
    else:
        model.compile()
    assert count_workers(model) == 1


def test_quantised_models_take_one_batch_at_a_time(four_threads: None) -> None:
    model = torch.nn.Linear(2, 2)
    model.hf_quantizer = object()  # type: ignore[assignment]
    assert count_workers(model) == 1
