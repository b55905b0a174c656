"""PromptReps (Zhuang et al. 2024, arXiv:2404.18424): a causal language model says a text in words, one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from ..model.batching import in_eval_mode
from ..model.chat_template import render_prompt
from ..model.tokenization_helpers import FramedTokenizer, PromptLayout
from .baseline import Baseline, BaselineOutput
from .causal import final_states, position_ids
from .configuration import BaselineConfig


class PromptRepsTokenizer(FramedTokenizer):
    """The retrieval prompt around a text (paper Table 1), up to the opening quote of the assistant's answer.

    The chat template is cut at the text; what follows the text, the opening words included, is tokenised as one string.

    Args:
        tokenizer: the backbone's, with a chat template.
        config: of the baseline.

    Raises:
        ValueError: no chat template, or one that does not show the text once.
    """

    def __init__(self, tokenizer: Any, config: BaselineConfig) -> None:
        super().__init__(tokenizer)
        for is_query in (True, False):
            prefix, suffix = self._prompt_ids(render_prompt(tokenizer, config.prompt(is_query)))
            self.layouts[is_query] = PromptLayout(prefix, suffix, config.text_length(is_query), [], [])

    def stopping_tokens(self, vocab_size: int) -> torch.Tensor:
        """Return which tokens end the answer, bool [V]: special ones, and all that hold a quote, such as `".`."""
        special = set(self.tokenizer.all_special_ids)
        ids = range(vocab_size)
        texts = self._plain.decode_batch([[token] for token in ids], skip_special_tokens=False)
        return torch.tensor(
            [
                token in special or '"' in text or self._plain.id_to_token(token) is None
                for token, text in zip(ids, texts, strict=True)
            ]
        )


class PromptReps(Baseline):
    """Generates words after the prompt and reads a vector at the prompt's end and at each word (paper §3.2).

    Vector 0 is the state at the prompt's last token, which predicts the first word; vector k is the state at the k-th
    generated token. Decoding is greedy and ends before the first special token or closing quote, so texts have between
    1 and K vectors; `repr_mask` says which exist.
    """

    stops: torch.Tensor  # bool [V], the tokens that end an answer

    def __init__(self, config: BaselineConfig, backbone: Any, tokenizer: Any) -> None:
        super().__init__(config, backbone, tokenizer)
        self.register_buffer("stops", self.texts.stopping_tokens(config.vocab_size), persistent=False)

    @property
    def texts(self) -> PromptRepsTokenizer:
        """The rules of tokenisation, following the config."""
        texts = super().texts
        assert isinstance(texts, PromptRepsTokenizer)
        return texts

    def _make_texts(self) -> PromptRepsTokenizer:
        return PromptRepsTokenizer(self.tokenizer, self.config)

    def _read(self, ids: torch.Tensor, mask: torch.Tensor, is_query: bool) -> tuple[torch.Tensor, torch.Tensor]:
        num_vectors = self.config.num_masks(is_query)
        states, exists, _ = self._decode(ids, mask, num_vectors, num_vectors - 1)
        return states, exists

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, is_query: bool) -> torch.Tensor:
        """Return the tokens that follow the prompt, int64 [B, K - 1], without dropout; -1 from where the answer ended.

        Args:
            input_ids, attention_mask: int64 [B, L] from `tokenize`, left-padded.
            is_query: the side that `tokenize` was told.
        """
        words = self.config.num_masks(is_query) - 1
        with in_eval_mode(self):
            return self._decode(input_ids, attention_mask, words, words)[2]

    def _decode(
        self, ids: torch.Tensor, mask: torch.Tensor, passes: int, words: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode greedily with a cache of keys and values, which finished rows leave.

        Args:
            ids, mask: int64 [B, L], left-padded.
            passes: of the backbone at most; the first reads the prompt, each other one token.
            words: tokens wanted, `passes` or one less.

        Returns:
            States [B, passes, H], which of them exist bool [B, passes], and tokens int64 [B, words], -1 for none.
        """
        rows = torch.arange(len(ids), device=ids.device)  # those that go on
        states = torch.zeros(len(ids), passes, self.config.hidden_size, dtype=self.dtype, device=ids.device)
        exists = torch.zeros(len(ids), passes, dtype=torch.bool, device=ids.device)
        tokens = torch.full((len(ids), words), -1, device=ids.device)
        cache = DynamicCache() if passes > 1 else None
        positions = position_ids(mask)
        for step in range(passes):
            last = final_states(self.backbone, ids, mask, positions, cache)[:, -1]  # [b, H]
            states[rows, step], exists[rows, step] = last.to(states.device, states.dtype), True
            if step == words:
                break
            token = self.backbone.lm_head(last).float().argmax(dim=-1).to(rows.device)  # [b]
            going = (~self.stops.to(rows.device)[token]).nonzero().flatten()
            if not len(going):
                break
            if len(going) < len(rows):
                rows, token, mask, positions = (tensor[going] for tensor in (rows, token, mask, positions))
                if cache is not None:
                    cache.batch_select_indices(going)
            tokens[rows, step] = token
            ids, mask, positions = token[:, None], F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        return states, exists, tokens

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, is_query: bool = False
    ) -> BaselineOutput:
        """Generate without gradient, then read all K positions in one pass with gradient.

        Args and returns as for every baseline; `repr_mask` bool [B, K] says which states exist.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states, exists = self.states_at(input_ids, mask, self.generate(input_ids, mask, is_query))
        return BaselineOutput(states=states, repr_mask=exists)

    def states_at(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states that decoding has where the generated tokens are known: one pass, with gradient.

        Args:
            input_ids, attention_mask: int64 [B, L] from `tokenize`, left-padded.
            generated: int64 [B, K - 1] from `generate`, -1 where there is no token.

        Returns:
            States [B, K, H], zero where none exists, and which exist, bool [B, K].

        Raises:
            ValueError: the prompt's last token is not the last of its row.
        """
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("input_ids must be left-padded, as tokenize() returns them: words follow the prompt.")
        exists = F.pad(generated >= 0, (1, 0), value=True)  # [B, K]
        ids = torch.cat([input_ids, generated.clamp(min=0)], dim=1)  # [B, L + K - 1]
        mask = torch.cat([attention_mask, exists[:, 1:].to(attention_mask.dtype)], dim=1)
        states = final_states(self.backbone, ids, mask)[:, input_ids.shape[1] - 1 :]  # [B, K, H]
        return states.masked_fill(~exists[..., None].to(states.device), 0.0), exists
