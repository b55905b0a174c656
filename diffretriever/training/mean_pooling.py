"""The DiffEmbed baseline (paper §4.2) on the backbone that is trained: mean-pooled, without prompt and masks."""

from __future__ import annotations

from typing import Any

from ..baselines.configuration import BaselineConfig
from ..baselines.diffembed import DiffEmbed

MEAN_NAMES = {"dense": "single_dense"}  # what `SmallTask` evaluates of such vectors


def as_diffembed(model: Any) -> DiffEmbed:
    """Return a DiffRetriever as DiffEmbed reads it: bare texts, the mean of their states and of an end-of-text's.

    Args:
        model: a DiffRetriever, perhaps with an adapter that `pooling: mean` has trained. Texts are cut where its
            retrieval prompts would leave no more room, so that both see the same.
    """
    lengths = {f"{side}_length": model.texts.layouts[side == "query"].room for side in ("query", "passage")}
    config = BaselineConfig("diffembed", str(model.config.name_or_path), append_end_of_text=True, **lengths)
    return DiffEmbed(config, model, model.tokenizer)
