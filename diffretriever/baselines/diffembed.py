"""DiffEmbed (Zhang et al. 2025, arXiv:2505.15045): the mean of the final states over a text without any prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..model.tokenization_helpers import FramedTokenizer, PreparedText, PromptLayout
from .baseline import Baseline, BaselineOutput, opening_ids
from .causal import final_states
from .configuration import BaselineConfig


class DiffEmbedTokenizer(FramedTokenizer):
    """The text alone, with whatever the tokenizer itself puts before it.

    Args:
        tokenizer: the backbone's.
        config: of the baseline.
    """

    def __init__(self, tokenizer: Any, config: BaselineConfig) -> None:
        super().__init__(tokenizer)
        opening = opening_ids(self)
        closing = [self.end_of_text_id] * config.append_end_of_text
        for is_query in (True, False):
            self.layouts[is_query] = PromptLayout(opening, closing, config.text_length(is_query), [], [])

    def prepare(self, texts: Sequence[str], is_query: bool, content_filter: bool = True) -> list[PreparedText]:
        """Return each text as the model reads it: one without any token as end-of-text."""
        prepared = super().prepare(texts, is_query, content_filter)
        return [text if text.sequence else text._replace(sequence=[self.end_of_text_id]) for text in prepared]


class DiffEmbed(Baseline):
    """Averages the states of all tokens: one dense vector, no sparse one.

    LLaDA and Dream are read bidirectionally, Llama and Qwen2 under their causal mask.
    """

    def _make_texts(self) -> DiffEmbedTokenizer:
        return DiffEmbedTokenizer(self.tokenizer, self.config)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, is_query: bool = False
    ) -> BaselineOutput:
        """Return `states` float32 [B, 1, H], with gradient; arguments as for every baseline."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # [B, L]
        if hasattr(self.backbone, "hidden_states"):  # a DiffRetriever
            states = self.backbone.hidden_states(input_ids, mask)  # [B, L, H]
        else:
            states = final_states(self.backbone, input_ids, mask)
        return BaselineOutput(states=mean_states(states, mask))

    def _save_backbone(self, folder: Path) -> None:
        if hasattr(self.backbone, "hidden_states"):
            self.backbone.save_pretrained(folder)
        else:
            super()._save_backbone(folder)


def mean_states(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of each text's states, float32 [B, 1, H], with gradient.

    Args:
        states: [B, L, H].
        mask: [B, L], 1 for real tokens.
    """
    weights = mask.to(states.device)[..., None].float()  # [B, L, 1]
    mean = (states.float() * weights).sum(dim=1) / weights.sum(dim=1)  # [B, H]
    return mean[:, None]
