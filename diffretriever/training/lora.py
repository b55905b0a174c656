"""LoRA matrices beside a release's projections, and their names in the backbone's original format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.hashes import hash_file
from ..model.adapter_loading import ADAPTER_FIELDS, PREFIX, ROWS, find_adapter_files
from ..model.backbone_loading import original_name
from ..model.checked_files import read_json, read_tensors
from .adapter_recipe import AdapterRecipe
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
        raise ValueError(f"{where} {problem} {name}; it is the adapter of another model or recipe")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise ValueError(f"{where}: {name} has shape {list(value.shape)}, this run's has {list(own[name].shape)}")
        own[name].copy_(value)


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter that training goes on from, in the place of a new one.

    Args:
        config_file, weights_file: where it was read from.
        sha256: of the file of weights.
        weights: float32 or another dtype, by their original names.
        mask_rows: ids of the tokens whose rows of the embedding it brings; None where it brings none.
    """

    config_file: Path
    weights_file: Path
    sha256: str
    weights: Mapping[str, torch.Tensor]
    mask_rows: list[int] | None

    def put_into(self, model: Any) -> None:
        """Copy the weights into a model that `add_lora` has prepared.

        Raises:
            ValueError: it is no adapter for this model; names file, key or token.
        """
        mask_id = getattr(model.texts, "mask_id", None)
        if self.mask_rows is not None and self.mask_rows != [mask_id]:
            raise ValueError(
                f"{self.config_file}: trainable_token_indices names the tokens {self.mask_rows}, but the model's mask "
                f"token is {mask_id}; build the zero-shot release with the adapter's --mask-token"
            )
        load_lora(model, self.weights, str(self.weights_file))


def read_initial_adapter(folder: Path, recipe: AdapterRecipe) -> InitialAdapter:
    """Read an adapter to go on from; it must have the form of those that the recipe makes.

    Args:
        folder: of adapter_config.json and adapter_model.safetensors, as training writes them.
        recipe: of the training that goes on.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another rank or alpha than the recipe's, another kind of LoRA, or weights that are not finite;
            names the file and the field or key.
    """
    config_file, weights_file = find_adapter_files(folder)
    fields = read_json(config_file, ADAPTER_FIELDS)
    for field, key in (("r", "rank"), ("lora_alpha", "alpha")):
        found, wanted = fields.get(field, 8), getattr(recipe, key)  # 8: peft's own
        if found != wanted:
            raise ValueError(f"{config_file}: {field} is {found}, the recipe's {key} {wanted}; --set {key}={found}")
    for field in ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern"):
        if fields.get(field):
            raise ValueError(f"{config_file}: {field} is {fields[field]!r:.200}; such an adapter is not trained here")
    weights = read_tensors(weights_file)
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{weights_file}: {name} holds NaN or infinite values")
    rows = fields.get("trainable_token_indices")
    rows = rows.get("embed_tokens") if isinstance(rows, dict) else rows
    return InitialAdapter(config_file, weights_file, hash_file(weights_file), weights, rows or None)
