"""RepLLaMA (Ma et al. 2024, arXiv:2310.08319): the last token's state of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..model.tokenization_helpers import FramedTokenizer, PreparedText, PromptLayout
from .baseline import Baseline, BaselineOutput, opening_ids
from .causal import final_states
from .configuration import BaselineConfig


class RepLLaMATokenizer(FramedTokenizer):
    """`query: ` or `passage: ` and the text as one string, and an end-of-text token behind it.

    Args:
        tokenizer: the backbone's.
        config: of the baseline. A side's length counts all, as in the method's code: prefix and end-of-text, too.

    Raises:
        ValueError: a length that leaves no room for text.
    """

    def __init__(self, tokenizer: Any, config: BaselineConfig) -> None:
        super().__init__(tokenizer)
        opening = opening_ids(self)
        self._leads: dict[bool, str] = {}
        for is_query, side in ((True, "query"), (False, "passage")):
            self._leads[is_query] = config.prompt(is_query)["user"].removesuffix("{text}")
            taken = len(opening) + len(self._plain_ids(self._leads[is_query])) + 1
            if config.text_length(is_query) <= taken:
                raise ValueError(
                    f"field `{side}_length` is {config.text_length(is_query)}, but what RepLLaMA puts around a {side} "
                    f"alone takes {taken} tokens; set it to at least {taken + 1}."
                )
            room = config.text_length(is_query) - len(opening) - 1
            self.layouts[is_query] = PromptLayout(opening, [self.end_of_text_id], room, [], [])

    def prepare(self, texts: Sequence[str], is_query: bool, content_filter: bool = True) -> list[PreparedText]:
        """Return each text as the model reads it; its own ids begin with the prefix."""
        return super().prepare([self._leads[is_query] + text for text in texts], is_query, content_filter)


class RepLLaMA(Baseline):
    """Reads the state at the appended end-of-text token: one dense vector, no sparse one."""

    def _make_texts(self) -> RepLLaMATokenizer:
        return RepLLaMATokenizer(self.tokenizer, self.config)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, is_query: bool = False
    ) -> BaselineOutput:
        """Return `states` [B, 1, H], with gradient; arguments as for every baseline."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return BaselineOutput(states=final_states(self.backbone, input_ids, mask)[:, -1:])
