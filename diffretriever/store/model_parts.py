"""What a model's vectors depend on beside its weights, each part by name: read from the model as it was loaded."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..files.hashes import hash_json
from ..files.lines import read_object
from ..model.adapter_loading import CONFIG_FILE
from ..model.release_code import COMPUTING, hash_code

# Fields of a backbone's config that change no vector, or that each transformers writes in a way of its own.
IDLE_FIELDS = frozenset(
    "attention_dropout bos_token_id eos_token_id initializer_range pad_token_id pretraining_tp quantization_config "
    "rope_parameters rope_scaling rope_theta use_cache".split()
) | (PretrainedConfig().to_dict().keys() - {"model_type", "tie_word_embeddings"})
# Fields of adapter_config.json that decide what its weights add, with their defaults; which layers they adapt is told
# by the weights' names.
ADAPTER_FIELDS = {
    "r": 8,
    "lora_alpha": 8,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "trainable_token_indices": None,
}
# Fields of a model's own config that say where its files lie, only round otherwise, describe its training or use, or
# are told by other names.
TOLD_ELSEWHERE = frozenset(
    "adapter_name_or_path backbone_config backbone_type base_model_name_or_path base_model_revision "
    "cut_in_training fetched_backbone mask_token max_length merge_adapter method normalize num_denoise_steps "
    "num_passage_masks num_passage_vectors num_query_masks num_query_vectors passage_length passage_prompt "
    "query_budget_table query_length query_prompt recommended_fusion_weight recommended_mode sparse_top_k".split()
)
# Of tokenizer.json: what turns texts into ids and ids into texts.
TOKENIZER_RULES = ("normalizer", "pre_tokenizer", "model", "decoder", "added_tokens")
# The baselines' modules that compute vectors, beside the model's.
BASELINES = ("baseline", "causal", "diffembed", "promptreps", "repllama")


def model_parts(model: Any) -> dict[str, Any]:
    """Return all that decides a model's vectors beside weights, prompts and options, as JSON values.

    Args:
        model: a DiffRetriever or a baseline, as it was loaded.

    Returns:
        Short fields as they are, long ones by their hash: of the model's own config, the backbone's and the adapter's;
        the tokenizer's rules; what the chat template puts around texts; budgets, lengths, quantisation, method, code.

    Raises:
        FileNotFoundError: the adapter's files, or the code's, are no longer where the model was loaded from.
    """
    layers = model.backbone
    while hasattr(layers, "backbone"):  # a DiffEmbed's is a DiffRetriever
        layers = layers.backbone
    adapter, texts = model.loaded_from.adapter, model.texts
    layouts = {"query": texts.layouts[True], "passage": texts.layouts[False]}
    special = {"mask_id": texts.mask_id, "end_of_text_id": texts.end_of_text_id}
    return {
        "method": type(model).__name__,
        "config": own_fields(model.config),
        "backbone": backbone_fields(layers.config),
        "adapter": None if adapter is None else adapter_fields(adapter / CONFIG_FILE),
        "tokenizer": special | tokenizer_hashes(texts.tokenizer),
        "chat_template": {side: hash_json(_frame(layout)) for side, layout in layouts.items()},
        "num_masks": {"query": model.config.num_query_masks, "passage": model.config.num_passage_masks},
        "text_tokens": {side: layout.room for side, layout in layouts.items()},
        "quantization": _quantization(model),
        "code": code_hashes(model),
    }


def tokenizer_hashes(tokenizer: Any) -> dict[str, str]:
    """Return {part of the tokenizer's rules: its hash}."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: hash_json(rules.get(name)) for name in TOKENIZER_RULES}


def own_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a DiffRetriever's or a baseline's config that nothing else here tells."""
    own = inspect.signature(type(config).__init__).parameters.keys() - TOLD_ELSEWHERE
    fields = {name: value for name, value in sorted(config.to_dict().items()) if name in own}
    if config.num_denoise_steps == 1 and "denoise_confidence" in fields:
        fields["denoise_confidence"] = "entropy"  # of no effect, so that its value makes no other model
    return fields


def backbone_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a Llama or Qwen2 config that reach the model, the same under every transformers.

    Args:
        config: transformers' own.
    """
    whole = config.to_dict()
    fields = {name: value for name, value in whole.items() if name not in IDLE_FIELDS}
    rope = whole.get("rope_parameters")
    if rope is None:  # transformers 4
        rope = {"rope_type": "default", **(whole.get("rope_scaling") or {}), "rope_theta": whole.get("rope_theta")}
    fields["rope"] = {
        name: value for name, value in sorted(rope.items()) if name != "type"
    }  # `rope_type`'s former name
    return dict(sorted(fields.items()))


def adapter_fields(file: Path) -> dict[str, Any]:
    """Return what adapter_config.json says of the adapter's arithmetic; of patterns the first that matches counts."""
    said = read_object(file)
    fields = {name: default if said.get(name) is None else said[name] for name, default in ADAPTER_FIELDS.items()}
    return {name: [*map(list, value.items())] if isinstance(value, dict) else value for name, value in fields.items()}


def _frame(layout: Any) -> list[list[int]]:
    """Return the token ids before a text, those between it and the masks, and those behind the masks."""
    end = len(layout.closing) - layout.num_tail
    return [layout.prefix, layout.closing[: end - layout.num_masks], layout.closing[end:]]


def _quantization(model: Any) -> Any:
    """Return the quantisation's settings as JSON values; None for a model without."""
    configs = (getattr(part.config, "quantization_config", None) for part in (model, model.backbone))
    found: Any = next((config for config in configs if config is not None), None)
    return json.loads(json.dumps(found.to_dict() if hasattr(found, "to_dict") else found, default=str))


def code_hashes(model: Any) -> dict[str, str]:
    """Return {module: hash of its code} of the modules that compute a model's vectors, as this process loaded them."""
    parts = [part for part in (model, model.backbone) if hasattr(part, "loaded_from")]
    packages = {type(part).__module__.rpartition(".")[0] for part in parts}
    packages |= {"diffretriever.model"} if "diffretriever.baselines" in packages else set()
    names = (*COMPUTING, *BASELINES)
    loaded = {name: sys.modules.get(f"{package}.{name}") for package in sorted(packages) for name in names}
    return {name: hash_code(Path(str(module.__file__))) for name, module in loaded.items() if module is not None}
