"""What a fresh process does with a built release: load it as a user does, encode fixed texts, run its card's code.

This file runs on its own (`python -c`), so that nothing of this project but the release itself can be imported by
mistake. It imports no other file of the package.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

# Fixed for good: fingerprints of different releases and times are of the same texts.
QUERIES = ["what causes the seasons on earth?", "Audio player that can stream Ogg Vorbis"]
PASSAGES = [
    "The tilt of Earth's axis relative to its orbital plane drives the seasons.",
    "Plays MP3, Ogg Vorbis and FLAC files from a collection, and internet radio stations.",
]
SPARSE_TERMS = 32  # recorded for each text


def load(folder: str, dtype: str, device: str, **options: Any) -> Any:
    """Load a release through AutoModel.

    Args:
        folder: the release.
        dtype: name of a torch dtype, such as "float32".
        device: where to put the model, such as "cpu" or "cuda".
        options: more arguments for `from_pretrained`.
    """
    import torch
    import transformers

    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options[name] = getattr(torch, dtype)
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **options).to(device)


def fingerprint(model: Any, dtype: str, terms: int = SPARSE_TERMS) -> dict[str, Any]:
    """Encode the fixed texts.

    Args:
        model: a loaded release.
        dtype: its dtype's name, to record.
        terms: how many sparse weights of each text to keep.

    Returns:
        {"dtype", "texts": one entry a text}; an entry holds the text, its side, its token ids, its dense vectors
        [K, H] as base64 of little-endian float16, their shape, and its sparse weights as [[token id, weight], ...].
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: two builds on one machine record the same bytes
    try:
        sides = [("query", text) for text in QUERIES] + [("passage", text) for text in PASSAGES]
        entries = [_entry(model, text, side, terms) for side, text in sides]
    finally:
        torch.set_num_threads(threads)
    return {"dtype": dtype, "texts": entries}


def _entry(model: Any, text: str, side: str, terms: int) -> dict[str, Any]:
    is_query = side == "query"
    ids, mask = model.tokenize([text], is_query=is_query)  # int64 [1, L]
    out = model.encode(ids.to(model.device), mask.to(model.device), is_query, compute_sparse=True, sparse_top_k=terms)
    exists = out.get("repr_mask")  # of a query whose release chooses K_q for each
    dense = (out["repr_hidden"][0] if exists is None else out["repr_hidden"][0][exists[0]]).cpu()  # float32 [K, H]
    weights = zip(out["sparse_indices"][0].tolist(), out["sparse_values"][0].tolist(), strict=True)
    return {
        "side": side,
        "text": text,
        "token_ids": ids[0].tolist(),
        "dense_shape": list(dense.shape),
        "dense_float16": base64.b64encode(dense.numpy().astype("<f2").tobytes()).decode(),
        "sparse": [[token, round(weight, 4)] for token, weight in weights if weight > 0],
    }


def run_blocks(blocks: list[str], names: list[str]) -> Iterator[dict[str, Any]]:
    """Run code blocks one after another, as in a notebook: a block sees the names of those before it.

    Args:
        blocks: Python sources.
        names: what to call each in tracebacks.

    Yields:
        For each block {"name", "printed", "missing", "error"}: what it printed, and where an import failed the
        package it wanted and the error's words; both None otherwise. Any other error ends the process.
    """
    scope: dict[str, Any] = {"__name__": "__main__"}
    for number, (block, name) in enumerate(zip(blocks, names, strict=True)):
        printed, error, missing = io.StringIO(), None, None
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(block, name, "exec"), scope)
            except ImportError as caught:  # an optional package is absent, or too old to have the class
                error, missing = str(caught), (caught.name or "?").split(".")[0]
        yield {"name": name, "printed": printed.getvalue(), "missing": missing, "error": error}
        rest = "\n".join(blocks[number + 1 :])  # an 8B model is not kept beside the next one without need
        for done in [done for done in scope if not done.startswith("__") and not re.search(rf"\b{done}\b", rest)]:
            del scope[done]
        gc.collect()


def main() -> None:
    """Read the order, a JSON object, from stdin; write the answers to the file it names, a JSON object a line."""
    order = json.load(sys.stdin)
    with open(order["answers"], "w", encoding="utf-8") as file:
        if order["dtype"] is not None:
            model = load(order["folder"], order["dtype"], order["device"])
            print(json.dumps(fingerprint(model, order["dtype"], 2 * SPARSE_TERMS)), file=file, flush=True)
            del model
        for result in run_blocks(order["blocks"], order["names"]):
            print(json.dumps(result), file=file, flush=True)


if __name__ == "__main__":
    main()
