"""LoRA matrices beside a release's projections, and their names in the backbone's original format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..model.adapter_loading import PREFIX, ROWS
from ..model.backbone_loading import original_name
from .methods import adapted, backbone_type

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model: Any, rank: int, alpha: int, dropout: float, head: bool, mask_row: bool = False) -> None:
    """Freeze a release and put LoRA matrices beside its projections, in float32.

    Args:
        model: a DiffRetriever or a baseline without an adapter.
        rank, alpha, dropout: LoRA's r, alpha and dropout probability.
        head: whether the output head gets them, too.
        mask_row: whether the embedding's row of [MASK] is trained, too, from the mean of all rows on: the backbone has
            learned nothing for that token.
    """
    import peft

    targets = [*PROJECTIONS, *(["lm_head"] if head else [])]
    rows = {"embed_tokens": [model.texts.mask_id]} if mask_row else None
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        trainable_token_indices=rows,
    )
    mean = model.backbone.embed_tokens.weight.detach().float().mean(dim=0, keepdim=True) if mask_row else None  # [1, H]
    model.requires_grad_(False)
    peft.inject_adapter_in_model(config, adapted(model))
    own = lora_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in own.items():
        parameter.data = parameter.data.float() if mean is None or ROWS not in name else mean
        parameter.requires_grad_(True)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA matrices of a model, and its own rows of the embedding, by name."""
    return {name: value for name, value in model.named_parameters() if is_trained(name)}


def is_trained(name: str) -> bool:
    """Whether a parameter of a model after `add_lora` is the adapter's."""
    return ".lora_" in name or f"{ROWS}.default" in name


def original_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return what `lora_parameters` does, by the names that adapter files give them, the backbone's original ones.

    For example `base_model.model.model.transformer.blocks.0.attn_out.lora_A.weight`.
    """
    kind = backbone_type(model)
    own = {name.replace(".default", ""): value for name, value in lora_parameters(adapted(model)).items()}
    return {PREFIX + (name if kind is None else original_name(kind, name)): value for name, value in own.items()}


@torch.no_grad()
def load_lora(model: Any, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Put saved adapter weights into a release that `add_lora` has prepared.

    Args:
        model: the release.
        weights: by their original names.
        where: the file that they are from.

    Raises:
        ValueError: a key or shape is not this adapter's; names the file and the key.
    """
    own = original_parameters(model)
    for name in sorted(own.keys() ^ weights.keys()):
        problem = "lacks" if name in own else "has an unexpected"
        raise ValueError(f"{where} {problem} {name}; it is another run's adapter")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise ValueError(f"{where}: {name} has shape {list(value.shape)}, this run's has {list(own[name].shape)}")
        own[name].copy_(value)
