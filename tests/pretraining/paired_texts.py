"""A made-up corpus of token ids, and a model for it."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from diffretriever.pretraining.backbone import new_backbone
from diffretriever.pretraining.corpus import IdLists
from diffretriever.pretraining.formats import FORMATS, write_description
from diffretriever.pretraining.recipe import Shape
from diffretriever.pretraining.tokenizer import save_tokenizer

WORDS = [f"w{number}" for number in range(100)]
MASK, BOS, EOS = 100, 101, 102
SPECIAL = {
    "llada": ("<|mdm_mask|>", "<|startoftext|>", "<|endoftext|>", "<|eot_id|>"),
    "dream": ("<|mask|>", "<|beginoftext|>", "<|endoftext|>", "<|im_end|>"),
}


@lru_cache
def tiny_folder(kind: str) -> Path:
    """Config and tokenizer of a backbone whose words are the hundred of WORDS."""
    folder, special = Path(tempfile.mkdtemp()), SPECIAL[kind]
    vocabulary = {word: number for number, word in enumerate([*WORDS, *special, "unknown"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    form = FORMATS[kind].tokenizer
    named = {role: form.named[role] for role in ("bos_token", "eos_token", "pad_token")}
    save_tokenizer(dataclasses.replace(form, special_tokens=special, named=named), tokenizer, folder)
    shape = Shape(len(vocabulary), d_model=48, n_layers=2, n_heads=3, mlp_hidden_size=64, max_sequence_length=128)
    write_description(kind, shape, folder)
    return folder


def tiny_model(kind: str = "llada") -> Any:
    return new_backbone(tiny_folder(kind), seed=1)


def paired_texts(count: int, seed: int) -> IdLists:
    """Texts in which token 2n is always followed by token 2n + 1: a masked one can be told from its neighbours."""
    numbers = random.Random(seed)
    rows = [[2 * n + half for n in numbers.choices(range(50), k=8) for half in (0, 1)] for _ in range(count)]
    return IdLists(rows)
