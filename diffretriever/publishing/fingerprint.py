"""Compare what a release encodes now with what it encoded when it was built."""

from __future__ import annotations

import base64
from typing import Any

from .probe import SPARSE_TERMS

# How far the vectors of one release may differ between machines, by dtype: 1 - cosine of a dense vector, and a sparse
# weight. The tiny releases differ by less than 1e-6 and 1e-4 between versions and attention kernels, by 3e-5 and 0.006
# in bfloat16; without their adapter by 0.02 and 0.48, without the head's part of it by 0 and 0.48.
TOLERANCES = {"float32": (1e-4, 0.02), "bfloat16": (5e-3, 0.1)}


def compare(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare two fingerprints of `probe.fingerprint`.

    Args:
        recorded: of the build, the strongest T sparse weights of each text.
        now: of the check, of at least 2T weights, so that an order that wavers at the cut does no harm.

    Returns:
        What differs, a sentence each; empty if nothing does.
    """
    dtype = recorded["dtype"]
    if dtype not in TOLERANCES:
        return [f"the recorded fingerprint's dtype is {dtype!r}; known are {', '.join(TOLERANCES)}"]
    if [entry["text"] for entry in recorded["texts"]] != [entry["text"] for entry in now["texts"]]:
        return ["the recorded fingerprint is of other texts; it was written by another version of publish.py"]
    found = []
    for number, (was, now_is) in enumerate(zip(recorded["texts"], now["texts"], strict=True)):
        where = f"{was['side']} {number} ({was['text']!r})"
        found += [f"{where}: {problem}" for problem in _compare_entry(was, now_is, *TOLERANCES[dtype])]
    return found


def _compare_entry(was: dict[str, Any], now: dict[str, Any], dense_limit: float, sparse_limit: float) -> list[str]:
    if was["token_ids"] != now["token_ids"]:
        return ["the tokenizer or the prompt gives other token ids than at build time"]
    if was["dense_shape"] != now["dense_shape"]:
        return [f"dense vectors [K, H] were {was['dense_shape']}, are {now['dense_shape']}"]
    found = []
    distance = max(1 - cosine for cosine in _cosines(was, now))
    if not distance <= dense_limit:  # not >, which lets NaN pass
        found.append(
            f"a dense vector has cosine {1 - distance:.5f} to the recorded one; at least {1 - dense_limit} wanted"
        )
    difference, token = _sparse_difference(was["sparse"], now["sparse"])
    if not difference <= sparse_limit:
        found.append(f"the sparse weight of token {token} is off by {difference:.3f}; at most {sparse_limit} allowed")
    return found


def dense_vectors(entry: dict[str, Any]) -> Any:
    """Return an entry's dense vectors, a float32 array [K, H]."""
    import numpy

    values = numpy.frombuffer(base64.b64decode(entry["dense_float16"]), dtype="<f2").astype("float32")
    return values.reshape(entry["dense_shape"])


def _cosines(was: dict[str, Any], now: dict[str, Any]) -> list[float]:
    import numpy

    one, other = dense_vectors(was), dense_vectors(now)
    norms = numpy.linalg.norm(one, axis=1) * numpy.linalg.norm(other, axis=1)
    return [float(cosine) for cosine in (one * other).sum(axis=1) / norms]


def _sparse_difference(was: list[list[Any]], now: list[list[Any]]) -> tuple[float, int]:
    """Return the largest difference of a weight and its token id; terms below the recorded cut do not count."""
    before, after = dict(map(tuple, was)), dict(map(tuple, now))
    cut = min(before.values(), default=0.0)
    differences = {token: abs(weight - after.get(token, 0.0)) for token, weight in before.items()}
    for token, weight in after.items():
        if token not in before:  # below the cut at build time; 0 where nothing was cut off
            differences[token] = weight - (cut if len(before) >= SPARSE_TERMS else 0.0)
    token = max(differences, key=lambda name: differences[name], default=-1)
    return differences.get(token, 0.0), token
