"""Losses against brute force, the small backbone, readers, recipes and the small evaluation."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from diffretriever.pretraining.backbone import hidden_states, mask_states, new_backbone
from diffretriever.pretraining.data import (
    Batches,
    IdLists,
    bucketed_sizes,
    cloze_pair,
    pad_left,
    read_pairs,
    read_texts,
)
from diffretriever.pretraining.formats import FORMATS
from diffretriever.training import losses
from diffretriever.training.evaluate import Vectors, ndcg_at_10, sparse_product, top_fused
from diffretriever.training.recipe import PretrainRecipe, Shape, read_recipe

PARITY = Path(__file__).parents[1] / "parity"
RECIPES = Path(__file__).parents[2] / "diffretriever" / "pretraining" / "recipes"
WORDS = "file network image sound text package kernel window game music server client mail printer disk".split()


# ------------------------------------------------------------------------------------------------ losses


def test_maxsim_is_the_mean_over_queries_of_the_best_passage_vector() -> None:
    query, passage = torch.randn(3, 2, 5), torch.randn(4, 3, 5)
    got = losses.maxsim(query, passage)
    for i in range(3):
        for j in range(4):
            best = [max(float(q @ p) for p in passage[j]) for q in query[i]]
            assert float(got[i, j]) == pytest.approx(sum(best) / 2, abs=1e-5)


def test_dense_loss_against_a_loop() -> None:
    query, passage, targets = torch.randn(3, 2, 5), torch.randn(5, 3, 5), torch.tensor([0, 1, 2])
    got = losses.dense_loss(query, passage, targets, temperature=0.1)
    total = 0.0
    for i in range(3):
        scores = []
        for j in range(5):
            best = [max(float(F.cosine_similarity(q, p, dim=0)) for p in passage[j]) for q in query[i]]
            scores.append(sum(best) / 2 / 0.1)
        total += math.log(sum(map(math.exp, scores))) - scores[i]
    assert float(got) == pytest.approx(total / 3, abs=1e-4)


def test_sparse_scores_against_a_loop() -> None:
    head = torch.randn(20, 5)
    query, passage = torch.randn(3, 2, 5), torch.randn(4, 3, 5)
    query_words, passage_words = [[1, 2, 3], [4], []], [[2, 3, 9], [4, 5], [1], [3, 4]]
    got = losses.sparse_scores(query, passage, head.__getitem__, query_words, passage_words)
    for i in range(3):
        for j in range(4):
            total = 0.0
            for word in set(query_words[i]) & set(passage_words[j]):
                weights = [
                    math.log1p(max(0.0, max(float(state @ head[word]) for state in states)))
                    for states in (query[i], passage[j])
                ]
                total += weights[0] * weights[1]
            assert float(got[i, j]) == pytest.approx(total, abs=1e-5)


def test_sparse_scores_without_any_content_word_are_zero() -> None:
    scores = losses.sparse_scores(
        torch.randn(2, 1, 5), torch.randn(3, 1, 5), torch.randn(9, 5).__getitem__, [[], []], [[1]] * 3
    )
    assert scores.tolist() == [[0.0] * 3] * 2


def test_word_loss_falls_when_the_own_words_have_positive_logits() -> None:
    head = torch.eye(6)
    good, bad = torch.tensor([[[5.0, -5, -5, -5, -5, -5]]]), torch.tensor([[[-5.0, 5, -5, -5, -5, -5]]])
    values = []
    for states in (good, bad):
        torch.manual_seed(0)
        values.append(float(losses.word_loss(states, head.__getitem__, [[0]], 20, 6)))
    assert values[0] < 0.1 < values[1]


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        losses.info_nce(torch.zeros(2, 2), torch.tensor([0, 1]), 0)


# ------------------------------------------------------------------------------------------------ backbone and format


def tiny_backbone() -> Any:
    config = json.loads((PARITY / "backbones" / "tiny-llada" / "config.json").read_text())
    return new_backbone(FORMATS["llada"], FORMATS["llada"].read_config(config), seed=1)


def test_masks_alone_give_the_same_states_as_every_position_and_padding_changes_nothing() -> None:
    model = tiny_backbone()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = [list(range(5, 5 + n)) + [2006] * 2 + [1, 2, 3] for n in (4, 9)]
    ids, mask = pad_left(rows, 2001)
    at_masks = mask_states(model, ids, mask, num_masks=2)
    everywhere = hidden_states(model, ids, mask)[:, -5:-3]
    torch.testing.assert_close(at_masks, everywhere, atol=1e-5, rtol=1e-5)
    alone = mask_states(model, *pad_left(rows[:1], 2001), num_masks=2)
    torch.testing.assert_close(at_masks[:1], alone, atol=1e-5, rtol=1e-5)


def test_a_new_backbone_computes_its_first_layer_alone() -> None:
    model = tiny_backbone()
    ids, mask = pad_left([[5, 6, 7, 2006, 1, 2, 3]], 2001)
    deep = mask_states(model, ids, mask, num_masks=1)
    model.model.layers = model.model.layers[:1]
    torch.testing.assert_close(mask_states(model, ids, mask, num_masks=1), deep, atol=1e-5, rtol=1e-5)


def test_the_bidirectional_model_sees_the_future() -> None:
    model = tiny_backbone()
    mask = torch.ones(1, 4, dtype=torch.long)
    first = hidden_states(model, torch.tensor([[5, 6, 7, 8]]), mask)
    second = hidden_states(model, torch.tensor([[5, 6, 7, 9]]), mask)
    assert not torch.allclose(first[:, 0], second[:, 0])


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", r"pairs.jsonl, line 2: not valid JSON"),
        ("[1]", r"pairs.jsonl, line 2: expected a JSON object, got list"),
        ('{"query": "", "positive": "p"}', r"line 2: 'query' must be a text that is not empty"),
        ('{"query": "q", "positives": []}', r"line 2: 'positive' is missing or empty"),
        ('{"query": "q", "positive": " "}', r"line 2: 'positive' holds something that is not a text, or an empty one"),
        (
            '{"query": "q", "positive": "p", "negatives": [3]}',
            r"line 2: 'negatives' holds something that is not a text",
        ),
    ],
)
def test_reader_errors_name_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "q", "positive": "p"}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        list(read_pairs(path))


def test_reader_takes_lists_and_drops_a_negative_that_is_the_positive(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('\n{"query": "q", "positives": ["a", "b"], "negatives": ["c", "a"]}\n')
    (pair,) = read_pairs(path)
    assert pair.positives == ("a", "b")
    assert pair.negatives == ("c",)


def test_missing_file_and_missing_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data file"):
        list(read_texts(tmp_path / "absent.jsonl"))
    (tmp_path / "texts.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"texts.jsonl, line 1: 'text' is missing or not a text"):
        list(read_texts(tmp_path / "texts.jsonl"))


def test_batches_hold_every_item_once_an_epoch() -> None:
    lengths = [random.Random(n).randrange(50) for n in range(130)]
    batches = Batches(lengths, 8, seed=3)
    epoch = len(bucketed_sizes(130, 8))
    items = [item for number in range(epoch) for item in batches[number]]
    assert len(items) == len(set(items)) == epoch * 8
    assert Batches(lengths, 8, seed=3)[epoch + 1] == batches[epoch + 1]
    with pytest.raises(ValueError, match="batch size 200 is larger than the data: 130 items"):
        Batches(lengths, 200, seed=3)


def test_id_lists_and_cloze() -> None:
    lists = IdLists([[1, 2], [], [3]])
    assert [lists[n] for n in range(3)] == [[1, 2], [], [3]]
    assert lists.lengths(1) == [1, 0, 1]
    query, passage = cloze_pair(list(range(40)), random.Random(1), keep=0.0)
    assert sorted(query + passage) == list(range(40))


def test_neighbours_leave_out_the_own_passage() -> None:
    pytest.importorskip("bm25s")
    from diffretriever.pretraining.neighbours import bm25_neighbours, with_neighbours

    passages = ["sound of music player", "music player for files", "network mail server", "sound of music player"]
    found = bm25_neighbours(["music player", "player", "mail", "music"], passages, depth=2)
    assert found[0].tolist() == [1, -1]
    assert with_neighbours([0], found, random.Random(0)) == [0, 1]


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(("kind", "budgets"), [("llada", [1, 4]), ("dream", [1, 4, 16])])
def test_shipped_recipes_read(kind: str, budgets: list[int]) -> None:
    recipe = read_recipe(RECIPES / f"{kind}-tiny.yaml", PretrainRecipe)
    assert (recipe.backbone_type, recipe.stages[1].budgets) == (kind, budgets)
    assert recipe.shape == Shape(12288, d_model=192, n_layers=4, n_heads=3, mlp_hidden_size=576)


def test_an_open_value_may_be_given_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("shape: {rope_theta: 1e4, rms_norm_eps: null}")
    shape = read_recipe(tmp_path / "r.yaml", PretrainRecipe).shape
    assert (shape.rope_theta, shape.rms_norm_eps) == (10_000.0, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stagez: 3", r"r.yaml: unknown key 'stagez'; the recipe has backbone_type, bf16, "),
        ("stages: [{steps: many}]", r"steps must be of type int, got 'many'"),
        ("stages: [{steps: 0}]", r"steps must be at least 1, got 0"),
        ("stages: [{temperature: hot}]", r"temperature must be a number, got 'hot'"),
        ("stages: [{temperature: -1}]", r"temperature must be positive, got -1"),
        ("backbone_type: lama", r"r.yaml: unknown backbone_type 'lama'; expected one of llada, dream"),
        ("backbone_type: 3", r"backbone_type must be of type str, got 3"),
        ("shape: {rope_theta: big}", r"shape: rope_theta must be a number, got 'big'"),
        ("shape: {n_layers: 0}", r"shape: n_layers must be positive, got 0"),
        (
            "shape: {d_model: 100, n_heads: 4}",
            r"d_model must be a multiple of twice n_heads.*got d_model 100 and n_heads 4",
        ),
        ("a: [", r"r.yaml: not valid YAML"),
        ("- 1", r"expected keys and values, got list"),
    ],
)
def test_recipe_errors(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_recipe(tmp_path / "r.yaml", PretrainRecipe)


def test_unknown_kind_of_step(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("stages: [{pattern: [pears]}]")
    with pytest.raises(ValueError, match="unknown kind of step 'pears'; expected one of pairs, neighbours"):
        read_recipe(tmp_path / "r.yaml", PretrainRecipe)


# ------------------------------------------------------------------------------------------------ evaluation


def test_ndcg_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    qrels = {"a": {"z": 1}, "b": {"x": 1}}
    assert ndcg_at_10(scores, ["a", "b"], ["x", "y", "z"], qrels) == pytest.approx((1 / math.log2(3) + 1) / 2)


def test_sparse_product_and_fusion() -> None:
    query = Vectors(torch.zeros(1, 1, 1), torch.tensor([[3, 5]]), torch.tensor([[2.0, 1.0]]))
    passage = Vectors(torch.zeros(2, 1, 1), torch.tensor([[5, 0], [3, 5]]), torch.tensor([[4.0, 0.0], [1.0, 1.0]]))
    assert sparse_product(query, passage, 8).tolist() == [[4.0, 3.0]]
    fused = top_fused(torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[2.0, 0.0, 2.0]]))
    assert fused[0].tolist() == pytest.approx([0.5, 0.5, 0.75])
