"""The retrieval prompt (paper Table 1) as token ids: prefix, text, suffix, K masks, tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .tokenizer import TokenizerForm

SYSTEM = "You are an AI assistant that can understand human language."
USER = '{side}: "{text}". Use {amount} to represent the {what} in a retrieval task. Make sure your {noun} in lowercase.'
_TEXT_MARK = "XTEXTX"


def prompt_strings(is_query: bool, num_masks: int) -> tuple[str, str, str]:
    """Returns the user turn around the text mark, and the assistant's opening words.

    Args:
        is_query: the query's wording, else the passage's.
        num_masks: K; 1 asks for one word, more for a few words.

    Returns:
        (system turn, user turn with `XTEXTX` for the text, opening of the assistant's turn).
    """
    side, what = ("Query", "query") if is_query else ("Passage", "passage")
    amount, noun, opening = ("one word", "word is", "The word is: \"") if num_masks == 1 else (
        "a few words", "words are", "The words are: \""
    )  # fmt: skip
    user = USER.format(side=side, text=_TEXT_MARK, amount=amount, what=what, noun=noun)
    return SYSTEM, user, opening


def rendered_prompt(tokenizer: Any, is_query: bool, num_masks: int) -> tuple[str, str]:
    """Returns (prefix, suffix): the chat template's text before and after the text.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        is_query: the query's wording, else the passage's.
        num_masks: K.
    """
    system, user, opening = prompt_strings(is_query, num_masks)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + opening
    prefix, suffix = rendered.split(_TEXT_MARK)
    return prefix, suffix


@dataclass(frozen=True)
class Prompt:
    """Token ids of one side's prompt: sequence = prefix + text + suffix + [MASK] * num_masks + tail."""

    prefix: list[int]
    suffix: list[int]
    tail: list[int]
    mask_id: int
    num_masks: int

    @classmethod
    def build(cls, tokenizer: Any, form: TokenizerForm, is_query: bool, num_masks: int) -> Prompt:
        """Tokenises each part on its own (paper §3.1, §3.2).

        Args:
            tokenizer: a transformers tokenizer of that form.
            form: knows the mask token and the tail.
            is_query: the query's wording, else the passage's.
            num_masks: K.
        """
        prefix, suffix = rendered_prompt(tokenizer, is_query, num_masks)

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        tail = ids('"') + [tokenizer.convert_tokens_to_ids(t) for t in (form.end_of_turn, form.eos)]
        return cls(ids(prefix), ids(suffix), tail, int(tokenizer.convert_tokens_to_ids(form.mask)), num_masks)

    def wrap(self, text_ids: list[int], max_text: int) -> list[int]:
        """Returns the whole sequence for one text, cut to max_text tokens of text."""
        return self.prefix + text_ids[:max_text] + self.suffix + [self.mask_id] * self.num_masks + self.tail

    def __len__(self) -> int:
        """Tokens besides the text."""
        return len(self.prefix) + len(self.suffix) + self.num_masks + len(self.tail)


def prompt_training_texts(form: TokenizerForm) -> list[str]:
    """The prompt's pieces as a tokenizer of this form will meet them, for training its merges."""

    def turn(role: str, content: str) -> str:
        return form.turn_start.format(role=role) + content

    texts = [turn("system", SYSTEM), form.turn_break, '"', '".']
    for is_query in (True, False):
        for num_masks in (1, 4):
            _, user, opening = prompt_strings(is_query, num_masks)
            before, after = user.split(_TEXT_MARK)
            texts += [turn("user", before.removesuffix(' "')), after, turn("assistant", opening)]
    return texts
