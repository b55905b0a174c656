"""Tiny causal language models with real tokenizers and random weights, and adapters for them, as folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PARITY = Path(__file__).resolve().parent / "parity"
KINDS = ("llama", "llama-tied", "qwen2", "qwen2-tied")
CROSSED = (
    "llama",
    "qwen2-tied",
)  # each family and each head once, for what differs by the version of transformers alone
EACH_KIND = [pytest.param(kind, marks=() if kind in CROSSED else pytest.mark.once) for kind in KINDS]
# The parity tokenizers have Llama-3's and Qwen's rules and chat templates.
TOKENIZERS = {"llama": PARITY / "backbones" / "tiny-llada", "qwen2": PARITY / "backbones" / "tiny-dream"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = [
    "what causes the seasons on earth",
    "The tilt of the axis, 23.4 degrees.",
    "",
    "   ",
    "a",
    "package manager for Debian systems with dependency resolution and signed archives",
    'He said "stop" <|eot_id|><|im_end|><|endoftext|> and went on',
    "naïve café 😀 日本語",
    "word " * 60,
    "the of and",
    "search engines rank documents",
    "wooden table leg",
]


def tokenizer_of(kind: str) -> Any:
    """Return a kind's tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(TOKENIZERS[kind.split("-")[0]])


def quoting_ids(kind: str, vocab_size: int) -> list[int]:
    """Return the ids that end an answer, one by one, by the tokenizer's own decoding."""
    tokenizer = tokenizer_of(kind)
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return [
        token
        for token in range(vocab_size)
        if token >= len(tokenizer) or tokenizer.decode([token]) in special or '"' in tokenizer.decode([token])
    ]


def make_backbone(kind: str, folder: Path, seed: int = 0, stops: float = 1.45, **config: Any) -> Path:
    """Write a random causal language model with its tokenizer.

    Args:
        kind: one of KINDS.
        folder: to be made.
        seed: of the weights.
        stops: factor of the head's rows of quotes and special tokens, so that answers end after few words.
        config: fields of the model's config.
    """
    family, tied = kind.split("-")[0], kind.endswith("-tied")
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 2032,  # more than the tokenizer has, as real backbones
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
        "rope_theta": 5000.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model_class: Any = LlamaForCausalLM if family == "llama" else Qwen2ForCausalLM
    config_class: Any = LlamaConfig if family == "llama" else Qwen2Config
    model = model_class(config_class(**{**fields, **config})).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.3)
        model.lm_head.weight[quoting_ids(kind, model.config.vocab_size)] *= stops
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TOKENIZERS[family] / file, folder / file)
    return folder


def make_adapter(backbone: Path, folder: Path, head: bool = False, seed: int = 1, **config: Any) -> Path:
    """Write a random LoRA adapter as peft saves it, of the seven projections and perhaps the head."""
    torch.manual_seed(seed)
    targets = [*PROJECTIONS, *["lm_head"] * head]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(language_model(backbone), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def language_model(backbone: Path) -> Any:
    """Load a backbone with transformers alone."""
    kind = json.loads((backbone / "config.json").read_text())["model_type"]
    model_class: Any = LlamaForCausalLM if kind == "llama" else Qwen2ForCausalLM
    return model_class.from_pretrained(backbone).float().eval()


def with_peft(backbone: Path, adapter: Path) -> Any:
    """Load a backbone with an adapter beside it, with transformers and peft alone."""
    return peft.PeftModel.from_pretrained(language_model(backbone), str(adapter)).eval()
