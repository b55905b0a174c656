"""Initial weights from token statistics, against loops and against what they promise."""

from __future__ import annotations

import math
import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from checkpoint_folders import KINDS
from paired_texts import MASK, paired_texts, tiny_model
from scipy.sparse import csr_array

from diffretriever.pretraining.corpus import IdLists
from diffretriever.pretraining.denoising import Denoiser
from diffretriever.pretraining.formats import FORMATS
from diffretriever.pretraining.warm_start import (
    RAREST,
    SMOOTHING,
    WINDOW,
    low_rank_factors,
    neighbour_counts,
    positive_pmi,
    start_from_statistics,
)


def counts_by_loop(rows: list[list[int]]) -> defaultdict[tuple[int, int], float]:
    counts: defaultdict[tuple[int, int], float] = defaultdict(float)
    for row in rows:
        for i, a in enumerate(row):
            for j, b in enumerate(row):
                if 0 < abs(i - j) <= WINDOW:
                    counts[a, b] += 1 / abs(i - j)
    return counts


def test_counts_stay_inside_a_text_and_weigh_by_distance() -> None:
    rows = [[1, 2, 3, 1, 4, 5], [2, 2], [6]]
    table = neighbour_counts(IdLists(rows), 8).toarray()
    expected = counts_by_loop(rows)
    for a in range(8):
        for b in range(8):
            assert table[a, b] == pytest.approx(expected[a, b], abs=1e-6)


def test_pmi_by_its_definition() -> None:
    rows = [random.Random(n).choices(range(6), k=9) for n in range(20)]
    counts = counts_by_loop(rows)
    table = positive_pmi(neighbour_counts(IdLists(rows), 6)).toarray()
    total = sum(counts.values())
    own = [sum(counts[a, b] for b in range(6)) for a in range(6)]
    smoothed = [value**SMOOTHING for value in own]
    for a in range(6):
        for b in range(6):
            joint, chance = counts[a, b] / total, own[a] / total * smoothed[b] / sum(smoothed)
            value = max(0.0, math.log(joint / chance)) if counts[a, b] > RAREST else 0.0
            assert table[a, b] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_beats_the_unigram_distribution(kind: str) -> None:
    model, texts, shift = tiny_model(kind), paired_texts(400, seed=0), FORMATS[kind].shift
    start_from_statistics(model, texts, 0, shift)
    denoiser = Denoiser(texts, model.texts, length=32, tokens=512, seed=0, shift=shift)
    unigram = math.log(100)  # the hundred tokens are equally frequent
    assert denoiser.held_out(model, paired_texts(50, seed=1))["t=0.15"] < unigram - 0.25


@pytest.mark.parametrize(
    ("kind", "head", "offset"), [("llada", 0, -1), ("llada", 1, 1), ("dream", 0, 2), ("dream", 1, 2), ("dream", 2, 3)]
)
def test_the_first_heads_look_at_the_neighbours_of_the_predicted_token(kind: str, head: int, offset: int) -> None:
    """From a mask in LLaDA; from the position before it in Dream, which holds the previous token itself."""
    model, shift = tiny_model(kind), FORMATS[kind].shift
    start_from_statistics(model, paired_texts(100, seed=0), 0, shift)
    model.backbone.config._attn_implementation = "eager"
    ids = torch.tensor([[10, 20, 30, 40, MASK, 50, 60, 70, 80]])
    probabilities: list[torch.Tensor] = []
    hook = model.backbone.layers[0].self_attn.register_forward_hook(lambda *call: probabilities.append(call[2][1]))
    mask = torch.zeros(1, 1, 1, ids.shape[1])
    states = model.backbone.embed_tokens(ids)
    rotation = model.backbone.rotary_emb(states, torch.arange(ids.shape[1])[None])
    model.backbone.layers[0](states, attention_mask=mask, position_embeddings=rotation)
    hook.remove()
    reader = 4 - shift
    assert int(probabilities[0][0, head, reader].argmax()) == reader + offset


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = tiny_model(), tiny_model()
    for model in (first, second):
        start_from_statistics(model, paired_texts(100, seed=0), seed=3)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


@pytest.mark.parametrize("rows", [[], [[5], [6]]])
def test_texts_without_neighbours_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="no text of two tokens"):
        start_from_statistics(tiny_model(), IdLists(rows), seed=0)


def test_factors_against_a_full_svd() -> None:
    numbers = np.random.default_rng(0)
    # singular values that fall as a corpus's do
    dense = (numbers.standard_normal((60, 60)) * np.exp(-np.arange(60) / 6)) @ numbers.standard_normal((60, 60))
    left, right = low_rank_factors(csr_array(dense.astype(np.float32)), 8, seed=0)
    u, s, vt = np.linalg.svd(dense)
    best = (u[:, :8] * s[:8]) @ vt[:8]
    assert np.abs(left.numpy() @ right.numpy().T - best).max() < 0.01 * np.abs(best).max()
