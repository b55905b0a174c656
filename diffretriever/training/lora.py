"""LoRA matrices beside a release's projections, and their names in the backbone's original format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..model.backbone_loading import original_name, our_name

PREFIX = "base_model.model."
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The same seven layers in LLaDA's own names. `ff_out` is the name of the output head, too: released adapters have it.
LLADA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def add_lora(model: Any, rank: int, alpha: int, dropout: float, head: bool) -> None:
    """Freezes a release and puts LoRA matrices beside its projections, in float32.

    Args:
        model: a DiffRetriever without an adapter.
        rank, alpha, dropout: LoRA's r, alpha and dropout probability.
        head: whether the output head gets them, too.
    """
    import peft

    targets = [*PROJECTIONS, *(["lm_head"] if head else [])]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    model.requires_grad_(False)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        trainable = ".lora_" in name
        parameter.requires_grad_(trainable)
        if trainable:
            parameter.data = parameter.data.float()


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA matrices of a model by name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def original_key(name: str, backbone_type: str) -> str:
    """The method's name of an adapter weight.

    >>> original_key("backbone.layers.0.self_attn.o_proj.lora_A.default.weight", "llada")
    'base_model.model.model.transformer.blocks.0.attn_out.lora_A.weight'
    >>> original_key("backbone.layers.0.self_attn.o_proj.lora_A.default.weight", "dream")
    'base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight'
    """
    module, part = _split(name)
    return f"{PREFIX}{original_name(backbone_type, module)}.lora_{part}.weight"


def our_key(name: str, backbone_type: str) -> str:
    """The reverse of `original_key`.

    >>> our_key("base_model.model.model.transformer.ff_out.lora_B.weight", "llada")
    'lm_head.lora_B.default.weight'
    """
    module, part = _split(name.removeprefix(PREFIX))
    return f"{our_name(backbone_type, module)}.lora_{part}.default.weight"


def _split(name: str) -> tuple[str, str]:
    match = _KEY.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a LoRA matrix")
    return match[1], match[2]


@torch.no_grad()
def load_lora(model: nn.Module, weights: Mapping[str, torch.Tensor], backbone_type: str, where: str) -> None:
    """Puts saved adapter weights into a model that `add_lora` has prepared.

    Raises:
        ValueError: a key or shape is not this adapter's; names the file and the key.
    """
    own = lora_parameters(model)
    given = {our_key(name, backbone_type): value for name, value in weights.items()}
    for name in sorted(own.keys() ^ given.keys()):
        problem = "lacks" if name in own else "has an unexpected"
        raise ValueError(f"{where} {problem} {original_key(name, backbone_type)}; it is another run's adapter")
    for name, value in given.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{where}: {original_key(name, backbone_type)} has shape {list(value.shape)}, "
                f"this run's has {list(own[name].shape)}"
            )
        own[name].copy_(value)


def head_logits(head: Any, states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Logits of some vocabulary entries, as the whole head with its LoRA (and dropout) would give them.

    Args:
        head: Linear [V, H], perhaps with LoRA.
        states: [B, K, H].
        columns: int64 [C], vocabulary entries.

    Returns:
        float32 [B, K, C].
    """
    if not hasattr(head, "lora_A"):
        return F.linear(states, head.weight[columns]).float()
    base = F.linear(states, head.get_base_layer().weight[columns]).float()
    down, up = head.lora_A["default"], head.lora_B["default"].weight[columns]  # [r, H], [C, r]
    dropped = head.lora_dropout["default"](states.to(down.weight.dtype))
    update: torch.Tensor = F.linear(down(dropped), up).float()
    return base + head.scaling["default"] * update
