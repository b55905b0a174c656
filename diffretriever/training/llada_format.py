"""LLaDA's on-disk format: config.json, original parameter names, and the way back into transformers' Llama.

LLaDA is `LlamaModel` without the causal mask; its parameters map one to one (only the names differ).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# LLaDA's name of a block's weight -> Llama's.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
TOP_NAMES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
}
_FROM_LLAMA = {llama: llada for llada, llama in BLOCK_NAMES.items()}
_TOP_FROM_LLAMA = {llama: llada for llada, llama in TOP_NAMES.items()}
_LLAMA_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_LLADA_BLOCK = re.compile(r"model\.transformer\.blocks\.(\d+)\.(.+)")


def to_llada_name(name: str) -> str:
    """Turns a Llama module or parameter name into LLaDA's.

    Args:
        name: e.g. `model.layers.0.self_attn.o_proj` or `lm_head`, with or without a trailing `.weight`.

    Returns:
        e.g. `model.transformer.blocks.0.attn_out` or `model.transformer.ff_out`.

    Raises:
        KeyError: if LLaDA has no such parameter.
    """
    stem, suffix = (name[: -len(".weight")], ".weight") if name.endswith(".weight") else (name, "")
    match = _LLAMA_LAYER.fullmatch(stem)
    table, key, prefix = (
        (_FROM_LLAMA, match[2], f"model.transformer.blocks.{match[1]}.") if match else (_TOP_FROM_LLAMA, stem, "")
    )
    if key not in table:
        raise KeyError(f"{name!r} has no counterpart in LLaDA's format")
    return prefix + table[key] + suffix


def to_llama_name(name: str) -> str:
    """The reverse of `to_llada_name`.

    Raises:
        KeyError: if the name is not one of LLaDA's.
    """
    stem, suffix = (name[: -len(".weight")], ".weight") if name.endswith(".weight") else (name, "")
    match = _LLADA_BLOCK.fullmatch(stem)
    table, key, prefix = (BLOCK_NAMES, match[2], f"model.layers.{match[1]}.") if match else (TOP_NAMES, stem, "")
    if key not in table:
        raise KeyError(f"{name!r} is not a parameter of LLaDA's format")
    return prefix + table[key] + suffix


def llada_config(config: LlamaConfig, mask_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """Returns LLaDA's config.json for a Llama of the same shape.

    Args:
        config: the Llama's configuration; every size is read from it.
        mask_token_id: id of `<|mdm_mask|>`.
        eos_token_id: id of `<|endoftext|>`, which also pads.
    """
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            "AutoModel": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": config.hidden_size,
        "embedding_dropout": 0.0,
        "embedding_size": config.vocab_size,
        "eos_token_id": eos_token_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": mask_token_id,
        "max_sequence_length": config.max_position_embeddings,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "pad_token_id": eos_token_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": rope_theta(config),
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": False,
    }


def rope_theta(config: LlamaConfig) -> float:
    """Reads RoPE's base, wherever this version of transformers keeps it."""
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def llama_config(llada: dict[str, Any]) -> LlamaConfig:
    """Returns the Llama configuration of a LLaDA config.json (as a dict).

    Raises:
        KeyError: if a size is missing.
    """
    fields: dict[str, Any] = {
        "hidden_size": llada["d_model"],
        "intermediate_size": llada["mlp_hidden_size"],
        "num_attention_heads": llada["n_heads"],
        "num_key_value_heads": llada["n_kv_heads"],
        "num_hidden_layers": llada["n_layers"],
        "vocab_size": llada["embedding_size"],
        "max_position_embeddings": llada["max_sequence_length"],
        "rms_norm_eps": llada["rms_norm_eps"],
        "rope_theta": llada["rope_theta"],
        "bos_token_id": None,
        "eos_token_id": llada["eos_token_id"],
        "pad_token_id": llada["pad_token_id"],
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(**fields)
    config._attn_implementation = "sdpa"
    return config


def make_bidirectional(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Switches the causal mask off in every attention module (sdpa) and returns the model."""
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def save_backbone(
    model: LlamaForCausalLM,
    tokenizer_folder: str | Path,
    folder: str | Path,
    special_ids: dict[str, int],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a backbone in LLaDA's format: config.json, generation_config.json, model.safetensors, tokenizer.

    Args:
        model: the Llama to write.
        tokenizer_folder: where tokenizer.json, tokenizer_config.json and special_tokens_map.json are.
        folder: the target; made if absent. The weights are replaced in one step, so that an interrupted
            write leaves the previous file.
        special_ids: ids of "mask", "bos" and "eos".
        dtype: of the stored weights.
    """
    folder, tokenizer_folder = Path(folder), Path(tokenizer_folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {to_llada_name(name): value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, str(partial), metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, folder / "model.safetensors")
    config = llada_config(model.config, special_ids["mask"], special_ids["eos"])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "_from_model_config": True,
        "bos_token_id": special_ids["bos"],
        "eos_token_id": special_ids["eos"],
        "transformers_version": "4.38.2",
    }
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    if tokenizer_folder.resolve() != folder.resolve():
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer_folder / name, folder / name)


def load_backbone(folder: str | Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Reads a LLaDA-format folder into a bidirectional `LlamaForCausalLM`.

    Args:
        folder: with config.json and model.safetensors.
        dtype: of the loaded weights.

    Raises:
        FileNotFoundError: if one of the two files is absent.
        ValueError: if a weight is missing, left over, or of another shape; names the keys.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: expected a backbone in LLaDA's format")
    config = llama_config(json.loads((folder / "config.json").read_text()))
    model: Any = LlamaForCausalLM(config)
    weights = load_file(str(folder / "model.safetensors"))
    renamed = {to_llama_name(name): value.to(dtype) for name, value in weights.items()}
    expected = model.state_dict()
    wrong = sorted(expected.keys() ^ renamed.keys())
    wrong += [k for k in expected.keys() & renamed.keys() if expected[k].shape != renamed[k].shape]
    if wrong:
        raise ValueError(f"{folder / 'model.safetensors'}: missing, left-over or misshapen weights: {wrong}")
    model.load_state_dict(renamed)
    model.to(dtype)
    return make_bidirectional(model)
