"""Logits of some vocabulary entries against the whole head's, whatever the head is made of."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from diffretriever.model.sparse_head import logits_at

pytestmark = pytest.mark.once
COLUMNS = torch.tensor([3, 7, 19])
STATES = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def adapted_head(bias: bool = False, **settings: Any) -> Any:
    """A head [20, 8] with a LoRA adapter whose matrices are random."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["head"], init_lora_weights=False, **settings)
    holder: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"head": nn.Linear(8, 20, bias=bias)}))
    return holder["head"]


def whole(head: Any, states: torch.Tensor) -> torch.Tensor:
    return head(states)[..., COLUMNS]


def gradients(logits: torch.Tensor, head: Any, states: torch.Tensor) -> list[torch.Tensor]:
    trained = [weight for name, weight in head.named_parameters() if "lora_" in name]
    return list(torch.autograd.grad(logits.square().sum(), [states, *trained]))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}])
@pytest.mark.parametrize("training", [True, False])
def test_lora_beside_the_head(settings: dict[str, Any], training: bool) -> None:
    head, states = adapted_head(**settings).train(training), STATES.clone().requires_grad_()
    torch.manual_seed(2)
    expected = whole(head, states)
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(2)
    found = logits_at(head, states, COLUMNS)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, head, states), gradients(expected, head, states), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not calls  # the other columns were not computed
    if training and settings.get("lora_dropout"):
        assert not torch.allclose(logits_at(head, states, COLUMNS), expected)  # dropout is at work


@pytest.mark.parametrize("kind", ["dora", "bias", "merged", "disabled", "hook", "plain"])
def test_other_heads(kind: str) -> None:
    head = adapted_head(bias=kind == "bias", use_dora=kind == "dora", lora_bias=kind == "bias")
    if kind == "merged":
        head.merge()
    elif kind == "disabled":
        head.enable_adapters(False)
    elif kind == "hook":
        add_hook_to_module(head.get_base_layer(), ModelHook())
    elif kind == "plain":
        head = nn.Linear(8, 20, bias=False)
    torch.testing.assert_close(logits_at(head, STATES, COLUMNS), whole(head, STATES))


def test_a_bfloat16_head_takes_float32_states() -> None:
    head = nn.Linear(8, 20, bias=False).bfloat16()
    found = logits_at(head, STATES, COLUMNS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole(head, STATES.bfloat16()).float())
