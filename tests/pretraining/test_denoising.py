"""The masked diffusion objective: batches, masks, loss."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from checkpoint_folders import KINDS
from paired_texts import BOS, EOS, MASK, paired_texts, tiny_model
from torch.nn import functional as F

from diffretriever.pretraining.corpus import IdLists
from diffretriever.pretraining.denoising import Denoiser, token_batches
from diffretriever.pretraining.formats import FORMATS
from diffretriever.training.denoising import denoising_loss, masked_logits


def test_denoising_loss_against_a_loop() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 7), torch.tensor([1, 2, 3, 4, 5])
    t = torch.tensor([0.2, 0.2, 0.8, 0.8, 0.8])
    total = weights = 0.0
    for n in range(5):
        weight = 1 / float(t[n])
        total += weight * -float(F.log_softmax(logits[n], dim=0)[targets[n]])
        weights += weight
    assert float(denoising_loss(logits, targets, t)) == pytest.approx(total / weights, rel=1e-5)


def test_batches_hold_every_text_once_within_the_budget() -> None:
    numbers = random.Random(0)
    lengths = [numbers.randint(1, 60) for _ in range(500)] + [300]
    batches = token_batches(lengths, 256, seed=1, epoch=0)
    assert sorted(item for batch in batches for item in batch) == list(range(501))
    for batch in batches:
        assert len(batch) * max(lengths[item] for item in batch) <= 256 or batch == [500]
    assert batches != token_batches(lengths, 256, seed=1, epoch=1)


def test_batch_numbers_mean_the_same_in_any_order() -> None:
    texts, rules = IdLists([[5] * 4] * 50), tiny_model().texts
    forward, back = (Denoiser(texts, rules, 8, 20, seed=0).batches for _ in range(2))
    in_order = [forward[number] for number in range(40)]  # three epochs and more
    assert [back[number] for number in reversed(range(40))] == in_order[::-1]


def test_no_texts() -> None:
    with pytest.raises(ValueError, match="no plain texts"):
        Denoiser(IdLists(), tiny_model().texts, 8, 20, seed=0)


def test_words_alone_are_masked_and_every_text_has_a_mask() -> None:
    denoiser = Denoiser(IdLists([[1, 2, 3], [4]]), tiny_model().texts, length=8, tokens=64, seed=0)
    ids = torch.tensor([[BOS, 1, 2, 3], [EOS, EOS, BOS, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    everything = denoiser.choose(ids, mask, torch.tensor(1.0))
    assert everything.tolist() == [[False, True, True, True], [False, False, False, True]]
    assert denoiser.choose(ids, mask, torch.tensor(0.0)).sum(1).tolist() == [1, 1]


def test_a_long_text_is_cut_and_the_held_out_loss_repeats() -> None:
    model = tiny_model()
    denoiser = Denoiser(IdLists([list(range(1, 90))]), model.texts, length=16, tokens=64, seed=0)
    ids, mask = denoiser.rows(denoiser.texts, [0], random.Random(0))
    assert ids.shape == (1, 16)
    assert ids[0, 0] == BOS
    assert mask.all()
    assert denoiser.held_out(model, paired_texts(5, 2)) == denoiser.held_out(model, paired_texts(5, 2))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_against_a_loop_over_the_masked_tokens(kind: str) -> None:
    """LLaDA predicts token i from the state at i, Dream from the state at i - 1."""
    model, shift = tiny_model(kind), {"llada": 0, "dream": 1}[kind]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.tensor([[BOS, 1, 2, 3, 4], [EOS, EOS, EOS, BOS, 5], [EOS, EOS, BOS, 6, 7]])
    mask = (ids != EOS).long()
    chosen = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0]]).bool()
    masked = torch.tensor([[BOS, MASK, MASK, 3, MASK], [EOS, EOS, EOS, BOS, MASK], [EOS, EOS, BOS, MASK, 7]])
    losses = []
    for row in range(3):
        alone = mask[row].bool()
        states = model.hidden_states(masked[row, alone][None], mask[row, alone][None])[0]
        for place, token in enumerate(ids[row, alone].tolist()):
            if chosen[row, alone][place]:
                logits = model.lm_head.weight @ states[place - shift]
                losses.append(float(torch.logsumexp(logits, 0) - logits[token]))
    got = F.cross_entropy(masked_logits(model, ids, mask, chosen, shift), ids[chosen], reduction="none")
    assert got.tolist() == pytest.approx(losses, abs=1e-4)


def test_dream_learns_nothing_from_the_masked_position_itself() -> None:
    """The gradient of one masked token's loss, at the last layer's states, is on the position before it alone."""
    model = tiny_model("dream")
    found: list[torch.Tensor] = []

    def watch(module: Any, inputs: Any, states: torch.Tensor) -> None:
        states.register_hook(found.append)

    hook = model.backbone.norm.register_forward_hook(watch)
    ids, chosen = torch.tensor([[BOS, 1, 2, 3, 4]]), torch.tensor([[False, False, False, True, False]])
    F.cross_entropy(masked_logits(model, ids, torch.ones_like(ids), chosen, shift=1), ids[chosen]).backward()
    hook.remove()
    assert found[0][0].abs().sum(1).nonzero()[:, 0].tolist() == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_it_lowers_the_held_out_loss(kind: str) -> None:
    model, texts = tiny_model(kind), paired_texts(300, seed=0)
    denoiser = Denoiser(texts, model.texts, length=32, tokens=512, seed=0, shift=FORMATS[kind].shift)
    other = paired_texts(40, seed=1)
    before = denoiser.held_out(model, other)["t=0.15"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        loss = denoiser.loss(model, step, random.Random(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = denoiser.held_out(model, other)["t=0.15"]
    assert after < before - 1.0
    assert MASK not in texts.flat
