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

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TokenizerForm:
    """What tells one format's tokenizer from another's."""

    special_tokens: tuple[str, ...]  # they have the last ids, in this order
    mask: str
    bos: str
    eos: str
    end_of_turn: str
    named: dict[str, Any]  # special_tokens_map.json
    chat_template: str
    turn_start: str  # what the template writes between the special tokens and a turn's content; knows {role}
    turn_break: str  # between the special tokens of two turns
    spelling: tuple[tuple[str, str], ...]  # decoded text -> the chat template's spelling, in this order

    def special_ids(self, tokenizer: Any) -> dict[str, int]:
        """Ids of "mask", "bos" and "eos".

        Raises:
            ValueError: if the tokenizer is not of this form.
        """
        vocabulary, tokens = tokenizer.get_vocab(), {"mask": self.mask, "bos": self.bos, "eos": self.eos}
        absent = [token for token in tokens.values() if token not in vocabulary]
        if absent:
            raise ValueError(
                f"{tokenizer.name_or_path}: the tokenizer has no {absent[0]}; "
                "it was made for another backbone_type: give another output folder"
            )
        return {name: int(vocabulary[token]) for name, token in tokens.items()}


# The sentences of the retrieval prompt (paper Table 1), lower-cased, as one pre-token each.
PROMPT_SENTENCES = (
    r" ?you are an ai assistant that can understand human language\."
    r"| use (?:one word|a few words) to represent the (?:query|passage) in a retrieval task\."
    r"| make sure your (?:word is|words are) in lowercase\."
    r"|the (?:word is|words are):"
)
# The rest follows LLaDA's pattern, with letters joined by a space only: a quote or a hyphen stands alone.
SPLIT_PATTERN = (
    PROMPT_SENTENCES
    + r"|(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def prompt_spelling(user_start: str, assistant_start: str) -> tuple[tuple[str, str], ...]:
    """Replacements by which decoding gives the prompt back in its own spelling (the text itself stays lower-case).

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


def build_tokenizer(
    form: TokenizerForm, texts: Iterable[str], vocab_size: int, prompt_texts: Iterable[str] = ()
) -> Tokenizer:
    """Trains the BPE.

    Args:
        form: the format's special tokens and spelling.
        texts: training texts.
        vocab_size: entries in all, the special tokens included.
        prompt_texts: prompt strings that must become single tokens per sentence; repeated often enough
            for every merge inside them.

    Returns:
        A `tokenizers.Tokenizer` whose special tokens have the last ids, in the form's order.

    Raises:
        ValueError: if vocab_size leaves no room for merges.
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
    prompts = list(prompt_texts)

    def all_texts() -> Iterable[str]:
        for _ in range(20_000):
            yield from prompts
        yield from texts

    tokenizer.train_from_iterator(all_texts(), trainer=trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in form.special_tokens])
    return tokenizer


def save_tokenizer(form: TokenizerForm, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, as the format's repositories have them.

    Args:
        form: what the tokenizer was built with.
        tokenizer: as returned by `build_tokenizer`.
        folder: where to write; made if absent.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    decoder = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in form.special_tokens
    }
    config = {
        "added_tokens_decoder": decoder,
        **form.named,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": form.chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(form.named, indent=2) + "\n")
