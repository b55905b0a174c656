"""A made-up corpus of token ids, and a model for it."""

from __future__ import annotations

import random
from typing import Any

from diffretriever.training.backbone import new_backbone
from diffretriever.training.data import IdLists
from diffretriever.training.llada_format import llama_config

VOCABULARY, MASK, BOS, EOS = 103, 100, 101, 102
SPECIAL = {"mask": MASK, "bos": BOS, "eos": EOS}


def tiny_model(heads: int = 3) -> Any:
    sizes = {"d_model": 48, "mlp_hidden_size": 64, "n_heads": heads, "n_kv_heads": heads, "n_layers": 2}
    sizes |= {"embedding_size": VOCABULARY, "max_sequence_length": 128, "eos_token_id": EOS, "pad_token_id": EOS}
    return new_backbone(llama_config({**sizes, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}), seed=1)


def paired_texts(count: int, seed: int) -> IdLists:
    """Texts in which token 2n is always followed by token 2n + 1: a masked one can be told from its neighbours."""
    numbers = random.Random(seed)
    rows = [[2 * n + half for n in numbers.choices(range(50), k=8) for half in (0, 1)] for _ in range(count)]
    return IdLists(rows)
