"""Whether texts are cut more often than those that a release was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MARGIN = 0.05  # the share in training is that of some hundred sampled texts


@dataclass(frozen=True)
class TrainedCut:
    """How often the training of a model cut the texts of one side.

    Args:
        is_query: the side.
        share: of its texts that were cut.
        room: tokens of text that the model reads.
    """

    is_query: bool
    share: float
    room: int

    @classmethod
    def of(cls, model: Any, is_query: bool) -> TrainedCut | None:
        """Return what a model's config says of it; None where it says nothing."""
        share = (getattr(model.config, "cut_in_training", None) or {}).get("query" if is_query else "passage")
        return None if share is None else cls(is_query, share, model.texts.layouts[is_query].room)

    def warning(self, cut: int, texts: int) -> str | None:
        """Return what to say of texts that are cut much more often than in training; None for nothing.

        Args:
            cut: how many of the texts were cut.
            texts: how many there were.
        """
        if not texts or cut / texts <= self.share + MARGIN:
            return None
        return (
            f"{cut / texts:.0%} of {texts:,} {'queries' if self.is_query else 'passages'} are longer than {self.room} "
            f"tokens and are cut; in its training {self.share:.0%} were. What stands behind the cut is not found: "
            "split long texts, or train with longer ones."
        )
