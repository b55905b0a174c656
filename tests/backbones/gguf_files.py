"""A tiny Llama written as a GGUF file by the package gguf, as llama.cpp's converter lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 288}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    heads |= {"rope_theta": 1e5, "rms_norm_eps": 1e-5}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
    return model.eval()


def tokens_and_merges() -> tuple[list[str], list[str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat in the sun and then it ran to the sea " * 3] * 9, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(merge) for merge in merges]


def write_gguf(path: Path, model: LlamaForCausalLM, kind: str = "F32", **changes: Any) -> Path:
    """Write a model; `changes` to its fields, where None leaves one out and a "/" stands for a dot."""
    config = model.config
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    tokens, merges = tokens_and_merges()
    fields: dict[str, Any] = {
        "llama.vocab_size": 288,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.context_length": config.max_position_embeddings,
        "llama.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    tensors = changes.pop("tensors", {})
    fields |= {name.replace("/", "."): value for name, value in changes.items()}
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for name, weight in gguf_weights(model).items():
        content = tensors.get(name, weight)
        if content is None:
            continue
        quantised = getattr(gguf.GGMLQuantizationType, kind if content.ndim == 2 else "F32")
        writer.add_tensor(name, gguf.quantize(content, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_weights(model: LlamaForCausalLM) -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights under llama.cpp's names, the rows of q and k in its order."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    found = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    if not model.config.tie_word_embeddings:
        found["output.weight"] = model.lm_head.weight
    for layer, block in enumerate(model.model.layers):
        for name, weight in block.named_parameters():
            part = name.split(".")[-2]
            if part in heads:  # llama.cpp's convert: the two halves of a head become its pairs
                rows, columns = weight.shape
                weight = weight.reshape(heads[part], 2, rows // heads[part] // 2, columns).transpose(1, 2)
                weight = weight.reshape(rows, columns)
            found[f"blk.{layer}.{PARTS[part]}.weight"] = weight
    return {name: weight.detach().float().contiguous().numpy() for name, weight in found.items()}
