"""The method's own output layout, which peft, the released tooling and `publish.py build --adapter` read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..baselines import Baseline
from ..files.durable import write_json, write_whole
from ..model.adapter_loading import CONFIG_FILE, RETRIEVER_FILE, ROWS, WEIGHTS_FILE, read_prompt
from ..model.chat_template import render_prompt
from .adapter_recipe import AdapterRecipe
from .lora import original_parameters
from .methods import backbone_type


def save_adapter(model: Any, recipe: AdapterRecipe, out: Path, base: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors and what `save_settings` adds.

    Args:
        model: a DiffRetriever or a baseline after `add_lora`.
        recipe: what it was trained with.
        out: the folder, made if absent. Each file is replaced in one step.
        base: the backbone's name for adapter_config.json.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
    """
    found = original_parameters(model).items()
    weights = {name: value.detach().float().cpu().contiguous() for name, value in found}
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise FloatingPointError(f"{len(broken)} adapter weights hold NaN or infinite values, {broken[0]} among them")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / WEIGHTS_FILE, [save(weights, metadata={"format": "pt"})])
    rows = [model.texts.mask_id] if any(name.endswith(ROWS) for name in weights) else None
    written = adapter_config(recipe, backbone_type(model), base, weights)
    write_json(out / CONFIG_FILE, written | ({"trainable_token_indices": {"embed_tokens": rows}} if rows else {}))
    save_settings(model, recipe, out)


def adapter_config(recipe: AdapterRecipe, kind: str | None, base: str, weights: Iterable[str]) -> dict[str, Any]:
    """Return peft's adapter_config.json, with the backbone's original module names.

    Args:
        recipe: rank, alpha, dropout.
        kind: of backbone, as the release's config has it; None for a causal language model.
        base: the backbone's name.
        weights: the original names of the adapter's weights.
    """
    llada = kind == "llada"
    modules = [name.split(".lora_")[0] for name in weights if not name.endswith(ROWS)]
    # LLaDA's output head has the name of a projection, so that it is adapted, too, unless it is excluded.
    head = any(module.endswith("model.transformer.ff_out") for module in modules)
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": r"model\.transformer\.ff_out" if llada and not head else None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": recipe.rank,
        "revision": None,
        "target_modules": list(dict.fromkeys(module.rpartition(".")[2] for module in modules)),
        "task_type": "CAUSAL_LM" if kind in (None, "llada") else "FEATURE_EXTRACTION",
        "use_rslora": False,
        "use_dora": False,
    }


def check_prompts(model: Any) -> Any:
    """Return the model; refuse prompts that a release could not have, as it reads them from the ids that are recorded.

    Args:
        model: a DiffRetriever, or a baseline, whose baseline.json has the words.

    Raises:
        ValueError: the tokenizer turns the ids' words into other ids.
    """
    if isinstance(model, Baseline):
        return model
    for side, is_query in (("query", True), ("passage", False)):
        layout = model.texts.layouts[is_query]
        try:
            read_prompt(model.tokenizer, list(layout.prefix), list(layout.suffix), render_prompt)
        except ValueError as error:
            raise ValueError(
                f"{side}_prompt: an adapter records its token ids, and this tokenizer reads them back as other words "
                "(some have a blank of their own behind {text}). Let the user's turn end with {text}, and put what "
                "follows in front of it or into the assistant's turn."
            ) from error
    return model


@singledispatch
def save_settings(model: Any, recipe: AdapterRecipe, out: Path) -> None:
    """Write beside an adapter what it was trained with: retriever_config.json, or a baseline's baseline.json.

    Args:
        model: a DiffRetriever or a baseline.
        recipe: of its training.
        out: the adapter's folder.
    """
    write_json(out / RETRIEVER_FILE, retriever_config(model, recipe))


@save_settings.register
def _(model: Baseline, recipe: AdapterRecipe, out: Path) -> None:
    config, here = model.config, model.loaded_from
    assert here is not None
    base = config.base_model_name_or_path
    place = Path(base).expanduser() if base == config.name_or_path else here.release / Path(base).expanduser()
    base = os.path.relpath(place.resolve(), out.resolve()) if place.is_dir() else base
    replace(config, base_model_name_or_path=base, adapter_name_or_path=".").save(out)


def retriever_config(model: Any, recipe: AdapterRecipe) -> dict[str, Any]:
    """Return retriever_config.json as the method's training writes it: budgets, lengths, the prompts' token ids."""
    config: dict[str, Any] = {
        "model_type": "llada1" if model.config.backbone_type == "llada" else model.config.backbone_type,
        "mask_token_id": model.texts.mask_id,
        "hidden_size": model.config.hidden_size,
        "max_length": max(len(one.prefix) + len(one.suffix) + one.room for one in model.texts.layouts.values()),
        **recipe.lengths(),
        **({"cut_in_training": cut} if (cut := model.config.cut_in_training) else {}),
        "n_gen_tokens": recipe.num_passage_masks,
        "n_gen_q_tokens": recipe.num_query_masks,
        "n_gen_p_tokens": recipe.num_passage_masks,
        "temperature": recipe.temperature,
        "flops_weight": 0.0,
        "num_denoise_steps": recipe.num_denoise_steps,
        "sparse_weight": recipe.sparse_weight,
        "normalize": True,
    }
    if model.config.mask_token is not None:
        config["mask_token"] = model.config.mask_token
    for side, is_query in (("query", True), ("passage", False)):
        layout = model.texts.layouts[is_query]
        config[f"{side}_prefix_ids"], config[f"{side}_suffix_ids"] = list(layout.prefix), list(layout.suffix)
    # What follows belongs to variants of the method that are not trained here, at the values that switch them off.
    masks = [2**power for power in range(recipe.num_passage_masks.bit_length())]
    return config | {
        "lora_rank": recipe.rank,
        "lora_alpha": recipe.alpha,
        "use_eos": False,
        "n_tail": model.texts.layouts[True].num_tail,
        "use_k_adapter": False,
        "adapter_weight": 1.0,
        "teacher_temperature": 1.0,
        "k_adapter_options": masks,
        "use_k_pre_encoder": False,
        "gumbel_temperature": 1.0,
        "k_cost_lambda": 0.001,
        "k_pre_encoder_options": masks,
    }
