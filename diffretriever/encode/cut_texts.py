"""Whether texts are cut more often than those that a release was trained on."""

from __future__ import annotations

from typing import Any

MARGIN = 0.05  # the share in training is that of some hundred sampled texts


def cut_warning(model: Any, is_query: bool, cut: int, texts: int) -> str | None:
    """Return what to say of texts that are cut much more often than in training; None where there is nothing to say.

    Args:
        model: its config says how often texts were cut in training, where that is known.
        is_query: the side.
        cut: how many of the texts were cut.
        texts: how many there were.
    """
    side = "query" if is_query else "passage"
    trained = (getattr(model.config, "cut_in_training", None) or {}).get(side)
    if trained is None or not texts or cut / texts <= trained + MARGIN:
        return None
    plural = "queries" if is_query else "passages"
    return (
        f"{cut / texts:.0%} of {texts:,} {plural} are longer than {model.texts.layouts[is_query].room} tokens and are "
        f"cut; in its training {trained:.0%} were. What stands behind the cut is not found: split long texts, "
        "or train with longer ones."
    )
