"""A byte-level BPE tokenizer in LLaDA's form: special tokens, chat template, files on disk.

The tokenizer is made for small backbones on small machines. It departs from LLaDA's in three ways, all of
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
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "[gMASK]",
    "<|reserved_token_0|>",
    "<|reserved_token_1|>",
    "<|mdm_mask|>",
    "<role>",
    "</role>",
    "<|arithmetic_start|>",
    "<|arithmetic_end|>",
    "<|number_start|>",
    "<|number_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
ROLES = ("system", "user", "assistant")
MASK_TOKEN = "<|mdm_mask|>"
BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
ADDITIONAL_SPECIAL_TOKENS = (
    "<role>",
    "</role>",
    "<|arithmetic_start|>",
    "<|arithmetic_end|>",
    "<|number_start|>",
    "<|number_end|>",
)

CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

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

# Decoding gives the prompt back in the spelling of the chat template (the rest of a text stays lower-case).
PROMPT_SPELLING = (
    *(
        (f"<|start_header_id|> {r}<|end_header_id|> \n\n", f"<|start_header_id|>{r}<|end_header_id|>\n\n")
        for r in ROLES
    ),
    ("you are an ai assistant that", "You are an AI assistant that"),
    ('<|end_header_id|>\n\nquery: "', '<|end_header_id|>\n\nQuery: "'),
    ('<|end_header_id|>\n\npassage: "', '<|end_header_id|>\n\nPassage: "'),
    (' ". use ', '". Use '),
    (" make sure your word", " Make sure your word"),
    ("<|end_header_id|>\n\nthe word", "<|end_header_id|>\n\nThe word"),
)


def build_tokenizer(texts: Iterable[str], vocab_size: int, prompt_texts: Iterable[str] = ()) -> Tokenizer:
    """Trains the BPE.

    Args:
        texts: training texts.
        vocab_size: entries in all, the special tokens included.
        prompt_texts: prompt strings that must become single tokens per sentence; repeated often enough
            for every merge inside them.

    Returns:
        A `tokenizers.Tokenizer` whose special tokens have the last ids, in LLaDA's order.

    Raises:
        ValueError: if vocab_size leaves no room for merges.
    """
    room = vocab_size - len(SPECIAL_TOKENS)
    if room <= 300:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), *(decoders.Replace(found, spelled) for found, spelled in PROMPT_SPELLING)]
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
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, as LLaDA's repository has them.

    Args:
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
        for token in SPECIAL_TOKENS
    }
    special_map = {
        "additional_special_tokens": list(ADDITIONAL_SPECIAL_TOKENS),
        "bos_token": BOS_TOKEN,
        "cls_token": "[CLS]",
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
    }
    config = {
        "added_tokens_decoder": decoder,
        **special_map,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special_map, indent=2) + "\n")
