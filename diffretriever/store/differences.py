"""In what two models or stores differ, as a message says it: the field and its two values, no hashes or whole texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

SHA256 = re.compile("[0-9a-f]{64}")
# Settings that say how vectors are kept or asked for; all others, and these options, say which model made them.
NOT_THE_MODEL = ("side", "dtype", "sparse_top_k", "options")
MODEL_OPTIONS = ("options.normalize", "options.num_denoise_steps")
METHOD = "model_parts.method"
# What follows from another setting, which alone is named where both differ.
FOLLOWS = {"text_tokens": "max_length", "chat_template": "prompts", "num_masks": "num_masks"}
MOST_NAMED = 3  # differences in a message
EXCERPT = 32  # characters of a long text


def differing_fields(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[Any]:
    """Yield (name in dotted form, value in `mine`, value in `theirs`) of what differs; None is what is not there.

    >>> list(differing_fields({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}))
    [('b.c', 2, 3)]
    """
    for name in {**mine, **theirs}:
        here, there = mine.get(name), theirs.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from differing_fields(here, there, f"{prefix}{name}.")
        elif here != there:
            yield f"{prefix}{name}", here, there


def tell_difference(name: str, mine: Any, theirs: Any) -> str:
    """Say in what a setting differs, without hashes or whole texts.

    >>> tell_difference("model_parts.adapter.lora_alpha", 64, 16)
    '`adapter.lora_alpha` 64, not 16'
    >>> tell_difference("weights_sha256", "a" * 64, "b" * 64)
    'other `weights`'
    """
    name = name.removeprefix("model_parts.").removesuffix("sha256").rstrip("._")
    if all(isinstance(value, str) and SHA256.fullmatch(value) for value in (mine, theirs)):
        return f"other `{name}`"
    if isinstance(mine, str) and isinstance(theirs, str) and max(len(mine), len(theirs)) > EXCERPT:
        same = next((place for place, pair in enumerate(zip(mine, theirs, strict=False)) if len({*pair}) > 1), 0)
        start = max(0, same - EXCERPT // 4)
        mine, theirs = ("…" * (start > 0) + text[start : start + EXCERPT] for text in (mine, theirs))
    return f"`{name}` {_shown(mine)}, not {_shown(theirs)}"


def tell_apart(mine: Any, theirs: Any, differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Say in what a store with these settings differs from another, or from what a run would make.

    Args:
        mine: the store's `Settings`.
        theirs: the others.
        differences: some of `mine.differences(theirs)`.

    Returns:
        "made by model 'A', not 'B': …" or, where the model is the same, "made with other settings: …".

    >>> from types import SimpleNamespace
    >>> one, other = (SimpleNamespace(model=name, library_versions={}) for name in "AB")
    >>> tell_apart(one, other, {"model_parts.adapter.lora_alpha": (64, 16)})
    "made by model 'A', not 'B': `adapter.lora_alpha` 64, not 16"
    """
    if METHOD in differences:  # from which all else follows
        one, other = differences[METHOD]
        return f"made by method {one!r:.80} (model {mine.model!r:.200}), not by {other!r:.80} ({theirs.model!r:.200})"
    lead = "made with other settings"
    if any(name in MODEL_OPTIONS or name.partition(".")[0] not in NOT_THE_MODEL for name in differences):
        lead = f"made by model {mine.model!r:.200}, not {theirs.model!r:.200}"
        if mine.model == theirs.model:
            lead = f"made by model {mine.model!r:.200} as it is no longer"
    lines = [tell_difference(name, *values) for name, values in differences.items() if not _follows(name, differences)]
    more = f" and {len(lines) - MOST_NAMED} more" if len(lines) > MOST_NAMED else ""
    versions = [settings.library_versions.get("diffretriever") for settings in (mine, theirs)]
    code = any(name.startswith("model_parts.code") for name in differences)
    by = f" (it is of diffretriever {versions[0]}, this is {versions[1]})" if code else ""
    return f"{lead}: {', '.join(lines[:MOST_NAMED])}{more}{by}"


def _follows(name: str, differences: Mapping[str, Any]) -> bool:
    """Return whether a part of a model differs because another setting does."""
    cause = FOLLOWS.get(name.removeprefix("model_parts.").partition(".")[0])
    return name.startswith("model_parts.") and any(other.partition(".")[0] == cause for other in differences)


def _shown(value: Any) -> str:
    """Return a value as a message shows it: of what is long or a hash, that it is there."""
    if value is None:
        return "none"
    told = repr(value)
    return "one" if isinstance(value, Mapping) or SHA256.search(told) or len(told) > 2 * EXCERPT else told
