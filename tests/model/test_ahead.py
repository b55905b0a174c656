"""On a GPU the host never waits within the loop: batches are packed ahead, results arrive by themselves, in order."""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, PretendGPU, pretended_gpu

from diffretriever.encode.encode_store import encode_store
from diffretriever.model.st_diffretriever import DiffRetrieverModule

pytestmark = pytest.mark.once
TEXTS = [f"passage {number} " + "about water, light and energy " * (number % 5) for number in range(16)]
BATCHES: dict[str, Any] = {"tokens_per_batch": 150}


@pytest.fixture
def gpu() -> Iterator[PretendGPU]:
    with pretended_gpu() as gpu:
        yield gpu


@pytest.fixture
def pair(load_release: Callable[..., Any], gpu: PretendGPU) -> tuple[Any, Any]:
    """A model on the CPU, and the same on the GPU."""
    here = load_release("tiny-llada", "llada-q4p4")
    there = copy.deepcopy(here)
    gpu.move(there)
    return here, there


def test_what_the_pretended_gpu_counts_and_refuses(gpu: PretendGPU) -> None:
    values = torch.arange(4.0).to(GPU)
    assert gpu.waits.pop("copy to the GPU") == 1  # of memory that is not pinned
    arriving = values.to("cpu", non_blocking=True)
    assert arriving.isnan().all()
    gpu.record_event().synchronize()
    assert arriving.tolist() == [0, 1, 2, 3]
    assert not gpu.waits
    assert bool((values > 2).any())
    values.nonzero()
    values.cpu()
    assert values[values > 1].tolist() == [2, 3]
    assert set(gpu.waits) >= {"_local_scalar_dense", "nonzero", "copy to the host", "index by truth"}
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        values + torch.ones(4)


@pytest.mark.parametrize("content_filter", [True, False])
def test_nothing_waits_but_for_results(
    pair: tuple[Any, Any], gpu: PretendGPU, content_filter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = pair
    monkeypatch.setattr("diffretriever.model.batching.WINDOW", 7)
    found = there.encode_texts(TEXTS, False, content_filter=content_filter, **BATCHES)
    assert not gpu.waits
    assert gpu.events > 4
    expected = here.encode_texts(TEXTS, False, content_filter=content_filter, **BATCHES)
    assert found.keys() == expected.keys()
    for name in ("repr_hidden", "sparse_values"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=3e-6)
    if content_filter:  # else words of equal weight, but for rounding, change places
        assert torch.equal(found.sparse_indices, expected.sparse_indices)


@pytest.mark.parametrize(
    "options",
    [
        {"num_denoise_steps": 2},
        {"query_budget_table": {"length": [3], "entropy": [], "num_query_masks": [[1], [4]]}},
    ],
    ids=["steps", "budgets"],
)
def test_nor_do_several_steps_and_budgets_of_queries(
    load_release: Callable[..., Any], gpu: PretendGPU, options: dict[str, Any]
) -> None:
    here = load_release("tiny-llada", "llada-q4p4", **options)
    there = copy.deepcopy(here)
    gpu.move(there)
    found, expected = (model.encode_texts(TEXTS[:3], True, **BATCHES) for model in (there, here))
    assert not gpu.waits
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=3e-6)


def test_each_batch_goes_up_in_one_copy(pair: tuple[Any, Any], gpu: PretendGPU) -> None:
    _, there = pair
    prepared = there.texts.prepare(TEXTS[:8], False)
    for rows, _ in there.encode_batches(prepared, [[0, 1, 2], [3, 4], [5, 6, 7]], False):
        assert rows
    assert gpu.copies == {"up": 3, "down": 9}
    assert not gpu.waits


def test_a_batch_that_fails_does_so_behind_those_before_it(pair: tuple[Any, Any], gpu: PretendGPU) -> None:
    _, there = pair
    prepared = there.texts.prepare(TEXTS[:8], False)
    prepared[5] = prepared[5]._replace(content=[10**6])  # no token of the vocabulary
    results = there.encode_batches(prepared, [[row] for row in range(8)], False)
    for row in range(5):
        rows, out = next(results)
        assert rows == [row]
        assert not out.repr_hidden.isnan().any()
    with pytest.raises(ValueError, match="content_token_ids must lie in"):
        next(results)


