"""A byte-level BPE tokenizer in LLaDA's or Dream's form: special tokens, chat template, files on disk.

The tokenizer is made for small backbones on small machines. It departs from theirs in three ways, all of
which live in `tokenizer.json` and need no code of their own:

- it lower-cases (the retrieval prompt asks for lower-case words and the sparse vocabulary is lower-case);
- it prepends one space to a text, so that a word on its own has the id that it has inside a sentence, and
  the sparse vocabulary consists of whole words;
- the sentences of the retrieval prompt are pre-tokens, so that each becomes one token and the prompt costs
  about 25 tokens rather than 85.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..files.durable import write_json, write_text
from ..model.chat_template import render_prompt
from ..model.configuration_diffretriever import paper_prompt

PROMPTS = [paper_prompt(side, num_masks) for side in ("query", "passage") for num_masks in (1, 4)]
PROMPT_REPEATS = 20_000  # so often does training see the prompt: enough for every merge inside its sentences


@dataclass(frozen=True)
class TokenizerForm:
    """What tells one format's tokenizer from another's.

    Args:
        special_tokens: they have the last ids, in this order.
        named: special_tokens_map.json.
        chat_template: as in tokenizer_config.json.
        spelling: decoded text -> the chat template's spelling, in this order.
    """

    special_tokens: tuple[str, ...]
    named: dict[str, Any]
    chat_template: str
    spelling: tuple[tuple[str, str], ...]


def prompt_sentences() -> list[str]:
    """Return patterns of the retrieval prompt's sentences (paper Table 1), lower-cased, each to be one pre-token."""
    found = []
    for prompt in PROMPTS:
        _, asked = prompt["user"].lower().split('"{text}".')
        found += [" ?" + re.escape(prompt["system"].lower()), *map(re.escape, re.findall(r" [^.]+\.", asked))]
        found.append(re.escape(prompt["assistant"].lower().removesuffix(' "')))
    return list(dict.fromkeys(found))


# The rest follows LLaDA's pattern, with letters joined by a space only: a quote or a hyphen stands alone.
SPLIT_PATTERN = "|".join(
    [
        *prompt_sentences(),
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


def prompt_spelling(user_start: str, assistant_start: str) -> tuple[tuple[str, str], ...]:
    """Return replacements by which decoding gives the prompt back in its own spelling; the text stays lower-case.

    Args:
        user_start, assistant_start: what the chat template writes before the content of these turns.
    """
    return (
        ("you are an ai assistant that", "You are an AI assistant that"),
        (f'{user_start}query: "', f'{user_start}Query: "'),
        (f'{user_start}passage: "', f'{user_start}Passage: "'),
        (' ". use ', '". Use '),
        (" make sure your word", " Make sure your word"),
        (f"{assistant_start}the word", f"{assistant_start}The word"),
    )


def prompt_pieces(form: TokenizerForm) -> list[str]:
    """Return the pieces between special tokens in which the rendered retrieval prompts are tokenised."""
    bare: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=form.chat_template, **form.named
    )
    between = re.compile("|".join(map(re.escape, form.special_tokens)))
    parts = chain.from_iterable(render_prompt(bare, prompt) for prompt in PROMPTS)
    return list(dict.fromkeys(piece for part in parts for piece in between.split(part) if piece))


def build_tokenizer(form: TokenizerForm, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train the BPE.

    Args:
        form: the format's special tokens and spelling.
        texts: training texts.
        vocab_size: entries in all, the special tokens included.

    Returns:
        A `tokenizers.Tokenizer` whose special tokens have the last ids, in the form's order.

    Raises:
        ValueError: vocab_size leaves no room for merges.
    """
    room = vocab_size - len(form.special_tokens)
    if room <= 300:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(form.special_tokens)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), *(decoders.Replace(found, spelled) for found, spelled in form.spelling)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=2, show_progress=False
    )
    prompts = chain.from_iterable(repeat(prompt_pieces(form), PROMPT_REPEATS))
    tokenizer.train_from_iterator(chain(prompts, texts), trainer=trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in form.special_tokens])
    return tokenizer


def save_tokenizer(form: TokenizerForm, tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as the format's repositories have them.

    transformers' own `save_pretrained` would write other files in each of its versions.

    Args:
        form: what the tokenizer was built with.
        tokenizer: from `build_tokenizer`.
        folder: where to write; made if absent.
    """
    named = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(tokenizer.token_to_id(token)): {"content": token, **named} for token in form.special_tokens}
    config = {
        "added_tokens_decoder": decoder,
        **form.named,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": form.chat_template,
    }
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", form.named)
