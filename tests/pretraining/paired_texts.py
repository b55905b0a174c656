"""A made-up corpus of token ids, and a model for it."""

from __future__ import annotations

import random
from typing import Any

from diffretriever.pretraining.backbone import new_backbone
from diffretriever.pretraining.data import IdLists
from diffretriever.pretraining.formats import FORMATS
from diffretriever.training.recipe import Shape

VOCABULARY, MASK, BOS, EOS = 103, 100, 101, 102
SPECIAL = {"mask": MASK, "bos": BOS, "eos": EOS}


def tiny_model(kind: str = "llada", heads: int = 3) -> Any:
    shape = Shape(VOCABULARY, d_model=48, n_layers=2, n_heads=heads, mlp_hidden_size=64, max_sequence_length=128)
    return new_backbone(FORMATS[kind], FORMATS[kind].new_config(shape, SPECIAL), seed=1)


def paired_texts(count: int, seed: int) -> IdLists:
    """Texts in which token 2n is always followed by token 2n + 1: a masked one can be told from its neighbours."""
    numbers = random.Random(seed)
    rows = [[2 * n + half for n in numbers.choices(range(50), k=8) for half in (0, 1)] for _ in range(count)]
    return IdLists(rows)