def test_a_single_text_begins_no_thread(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has nothing to be done beside, and a thread costs more than a short text."""
    begun: list[threading.Thread] = []
    start = threading.Thread.start

    def begin(thread: threading.Thread) -> None:
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", begin)
    for model in pair:
        model.encode_texts(TEXTS[:1], True)
    assert not begun
    pair[1].encode_texts(TEXTS, False, batch_size=8)
    assert begun


def test_the_first_windows_on_a_gpu_are_small(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it does not wait until thousands of texts are prepared."""
    batching = sys.modules[type(pair[0]).__module__].encode_in_order.__globals__
    monkeypatch.setitem(batching, "FIRST_WINDOW", 2)
    monkeypatch.setitem(batching, "WINDOW", 10)
    sizes: dict[str, list[int]] = {"cpu": [], "cuda": []}
    for model in pair:

        def prepare(texts: list[str], *options: Any, model: Any = model, prepare: Any = model.texts.prepare) -> Any:
            sizes[model.device.type].append(len(texts))
            return prepare(texts, *options)

        monkeypatch.setattr(model.texts, "prepare", prepare)
        model.encode_texts(TEXTS + TEXTS[:5], False, compute_sparse=False)
    assert sizes == {"cpu": [10, 10, 1], "cuda": [2, 8, 10, 1]}


def test_vectors_that_are_not_finite_name_their_row(pair: tuple[Any, Any], gpu: PretendGPU, tmp_path: Path) -> None:
    _, there = pair
    there.backbone.embed_tokens.weight.held[there.texts.first_ids(["zebra"], 1)[0][0]] = torch.nan
    corpus = tmp_path / "corpus.jsonl"
    texts = ["water", "light", "zebra", "energy"]
    corpus.write_text("".join(json.dumps({"_id": text, "text": text}) + "\n" for text in texts))
    with pytest.raises(ValueError, match=r"text 'zebra' could not be encoded: The vectors of rows \[0\] are not"):
        encode_store(there, corpus, tmp_path / "store")
    with pytest.raises(ValueError, match=r"The vectors of rows \[\d\] are not finite: the weights .*embed_tokens"):
        there.encode_texts(texts, False)


def test_the_corpus_encoder_takes_the_same_loop(pair: tuple[Any, Any], gpu: PretendGPU, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": text, "text": text}) + "\n" for text in TEXTS))
    stores = [encode_store(model, corpus, tmp_path / model.device.type, shard_size=6, **BATCHES) for model in pair]
    assert not gpu.waits
    assert gpu.events > 4
    for one, other in zip(*(store.shards() for store in stores), strict=True):
        torch.testing.assert_close(one.dense(0, len(one)), other.dense(0, len(other)), rtol=0, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("goal", [None, "latency"])
def test_on_cuda_the_driver_sees_no_wait(load_release: Callable[..., Any], goal: str | None) -> None:
    """What waits raises an error; waiting for a copy's event does not count."""
    here = load_release("tiny-llada", "llada-q4p4")
    there = copy.deepcopy(here).to("cuda")
    if goal is not None:
        there.optimize_for(goal, compiled=False)
    for texts in (TEXTS, TEXTS[:1]):
        expected = here.encode_texts(texts, False, **BATCHES)
        there.encode_texts(texts, False, **BATCHES)  # libraries are loaded, and memory is taken
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchroniz"):
                torch.ones(1, device="cuda").item()
            found = there.encode_texts(texts, False, **BATCHES)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(found.repr_hidden, expected.repr_hidden, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.sparse_values, expected.sparse_values, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["dense", "sparse", "multi-vector"])
def test_sentence_transformers_copies_no_ids_back(pair: tuple[Any, Any], gpu: PretendGPU, kind: str) -> None:
    here, there = (DiffRetrieverModule(model, kind) for model in pair)
    features = there.preprocess(TEXTS[:5], task="query")
    features["input_ids"] = features["input_ids"].to(GPU)  # as the library does
    gpu.waits.clear()
    found = there(features)["sentence_embedding" if kind != "multi-vector" else "token_embeddings"]
    checks = 2 if kind == "sparse" else 1
    waits = gpu.waits.copy()
    assert waits["_local_scalar_dense"] == checks  # that the vectors are finite; the library itself then waits for them
    assert set(waits) <= {"_local_scalar_dense", "copy to the GPU"}
    features = here.preprocess(TEXTS[:5], task="query")
    expected = here(features)["sentence_embedding" if kind != "multi-vector" else "token_embeddings"]
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=3e-6)
