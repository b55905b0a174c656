"""LLaDA's and Dream's original on-disk formats, as small backbones are written in them; the model's code reads them.

What the reading code knows (`backbone_loading`: names of weights, fields of sizes) is taken from there. Here is what
only a writer needs: the rest of config.json, generation_config.json and the tokenizer's form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ..files.durable import write_json, write_whole
from ..model.backbone_loading import load_tokenizer, original_name
from ..model.checked_files import CONFIG_FIELDS, WEIGHTS_FILE
from ..model.configuration_diffretriever import ROLES
from ..model.tokenization_helpers import find_mask_id
from ..training.denoising import SHIFTS
from .recipe import Shape
from .tokenizer import TokenizerForm, prompt_spelling


@dataclass(frozen=True)
class BackboneFormat:
    """One original format.

    Args:
        tokenizer: its special tokens, chat template and spelling.
        shift: a token is predicted from the state so many positions before it.
        rope_theta, rms_norm_eps: where a recipe's shape leaves them open.
        config: what every config.json says, besides sizes and ids.
        config_ids: fields of config.json that hold the id of the token "mask", "bos" or "eos".
        generation: what every generation_config.json says, besides ids.
        generation_ids: as `config_ids`.
    """

    tokenizer: TokenizerForm
    shift: int
    rope_theta: float
    rms_norm_eps: float
    config: Mapping[str, Any]
    config_ids: Mapping[str, str]
    generation: Mapping[str, Any]
    generation_ids: Mapping[str, str]


def write_description(kind: str, shape: Shape, folder: Path) -> None:
    """Write a backbone's config.json and generation_config.json beside its tokenizer; config.json comes last.

    Args:
        kind: "llada" or "dream".
        shape: sizes; every head has keys and values of its own.
        folder: holds the tokenizer's files.
    """
    made, tokenizer = FORMATS[kind], load_tokenizer([folder])
    ids = {"mask": find_mask_id(tokenizer), "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.mlp_hidden_size,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_heads,
        "max_position_embeddings": shape.max_sequence_length,
        "rms_norm_eps": made.rms_norm_eps if shape.rms_norm_eps is None else shape.rms_norm_eps,
        "rope_theta": made.rope_theta if shape.rope_theta is None else shape.rope_theta,
    }
    config = {**made.config, "vocab_size": shape.vocab_size}
    config |= {theirs: sizes[ours] for ours, theirs in CONFIG_FIELDS[kind].items()}
    config |= {field: ids[token] for field, token in made.config_ids.items()}
    generation = {**made.generation, **{field: ids[token] for field, token in made.generation_ids.items()}}
    write_json(folder / "generation_config.json", dict(sorted(generation.items())))
    write_json(folder / "config.json", dict(sorted(config.items())))


def write_weights(model: nn.Module, kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model's weights under the format's names, in one step: an interruption leaves the previous file.

    Args:
        model: a DiffRetriever.
        kind: "llada" or "dream".
        folder: the backbone's.
        dtype: of the stored weights.
    """
    state = model.state_dict().items()
    weights = {original_name(kind, name): value.detach().to(dtype).contiguous() for name, value in state}
    write_whole(folder / WEIGHTS_FILE, [save(weights, metadata={"format": "pt"})])


LLADA_CHAT = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

LLADA_TOKENIZER = TokenizerForm(
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
    chat_template=LLADA_CHAT,
    spelling=(
        *(
            (f"<|start_header_id|> {role}<|end_header_id|> \n\n", f"<|start_header_id|>{role}<|end_header_id|>\n\n")
            for role in ROLES
        ),
        *prompt_spelling("<|end_header_id|>\n\n", "<|end_header_id|>\n\n"),
    ),
)

LLADA = BackboneFormat(
    tokenizer=LLADA_TOKENIZER,
    shift=SHIFTS.get("llada", 0),
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
    config={
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
        "embedding_dropout": 0.0,
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
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "weight_tying": False,
    },
    config_ids={"eos_token_id": "eos", "mask_token_id": "mask", "pad_token_id": "eos"},
    generation={"_from_model_config": True, "transformers_version": "4.38.2"},
    generation_ids={"bos_token_id": "bos", "eos_token_id": "eos"},
)

# ChatML, as Qwen2's repositories write it.
DREAM_CHAT = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or \
(message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

DREAM_TOKENIZER = TokenizerForm(
    special_tokens=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|vision_pad|>",
        "<|beginoftext|>",
        "<|mask|>",
    ),
    named={
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
    },
    chat_template=DREAM_CHAT,
    spelling=(
        *((f"<|im_start|> {role}\n", f"<|im_start|>{role}\n") for role in ROLES),
        ("<|im_end|> \n", "<|im_end|>\n"),
        *prompt_spelling("<|im_start|>user\n", "<|im_start|>assistant\n"),
    ),
)

DREAM = BackboneFormat(
    tokenizer=DREAM_TOKENIZER,
    shift=SHIFTS["dream"],  # it began as an autoregressive model
    rope_theta=1_000_000.0,
    rms_norm_eps=1e-6,
    config={
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 28,
        "model_type": "Dream",
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
    },
    config_ids={"bos_token_id": "eos", "eos_token_id": "eos", "mask_token_id": "mask", "pad_token_id": "eos"},
    generation={"_from_model_config": True, "transformers_version": "4.46.2"},
    generation_ids={"bos_token_id": "eos", "eos_token_id": "eos", "pad_token_id": "eos"},
)

FORMATS: dict[str, BackboneFormat] = {"llada": LLADA, "dream": DREAM}
