"""Batches: which items, in which order, in which process, and what the tensors hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_data import batch_of, contrastive_model, made_up_pairs, small_recipe, write_lines

from diffretriever.data.pair_files import PairFiles
from diffretriever.training.batches import SampledItems
from diffretriever.training.epochs import EpochSampler, epoch_batches


@given(st.lists(st.integers(0, 500), min_size=1, max_size=300), st.integers(1, 20), st.integers(0, 3))
def test_an_epoch_holds_every_item_at_most_once(lengths: list[int], size: int, epoch: int) -> None:
    batches = epoch_batches(lengths, size, seed=1, epoch=epoch)
    assert batches.shape == (len(lengths) // size, size)
    assert len(np.unique(batches)) == batches.size
    assert np.array_equal(batches, epoch_batches(lengths, size, seed=1, epoch=epoch))


def test_batches_hold_similar_lengths_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 3200)
    batches = epoch_batches(lengths.tolist(), 20, seed=1, epoch=0)
    spread = np.mean([lengths[batch].max() - lengths[batch].min() for batch in batches])
    assert spread < 0.1 * (lengths.max() - lengths.min())
    assert not np.array_equal(batches, epoch_batches(lengths.tolist(), 20, seed=1, epoch=1))
    assert not np.array_equal(batches, epoch_batches(lengths.tolist(), 20, seed=2, epoch=0))


def test_groups_share_no_batch() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 230).tolist()
    batches = epoch_batches(lengths, 20, seed=1, epoch=0, groups=[105, 20, 105])
    assert batches.shape == (11, 20)
    assert len(np.unique(batches)) == batches.size
    kinds = [{int(item >= 105) + int(item >= 125) for item in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert kinds != sorted(kinds, key=min)  # in random order
    assert len(EpochSampler(lengths, 20, 1, groups=[105, 20, 105])) == 11
    assert np.array_equal(epoch_batches(lengths, 20, 1, 0), epoch_batches(lengths, 20, 1, 0, groups=[230]))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_step_sees_the_same_items_whatever_the_number_of_processes(processes: int, accumulation: int) -> None:
    lengths = list(range(100))
    parts = [list(EpochSampler(lengths, 12, 7, accumulation, process, processes)) for process in range(processes)]
    assert {len(part) for part in parts} == {len(EpochSampler(lengths, 12, 7, accumulation))}
    for number, batch in enumerate(epoch_batches(lengths, 12, seed=7, epoch=0)):
        micro = [
            item for part in parts for m in part[number * accumulation : (number + 1) * accumulation] for item in m
        ]
        assert sorted(item for _, item in micro) == sorted(batch.tolist())
    assert {len(micro) for part in parts for micro in part} == {12 // processes // accumulation}


def test_draws_follow_from_seed_epoch_and_item(tmp_path: Path) -> None:
    record = {"query": "q", "positives": ["p0", "p1", "p2"], "negatives": [f"n{n}" for n in range(9)]}
    files = PairFiles([write_lines(tmp_path / "p.jsonl", [record, {"query": "r", "positive": "s"}])])
    items = SampledItems(files, 4, seed=1)
    drawn = items[0, 0]
    assert drawn["positive"] in record["positives"]
    assert len(set(drawn["negatives"])) == 4
    assert set(drawn["negatives"]) <= set(record["negatives"])
    assert items[0, 0] == drawn
    assert any(items[epoch, 0] != drawn for epoch in range(1, 5))
    assert items[0, 1]["negatives"] == []


@pytest.fixture(scope="module", params=["tiny-llada", "tiny-dream"])
def release(request: pytest.FixtureRequest, build_release: Callable[..., Path]) -> Path:
    return build_release(request.param)


def test_the_tensors_are_what_inference_makes(release: Path, tmp_path: Path) -> None:
    model = contrastive_model(release, small_recipe(num_query_masks=2, num_passage_masks=3, grad_cache_chunk=2))
    records = made_up_pairs(3, negatives=2)
    batch = batch_of(model, records, tmp_path / "p.jsonl")
    retriever = model.retriever
    passages = [r["positive"] for r in records] + [text for r in records for text in r["negatives"]]
    for name, is_query, texts in (("query", True, [r["query"] for r in records]), ("passage", False, passages)):
        rows = [
            [token for token, real in zip(ids.tolist(), mask.tolist(), strict=True) if real]
            for chunk in batch[name]["chunks"]
            for ids, mask in zip(chunk["ids"], chunk["mask"], strict=True)
        ]
        rows = [rows[place] for place in batch[name]["order"]]
        assert rows == retriever.texts.tokenize(texts, is_query)
        words = [[token for token in row if token >= 0] for row in batch[f"{name}_words"].tolist()]
        assert words == retriever.content_token_ids(texts)
    sizes = [len(chunk["ids"]) for chunk in batch["passage"]["chunks"]]
    assert sizes == [2, 2, 2, 2, 1]
    for chunk in batch["passage"]["chunks"]:
        assert torch.all(chunk["ids"].gather(1, chunk["positions"]) == retriever.texts.mask_id)
        assert chunk["positions"].shape[1] == 3


def test_states_come_back_in_the_order_of_the_texts(release: Path, tmp_path: Path) -> None:
    recipe = small_recipe(num_query_masks=2, num_passage_masks=2)
    model = contrastive_model(release, recipe).eval()
    records: list[dict[str, Any]] = [{"query": "w " * (9 - 3 * n) + "x", "positive": "y " * n + "z"} for n in range(3)]
    batch = batch_of(model, records, tmp_path / "p.jsonl")
    with torch.no_grad():
        found = model.encode(batch["query"], True).states
        for number, record in enumerate(records):
            ids, mask = model.retriever.tokenize([record["query"]], True)
            alone = model.retriever(ids, mask, is_query=True).mask_hidden
            torch.testing.assert_close(found[number : number + 1], alone, atol=2e-5, rtol=1e-4)


def test_cut_texts_are_counted(release: Path, tmp_path: Path) -> None:
    model = contrastive_model(release, small_recipe())
    room = model.retriever.config.max_length - min(
        len(layout.prefix) + len(layout.suffix) for layout in model.retriever.texts.layouts.values()
    )
    records = [{"query": "river", "positive": "mountain " * (2 * room)}, {"query": "lemon", "positive": "short text"}]
    batch = batch_of(model, records, tmp_path / "p.jsonl")
    assert batch["cut"] == 1
    assert batch["tokens"] == sum(int(c["mask"].sum()) for side in ("query", "passage") for c in batch[side]["chunks"])
