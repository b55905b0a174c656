"""A small encoder that sentence-transformers loads: random vectors of words, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers


def save_encoder(folder: Path, words: Sequence[str], seed: int) -> Path:
    from sentence_transformers import SentenceTransformer

    newer = find_spec("sentence_transformers.sentence_transformer")  # where 6 has its modules
    modules: Any = import_module(f"{newer.name}.modules" if newer else "sentence_transformers.models")
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = torch.randn(len(vocabulary), 8, generator=torch.Generator().manual_seed(seed)).numpy()
    SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer, embedding_weights=vectors)]).save(str(folder))
    return folder
