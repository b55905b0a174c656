"""Lucene/Anserini impact vectors of a store's sparse vectors. (TREC runs: `evaluation.runs.write_run`.)"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files.durable import write_whole
from ..store.manifest import Settings
from ..store.model_parts import tokenizer_hashes
from .sparse import sparse_of, sum_by_term

MOST = 2**31 - 1  # Lucene's largest impact
QUANTISATION = 100.0  # an impact is the weight times this, rounded, as PromptReps and SPLADE exports do


def impact_lines(
    store: Any, tokens: Sequence[str] | None = None, factor: float = QUANTISATION, contents: bool = True
) -> Iterator[str]:
    """Yield a JSON line {"id", "contents", "vector": {token: impact}} a text, as Anserini's JsonVectorCollection reads.

    Args:
        store: passages or queries with sparse vectors.
        tokens: the vocabulary by token id; None writes the ids as decimal numbers.
        factor: impacts are whole numbers, the weight times this, rounded; those that round to 0 are left out.
        contents: also write the texts, where the store holds them.

    Raises:
        ValueError: no sparse vectors, a token id outside the vocabulary, or weights that are not finite and positive.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"the factor must be positive and finite, got {factor}.")
    for shard in store.shards():
        indices, values = sparse_of(shard)
        for row, text_id in enumerate(shard.ids):
            vector = _impacts(indices[row], values[row], tokens, factor, text_id)
            text = shard.text(row) if contents else None
            yield json.dumps({"id": text_id, "contents": text or "", "vector": vector}, ensure_ascii=False)


def _impacts(
    indices: torch.Tensor, values: torch.Tensor, tokens: Sequence[str] | None, factor: float, text_id: str
) -> dict[str, int]:
    impacts: dict[str, int] = {}
    for term, weight in sum_by_term(indices, values.float()).items():
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"{text_id!r}: the weight of token {term} is {weight}; it must be positive and finite.")
        if tokens is not None and not 0 <= term < len(tokens):
            raise ValueError(f"{text_id!r}: token {term} lies outside the vocabulary of {len(tokens)} tokens.")
        if weight * factor > MOST:
            raise ValueError(
                f"{text_id!r:.80}: the impact of token {term} is {weight * factor:g}, more than Lucene's {MOST}; give "
                "a smaller factor."
            )
        impact = round(weight * factor)
        if impact:
            impacts[str(term) if tokens is None else tokens[term]] = impact
    return impacts


def vocabulary_of(tokenizer: Any, settings: Settings) -> list[str]:
    """Return a tokenizer's tokens by id; ids without one get their number in angle brackets.

    Args:
        tokenizer: of the model that encoded a store.
        settings: of the store. Its vectors may have weights for ids up to its vocabulary, which tokenizers do not fill.

    Raises:
        ValueError: the tokenizer is another.
    """
    there = settings.model_parts.get("tokenizer")
    if isinstance(there, dict) and there.get("model") != tokenizer_hashes(tokenizer)["model"]:
        raise ValueError(
            "--model has another tokenizer than the model that encoded the store, whose tokens it would name wrongly; "
            f"give that ({settings.model!r:.200}), or leave it out for the tokens' numbers."
        )
    names: Mapping[str, int] = tokenizer.get_vocab()
    tokens = [f"<{number}>" for number in range(max(settings.vocab_size, max(names.values()) + 1))]
    for token, number in names.items():
        tokens[number] = token
    return tokens


def write_lines(path: str | Path, lines: Iterator[str]) -> int:
    """Write lines to a file, whole or not at all; return how many."""
    count = 0

    def encoded() -> Iterator[bytes]:
        nonlocal count
        for line in lines:
            count += 1
            yield line.encode("utf-8") + b"\n"

    write_whole(Path(path), encoded())
    return count
