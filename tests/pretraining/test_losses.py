"""What pretraining minimises, against brute force."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffretriever.model.sparse_head import logits_at
from diffretriever.pretraining.losses import contrastive_loss, word_loss
from diffretriever.pretraining.recipe import Stage
from diffretriever.training.objective import Side

WORDS = [[1, 2, 3], [4], []], [[2, 3, 9], [4, 5], [1]]


def sides(seed: int, k: int) -> tuple[Side, Side, nn.Linear]:
    """Three pairs, and an output head of twenty words."""
    torch.manual_seed(seed)
    found = []
    for words in WORDS:
        padded = torch.tensor([[*row, *[-1] * (3 - len(row))] for row in words])
        found.append(Side(torch.randn(3, k, 5), padded))
    return found[0], found[1], nn.Linear(5, 20, bias=False)


def infonce(scores: list[list[float]]) -> float:
    return sum(math.log(sum(map(math.exp, row))) - row[n] for n, row in enumerate(scores)) / len(scores)


@pytest.mark.parametrize("k", [1, 3])
@torch.no_grad()
def test_contrastive_loss_against_loops(k: int) -> None:
    query, passage, head = sides(0, k)
    dense = [[0.0] * 3 for _ in range(3)]
    sparse = [[0.0] * 3 for _ in range(3)]
    for i in range(3):
        for j in range(3):
            best = [max(float(F.cosine_similarity(q, p, dim=0)) for p in passage.states[j]) for q in query.states[i]]
            dense[i][j] = sum(best) / k / 0.1
            for word in set(WORDS[0][i]) & set(WORDS[1][j]):
                weights = [
                    math.log1p(max(0.0, *(float(state @ head.weight[word]) for state in states)))
                    for states in (query.states[i], passage.states[j])
                ]
                sparse[i][j] += weights[0] * weights[1]
    turned = [list(column) for column in zip(*dense, strict=True)]
    stage = Stage(temperature=0.1, sparse_weight=2.0, word_weight=0.5)
    got = contrastive_loss(query, passage, head, stage)
    assert float(got["dense"]) == pytest.approx((infonce(dense) + infonce(turned)) / 2, abs=1e-4)
    assert float(got["sparse"]) == pytest.approx(infonce(sparse), abs=1e-4)
    whole = got["dense"] + 2.0 * got["sparse"] + 0.5 * got["words"]
    assert float(got["loss"]) == pytest.approx(float(whole), rel=1e-5)


@torch.no_grad()
def test_word_loss_against_a_loop() -> None:
    query, _, head = sides(1, 2)
    chance = torch.tensor([3, 17, 17, 0])
    columns = sorted({word for row in WORDS[0] for word in row} | set(chance.tolist()))
    own: list[float] = []
    other: list[float] = []
    for states, words in zip(query.states, WORDS[0], strict=True):
        for column in columns:
            logit = max(float(state @ head.weight[column]) for state in states)
            loss = math.log1p(math.exp(-logit if column in words else logit))
            (own if column in words else other).append(loss)
    expected = (sum(own) / len(own) + sum(other) / len(other)) / 2
    assert float(word_loss(query, partial(logits_at, head), chance)) == pytest.approx(expected, abs=1e-5)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        contrastive_loss(*sides(0, 1), Stage(temperature=0))
