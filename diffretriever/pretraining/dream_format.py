"""Dream's on-disk format: config.json, tokenizer; its parameters keep the names of transformers' Qwen2.

Dream is `Qwen2Model` without the causal mask (q, k and v have biases). It began as an autoregressive model and still
predicts a token from the state one position before it.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

from .backbone_format import BackboneFormat, rope_theta
from .tokenizer import ROLES, TokenizerForm, prompt_spelling

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "eos_token_id",
    "pad_token_id",
)

# ChatML, as Qwen2's repositories write it.
CHAT_TEMPLATE = """\
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

TOKENIZER = TokenizerForm(
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
    mask="<|mask|>",
    bos="<|beginoftext|>",
    eos="<|endoftext|>",
    end_of_turn="<|im_end|>",
    named={
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
    },
    chat_template=CHAT_TEMPLATE,
    turn_start="{role}\n",
    turn_break="\n",
    spelling=(
        *((f"<|im_start|> {role}\n", f"<|im_start|>{role}\n") for role in ROLES),
        ("<|im_end|> \n", "<|im_end|>\n"),
        *prompt_spelling("<|im_start|>user\n", "<|im_start|>assistant\n"),
    ),
)


def dream_config(config: Qwen2Config, special_ids: dict[str, int]) -> dict[str, Any]:
    """Returns Dream's config.json for a Qwen2 of the same shape.

    Args:
        config: the Qwen2's configuration; every size is read from it.
        special_ids: ids of "mask" (`<|mask|>`) and "eos" (`<|endoftext|>`, which also pads and begins).
    """
    return {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "bos_token_id": special_ids["eos"],
        "eos_token_id": special_ids["eos"],
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "mask_token_id": special_ids["mask"],
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": 28,
        "model_type": "Dream",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": special_ids["eos"],
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": rope_theta(config),
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def generation_config(special_ids: dict[str, int]) -> dict[str, Any]:
    """Returns Dream's generation_config.json."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), special_ids["eos"])
    return {"_from_model_config": True, **ids, "transformers_version": "4.46.2"}


DREAM = BackboneFormat(
    title="Dream's",
    config_class=Qwen2Config,
    model_class=Qwen2ForCausalLM,
    tokenizer=TOKENIZER,
    rope_theta=1_000_000.0,
    rms_norm_eps=1e-6,
    shift=1,
    sizes={name: name for name in SIZES},
    original_config=dream_config,
    generation_config=generation_config,
    to_original=str,
    from_original=str,
)
