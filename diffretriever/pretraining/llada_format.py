"""LLaDA's on-disk format: config.json, tokenizer, original parameter names, and the way back into transformers' Llama.

LLaDA is `LlamaModel` without the causal mask; its parameters map one to one (only the names differ).
"""

from __future__ import annotations

import re
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from .backbone_format import BackboneFormat, rope_theta
from .tokenizer import ROLES, TokenizerForm, prompt_spelling

# transformers' field of a size -> LLaDA's.
SIZES = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "n_layers",
    "vocab_size": "embedding_size",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

TOKENIZER = TokenizerForm(
    special_tokens=(
        "<|startoftext|>",
        "<|endoftext|>",
        "[CLS]",
        "[gMASK]",
        "<|reserved_token_0|>",
        "<|reserved_token_1|>",
        "<|mdm_mask|>",
        "<role>",
        "</role>",
        "<|arithmetic_start|>",
        "<|arithmetic_end|>",
        "<|number_start|>",
        "<|number_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    mask="<|mdm_mask|>",
    bos="<|startoftext|>",
    eos="<|endoftext|>",
    end_of_turn="<|eot_id|>",
    named={
        "additional_special_tokens": [
            "<role>",
            "</role>",
            "<|arithmetic_start|>",
            "<|arithmetic_end|>",
            "<|number_start|>",
            "<|number_end|>",
        ],
        "bos_token": "<|startoftext|>",
        "cls_token": "[CLS]",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    },
    chat_template=CHAT_TEMPLATE,
    turn_start="\n\n",
    turn_break="\n\n",
    spelling=(
        *(
            (f"<|start_header_id|> {role}<|end_header_id|> \n\n", f"<|start_header_id|>{role}<|end_header_id|>\n\n")
            for role in ROLES
        ),
        *prompt_spelling("<|end_header_id|>\n\n", "<|end_header_id|>\n\n"),
    ),
)

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


def llada_config(config: LlamaConfig, special_ids: dict[str, int]) -> dict[str, Any]:
    """Returns LLaDA's config.json for a Llama of the same shape.

    Args:
        config: the Llama's configuration; every size is read from it.
        special_ids: ids of "mask" (`<|mdm_mask|>`) and "eos" (`<|endoftext|>`, which also pads).
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
        "eos_token_id": special_ids["eos"],
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
        "mask_token_id": special_ids["mask"],
        "max_sequence_length": config.max_position_embeddings,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "pad_token_id": special_ids["eos"],
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


def generation_config(special_ids: dict[str, int]) -> dict[str, Any]:
    """Returns LLaDA's generation_config.json."""
    ids = {"bos_token_id": special_ids["bos"], "eos_token_id": special_ids["eos"]}
    return {"_from_model_config": True, **ids, "transformers_version": "4.38.2"}


LLADA = BackboneFormat(
    title="LLaDA's",
    config_class=LlamaConfig,
    model_class=LlamaForCausalLM,
    tokenizer=TOKENIZER,
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
    shift=0,
    sizes=SIZES,
    original_config=llada_config,
    generation_config=generation_config,
    to_original=to_llada_name,
    from_original=to_llama_name,
)
