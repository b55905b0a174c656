"""What pretraining draws from, and in which order."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_folders import KINDS
from paired_texts import MASK, tiny_model

from diffretriever.pretraining.corpus import Corpus, EncodedPairs, IdLists, cloze_pair, drop_tokens, read_texts
from diffretriever.pretraining.neighbours import bm25_neighbours, cached_neighbours, with_neighbours
from diffretriever.pretraining.plan import StagePlan
from diffretriever.pretraining.recipe import Stage


def corpus(pairs: int = 30, texts: int = 30) -> Corpus:
    numbers = random.Random(0)
    queries, passages = (IdLists([[n, *numbers.choices(range(90), k=k)] for n in range(pairs)]) for k in (2, 12))
    plain = IdLists([[n % 90] * 20 for n in range(texts)])
    neighbours = np.array([[(n + 1) % pairs, -1] for n in range(pairs)])
    return Corpus(EncodedPairs(queries, passages, queries, passages), plain, plain, neighbours)


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": " "}\n\n{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"texts.jsonl, line 3: 'text' is missing or not a text"):
        list(read_texts(tmp_path / "texts.jsonl"))


def test_id_lists() -> None:
    lists = IdLists([[1, 2], [], [3]])
    assert [lists[n] for n in range(3)] == [[1, 2], [], [3]]
    assert lists.lengths(1) == [1, 0, 1]
    assert IdLists().lengths(9) == []


def test_cloze_and_dropped_tokens() -> None:
    query, passage = cloze_pair(list(range(40)), random.Random(1), keep=0.0)
    assert sorted(query + passage) == list(range(40))
    kept = drop_tokens(list(range(1000)), 0.3, random.Random(1))
    assert kept == sorted(kept)
    assert 600 < len(kept) < 800
    assert drop_tokens([5, 6], 1.0, random.Random(1)) == [5, 6]


def test_neighbours_leave_out_the_own_passage(tmp_path: Path) -> None:
    queries = ["music player", "player", "mail", "music"]
    passages = ["sound of music player", "music player for files", "network mail server", "sound of music player"]
    found = bm25_neighbours(queries, passages, depth=2)
    assert found[0].tolist() == [1, -1]
    assert found[1].tolist() == [0, 3] or found[1].tolist() == [3, 0]
    assert found[2].tolist() == [-1, -1]
    assert with_neighbours([0], found, random.Random(0)) == [0, 1]
    assert cached_neighbours(queries, passages, 2, tmp_path, ["hash"]).tolist() == found.tolist()
    assert cached_neighbours([], [], 2, tmp_path, ["hash"]).tolist() == found.tolist()  # read back, not made again


def test_steps_follow_the_pattern_and_budgets_take_turns() -> None:
    stage = Stage(pattern=["cloze", "pairs", "denoise"], budgets=[1, 4, 16], batch_size=4)
    plan = StagePlan(stage, corpus(), seed=0)
    assert [plan.kind(step) for step in range(5)] == [
        ("cloze", 0),
        ("pairs", 0),
        ("denoise", 0),
        ("cloze", 1),
        ("pairs", 1),
    ]
    assert [plan.budget(step) for step in (0, 1, 3, 4, 6)] == [1, 4, 16, 1, 4]


def test_a_batch_holds_every_text_once_and_its_own_words() -> None:
    data = corpus()
    plan = StagePlan(Stage(pattern=["pairs", "neighbours"], batch_size=8), data, seed=0)
    for kind in ("pairs", "neighbours"):
        drawn = plan.draw(kind, 5, random.Random(0))
        assert plan.draw(kind, 5, random.Random(0)) == drawn
        numbers = [query[0] for query in drawn.queries]
        assert len(set(numbers)) == len(numbers)
        assert drawn.passages == [data.pairs.passages[number] for number in numbers]
        assert drawn.passage_words == [data.pairs.passage_words[number] for number in numbers]
    epoch = [query[0] for number in range(3) for query in plan.draw("pairs", number, random.Random(0)).queries]
    assert len(set(epoch)) == len(epoch) == 24


def test_equal_texts_do_not_meet_in_a_batch() -> None:
    same = IdLists([[1, 2]] * 3 + [[n, 3] for n in range(5, 10)])
    other = IdLists([[n] for n in range(8)])
    data = Corpus(EncodedPairs(other, same, other, same), same, same, None)
    drawn = StagePlan(Stage(pattern=["pairs"], batch_size=8), data, seed=0).draw("pairs", 0, random.Random(0))
    assert sorted(map(tuple, drawn.passages)) == [(1, 2), *((n, 3) for n in range(5, 10))]


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 31 is larger than the data: 30 items for 'cloze' steps"):
        StagePlan(Stage(pattern=["cloze"], batch_size=31), corpus(), seed=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_new_backbone_computes_its_first_layer_alone(kind: str) -> None:
    model, ids = tiny_model(kind), torch.tensor([[5, 6, 7, MASK, 1, 2, 3]])
    deep = model.hidden_states(ids)
    model.backbone.layers = model.backbone.layers[:1]
    torch.testing.assert_close(model.hidden_states(ids), deep, atol=1e-5, rtol=1e-5)
