"""The method's own output layout, which peft, the released tooling and `publish.py build --adapter` read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from .adapter_recipe import AdapterRecipe
from .lora import LLADA_PROJECTIONS, PROJECTIONS, lora_parameters, original_key

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
RETRIEVER_FILE = "retriever_config.json"


def save_adapter(model: Any, recipe: AdapterRecipe, out: Path, base: str) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and, for mask pooling, retriever_config.json.

    Args:
        model: a DiffRetriever after `add_lora`.
        recipe: what it was trained with.
        out: the folder, made if absent. Each file is replaced in one step.
        base: the backbone's name for adapter_config.json.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
    """
    kind = model.config.backbone_type
    weights = {
        original_key(name, kind): value.detach().float().cpu().contiguous()
        for name, value in lora_parameters(model).items()
    }
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise FloatingPointError(f"{len(broken)} adapter weights hold NaN or infinite values, {broken[0]} among them")
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"{WEIGHTS_FILE}.partial"
    save_file(weights, str(partial), metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes files for the owner alone
    os.replace(partial, out / WEIGHTS_FILE)
    head = any(".transformer.ff_out." in name for name in weights)
    write_json(out / CONFIG_FILE, adapter_config(recipe, kind, base, head))
    if recipe.pooling == "masks":
        write_json(out / RETRIEVER_FILE, retriever_config(model, recipe))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def save_tokenizer_files(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Writes the tokenizer so that every supported transformers reads it; 5.x alone knows its own class name."""
    tokenizer.save_pretrained(str(out))
    file = out / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):  # 4.54 wants an object there, and takes a list here
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("auto_map", "backend", "is_local", "local_files_only", "name_or_path"):  # code, and where it lay
        settings.pop(name, None)
    write_json(file, settings)
    rules = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))  # half the size without the white space
    (out / "tokenizer.json").write_text(json.dumps(rules, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def adapter_config(recipe: AdapterRecipe, backbone_type: str, base: str, head: bool) -> dict[str, Any]:
    """peft's adapter_config.json, with the backbone's original module names.

    Args:
        recipe: rank, alpha, dropout.
        backbone_type: "llada" or "dream".
        base: the backbone's name.
        head: whether LLaDA's output head, whose name is also that of a layer, has weights.
    """
    llada = backbone_type == "llada"
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
        "target_modules": list(LLADA_PROJECTIONS if llada else PROJECTIONS),
        "task_type": "CAUSAL_LM" if llada else "FEATURE_EXTRACTION",
        "use_rslora": False,
        "use_dora": False,
    }


def retriever_config(model: Any, recipe: AdapterRecipe) -> dict[str, Any]:
    """retriever_config.json as the method's training writes it: budgets, lengths, the prompts' token ids."""
    config: dict[str, Any] = {
        "model_type": "llada1" if model.config.backbone_type == "llada" else model.config.backbone_type,
        "mask_token_id": model.texts.mask_id,
        "hidden_size": model.config.hidden_size,
        "max_length": recipe.max_length,
        "n_gen_tokens": recipe.num_passage_masks,
        "n_gen_q_tokens": recipe.num_query_masks,
        "n_gen_p_tokens": recipe.num_passage_masks,
        "temperature": recipe.temperature,
        "flops_weight": 0.0,
        "num_denoise_steps": 1,
        "sparse_weight": recipe.sparse_weight,
        "normalize": True,
    }
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
