"""Random Unicode texts: nothing crashes, nothing becomes a live special token, and the text comes back."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

from diffretriever.model.tokenization_helpers import without_lone_surrogates

SPECIAL = [
    *("<|mdm_mask|>", "<|eot_id|>", "<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|mask|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|object_ref_start|>", "<|image_pad|>"),
    *("[MASK]", "<mask>", "<s>", "</s>", "<pad>", "{text}", "<|", "|>", "␚", "␁", "␂"),
]
SURROGATES = [*map(chr, range(0xD800, 0xE000, 97)), "\ud83d\ude00", "\ude00\ud83d"]
ALPHABETS: list[list[str]] = [
    list(map(chr, range(32, 127))),
    list(map(chr, [*range(32), *range(127, 160)])),  # controls, NUL among them
    list(map(chr, range(0x300, 0x370))) + list("aeiouAEIOU"),  # combining marks
    list(map(chr, [*range(0x590, 0x750), 0x200E, 0x200F, *range(0x202A, 0x202F)])),  # right to left, and its marks
    list(map(chr, [*range(0x1F300, 0x1F650), 0x200D, 0xFE0F, *range(0x1F3FB, 0x1F400)])),  # emoji and joiners
    list(map(chr, [*range(0x4E00, 0x5200), *range(0x3040, 0x3100), *range(0xAC00, 0xAE00)])),
    list(map(chr, [0xFEFF, 0xFFFD, 0xFFFE, 0xFFFF, 0x10FFFF, 0xE000, 0x2028, 0x2029, 0x3000, 0xA0, 0xAD, 0x1F1EB])),
    SPECIAL,
    SURROGATES,
]
WORDS = "the cat can't cannot 'tis gonna Dr. U.S. 3.5 $5 -- ... ?! \" '' `` () [x] don't. e.g. a/b https://x.org/?q=1".split()


def random_text(source: random.Random) -> str:
    pieces: list[str] = []
    for _ in range(source.randint(0, 5)):
        if source.random() < 0.3:
            pieces += [source.choice(WORDS), " "]
        else:
            pieces += source.choices(source.choice(ALPHABETS), k=source.randint(1, 12))
    return "".join(pieces)


def any_character(source: random.Random) -> str:
    return "".join(chr(source.randrange(0x110000)) for _ in range(source.randint(0, 30)))


def random_texts(number: int, seed: int) -> list[str]:
    source = random.Random(seed)
    texts = [random_text(source) if source.random() < 0.8 else any_character(source) for _ in range(number)]
    texts[:4] = ["\0" * 5000, "\ud800" * 5000, "<|mdm_mask|>" * 2000, "é" * 20000]
    return texts


@pytest.fixture(params=["tiny-llada", "tiny-dream"])
def model(request: pytest.FixtureRequest, load_release: Callable[..., Any]) -> Any:
    adapter = {"tiny-llada": "llada-q4p4", "tiny-dream": "dream-q4p16"}[request.param]
    # Room for the whole text, so that it can be compared with what comes back.
    return load_release(request.param, adapter, max_length=100_000)


def special_ids(model: Any) -> set[int]:
    return set(model.tokenizer.added_tokens_decoder)


def check_rows(model: Any, texts: list[str], is_query: bool) -> None:
    layout, special = model.texts.layouts[is_query], special_ids(model)
    normalise = model.tokenizer.backend_tokenizer.normalizer
    for text, row in zip(texts, model.texts.tokenize(texts, is_query), strict=True):
        assert row[: len(layout.prefix)] == layout.prefix
        assert row[len(row) - len(layout.closing) :] == layout.closing
        text_ids = row[len(layout.prefix) : len(row) - len(layout.closing)]
        assert special.isdisjoint(text_ids), repr(text)
        expected = without_lone_surrogates(text)
        expected = normalise.normalize_str(expected) if normalise is not None else expected
        # A last character cut in two and a real U+FFFD look alike; text_of leaves either out.
        assert model.texts.text_of(text_ids) == expected.rstrip("\ufffd"), repr(text)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("is_query", [True, False])
def test_100_000_texts_tokenise(model: Any, is_query: bool) -> None:
    number, step = 25_000, 1000  # for two sides and two backbones
    texts = random_texts(number, seed=2 * int(is_query) + int(model.config.backbone_type == "dream"))
    for start in range(0, number, step):
        check_rows(model, texts[start : start + step], is_query)


LONG_WORDS = [
    "x" * 5000,
    " " * 5000,
    "\n" * 3000 + "end",
    "1" * 4000,
    "'s " * 2000,
    "e\u0301" * 3000,
    "👩‍👩‍👧" * 900,
    "a " * 3000,
    "a" + "\u0301\u0323" * 2000,
    " \n  " * 2000,
]


@pytest.mark.once
@pytest.mark.parametrize("is_query", [True, False])
def test_a_long_text_has_the_first_ids_of_the_whole(
    model: Any, is_query: bool, load_release: Callable[..., Any]
) -> None:
    source, texts = random.Random(5), random_texts(2000, seed=5)
    long_texts = LONG_WORDS + ["".join(source.choices(texts, k=60)) for _ in range(300)]
    long_texts += ["word " * source.randint(0, 50) + long for long in LONG_WORDS]
    # A long run at every place around the cut.
    long_texts += ["ab " * number + source.choice(LONG_WORDS)[:500] for number in range(200, 300)]
    adapter = {"llada": "llada-q4p4", "dream": "dream-q4p16"}[model.config.backbone_type]
    cut = load_release(f"tiny-{model.config.backbone_type}", adapter)
    layout = model.texts.layouts[is_query]
    room = cut.config.max_length - len(layout.prefix) - len(layout.suffix)
    rows = zip(model.texts.tokenize(long_texts, is_query), cut.texts.tokenize(long_texts, is_query), strict=True)
    for whole, first in rows:
        ids = whole[len(layout.prefix) : len(whole) - len(layout.closing)]
        assert first == layout.prefix + ids[:room] + layout.closing


@pytest.mark.slow
@pytest.mark.once
def test_content_words_of_random_texts(model: Any) -> None:
    texts = random_texts(10_000, seed=11)
    special, vocabulary = special_ids(model), model.config.vocab_size
    for text, ids in zip(texts, model.content_token_ids(texts), strict=True):
        assert ids == sorted(set(ids)), repr(text)
        assert not ids or 0 <= ids[0] <= ids[-1] < vocabulary, repr(text)
        assert special.isdisjoint(ids), repr(text)


@pytest.mark.once
@pytest.mark.parametrize("case", [("tiny-llada", "llada-q4p4"), ("tiny-dream", "dream-q4p16")])
def test_a_sample_encodes_to_finite_vectors(case: tuple[str, str], load_release: Callable[..., Any]) -> None:
    model = load_release(*case)
    texts = random_texts(300, seed=21)
    for is_query in (True, False):
        out = model.encode_texts(texts, is_query)
        assert out.repr_hidden.isfinite().all()
        assert (out.repr_hidden.norm(dim=-1) - 1).abs().max() < 1e-5
        assert out.sparse_values.isfinite().all()
        assert (out.sparse_values >= 0).all()
        assert model.texts.mask_id not in out.sparse_indices[out.sparse_values > 0]


def test_the_texts_are_hard() -> None:
    # What the tests above are worth: every kind of character is among the texts, and each run has the same.
    texts = random_texts(2000, seed=0)
    assert texts == random_texts(2000, seed=0)
    whole = "".join(texts)
    assert {"Cc", "Cs", "Mn", "Lo", "So", "Cf", "Co", "Cn"} <= {unicodedata.category(character) for character in whole}
    assert {"R", "AL"} <= {unicodedata.bidirectional(character) for character in whole}
    assert all(special in whole for special in SPECIAL)
    assert re.search("[\ud800-\udbff][\udc00-\udfff]", whole)
    assert "" in texts
