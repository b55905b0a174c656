"""Texts to token ids and back: the sequence's parts, padding, truncation, and rows found again by `locate`."""

from __future__ import annotations

import copy
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_folders import edit_json
from transformers import AutoModel

from diffretriever.model.adapter_loading import read_prompt
from diffretriever.model.batching import check_texts, find_masks
from diffretriever.model.chat_template import render_prompt, render_prompts
from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig
from diffretriever.model.tokenization_helpers import RetrievalTokenizer, without_lone_surrogates

BACKBONES = {"tiny-llada": "llada-q4p4", "tiny-dream": "dream-q4p16"}
TEXTS = ["a cat", "", "   ", "the seasons on earth", "word " * 300, "日本語 😀 ünï", "<|im_end|><|eot_id|><|mdm_mask|>"]


@pytest.fixture(params=BACKBONES)
def model(request: pytest.FixtureRequest, load_release: Callable[..., Any]) -> Any:
    return load_release(request.param, BACKBONES[request.param])


@pytest.mark.parametrize("is_query", [True, False])
def test_the_parts_of_a_sequence(model: Any, is_query: bool) -> None:
    # Built here from the tokenizer and the paper's wording alone.
    side, k = ("query", model.config.num_query_masks) if is_query else ("passage", model.config.num_passage_masks)
    plain = model.tokenizer
    messages = [
        {"role": "system", "content": "You are an AI assistant that can understand human language."},
        {
            "role": "user",
            "content": f'{side.capitalize()}: "@@". Use a few words to represent the {side} in a retrieval task. '
            "Make sure your words are in lowercase.",
        },
    ]
    before, after = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).split("@@")
    end_of_turn = "<|eot_id|>" if model.config.backbone_type == "llada" else "<|im_end|>"
    ids_of = [plain(part, add_special_tokens=False)["input_ids"] for part in (before, "a cat", after)]
    answer = plain(after + 'The words are: "', add_special_tokens=False)["input_ids"]
    tail = plain('"' + end_of_turn, add_special_tokens=False)["input_ids"] + [plain.eos_token_id]
    mask_id = plain.convert_tokens_to_ids("<|mdm_mask|>" if model.config.backbone_type == "llada" else "<|mask|>")
    ids, mask = model.tokenize(["a cat"], is_query=is_query)
    assert ids[0].tolist() == ids_of[0] + ids_of[1] + answer + [mask_id] * k + tail
    assert ids.dtype == mask.dtype == torch.int64
    assert mask.all()


@pytest.mark.parametrize("is_query", [True, False])
def test_left_padding(model: Any, is_query: bool) -> None:
    ids, mask = model.tokenize(TEXTS, is_query=is_query)
    for row, text in enumerate(TEXTS):
        alone, _ = model.tokenize([text], is_query=is_query)
        padding = ids.shape[1] - alone.shape[1]
        assert ids[row].tolist() == [model.texts.pad_id] * padding + alone[0].tolist()
        assert mask[row].tolist() == [0] * padding + [1] * alone.shape[1]


@pytest.mark.parametrize("is_query", [True, False])
def test_long_texts_are_cut_and_the_masks_stay(model: Any, is_query: bool) -> None:
    k = model.config.num_masks(is_query)
    ids, _ = model.tokenize(["word " * 1000], is_query=is_query)
    assert ids.shape[1] == model.config.max_length + k + 3
    assert (ids == model.texts.mask_id).sum() == k


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_query", [True, False])
def test_locate_finds_masks_and_texts_again(model: Any, is_query: bool, side: str) -> None:
    sequences = model.texts.tokenize(TEXTS, is_query)
    length = max(map(len, sequences)) + 5
    ids = torch.full((len(sequences), length), 9)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = length - len(sequence) if side == "left" else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    positions, text_ids = model.texts.locate(ids, mask, is_query)
    assert torch.equal(positions, (ids == model.texts.mask_id).nonzero()[:, 1].view(positions.shape))
    for row, text in zip(text_ids, TEXTS, strict=True):
        found = model.texts.text_of(row)
        assert found == text or (len(text) > 1000 and text.startswith(found))


@pytest.mark.parametrize("is_query", [True, False])
def test_what_is_prepared_is_what_locate_finds_again(model: Any, is_query: bool) -> None:
    prepared = model.texts.prepare(TEXTS, is_query)
    ids, mask = model.texts.pad([text.sequence for text in prepared])
    positions, text_ids = model.texts.locate(ids, mask, is_query)
    assert torch.equal(model.texts.mask_positions(ids, is_query), positions)
    assert [text.text_ids for text in prepared] == text_ids
    assert [text.content for text in prepared] == [
        model.texts.content_ids(model.texts.text_of(row)) for row in text_ids
    ]
    assert [text.cut for text in prepared] == [text == "word " * 300 for text in TEXTS]
    assert {text.content for text in model.texts.prepare(TEXTS, is_query, content_filter=False)} == {None}


def test_lengths_in_tokens_of_the_text(load_release: Callable[..., Any]) -> None:
    """Each side's own; the prompt and the masks come on top, whatever `max_length` says."""
    model = load_release("tiny-llada", "llada-q4p4", query_length=3, passage_length=400)
    for is_query, length in ((True, 3), (False, 400)):
        fitting, longer = model.texts.prepare(["a " * (length - 1) + "a", "a " * length + "a"], is_query)
        assert len(fitting.text_ids) == len(longer.text_ids) == length
        assert (fitting.cut, longer.cut) == (False, True)
    assert model.tokenize(["a " * 500], is_query=False)[0].shape[1] > model.config.max_length == 256


def test_a_max_length_stands_in_for_lengths_of_the_text(build_release: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "lengths"
    shutil.copytree(build_release("tiny-llada", "llada-q4p4"), folder)
    edit_json(folder / "config.json", query_length=5, passage_length=7)
    cases: list[tuple[dict[str, Any], tuple[int | None, int | None]]] = [
        ({}, (5, 7)),
        ({"query_length": 9}, (9, 7)),
        ({"max_length": 120}, (None, None)),
        ({"max_length": 120, "passage_length": 8}, (None, 8)),
    ]
    for options, lengths in cases:
        config = DiffRetrieverConfig.from_pretrained(folder, **options)
        assert (config.query_length, config.passage_length) == lengths
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, max_length=120)
    assert {len(one.prefix) + len(one.suffix) + one.room for one in model.texts.layouts.values()} == {120}


def test_a_text_that_just_fits_is_not_cut(model: Any) -> None:
    room = model.config.max_length - (len(model.tokenize([""], True)[0][0]) - model.config.num_query_masks - 3)
    fitting, longer = model.texts.prepare(["a " * (room - 1) + "a", "a " * room + "a"], is_query=True)
    assert len(fitting.text_ids) == len(longer.text_ids) == room
    assert (fitting.cut, longer.cut) == (False, True)
    assert fitting.sequence == longer.sequence


@pytest.mark.once
@pytest.mark.parametrize("word", ["a", " ", "日本", "a\u0301", "0"])
def test_a_text_of_megabytes_takes_a_moment(model: Any, word: str) -> None:
    started = time.process_time()
    ids, _ = model.tokenize([word * (20_000_000 // len(word))], is_query=False)
    took = time.process_time() - started
    assert ids.shape[1] == model.tokenize(["a b " * 1000], is_query=False)[0].shape[1]
    assert took < 5  # the whole text would take a minute and a gigabyte


@pytest.mark.parametrize("before", ["\n" * 30_000, "x" * 20_000 + " ", "-" * 9_000 + "\n", "日本語" * 3000])
def test_a_long_beginning_is_tokenised_as_in_the_whole(model: Any, before: str) -> None:
    text = before + "the seasons on earth " * 2000
    whole = model.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert model.texts.first_ids([text], 200) == [whole[:200]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_locate_takes_masks_of_other_dtypes(model: Any, dtype: torch.dtype) -> None:
    ids, mask = model.tokenize(["a", "a longer query"], is_query=True)
    expected, _ = model.texts.locate(ids, mask, True)
    assert torch.equal(model.texts.locate(ids, mask.to(dtype), True)[0], expected)


def test_locate_refuses_rows_of_padding(model: Any) -> None:
    ids, mask = model.tokenize(["a", "b"], is_query=True)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"ids row 1 .*tokenize\(\.\.\., is_query=True\)"):
        model.texts.locate(ids, mask, True)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_locate_refuses_rows_shorter_than_the_closing_tokens(model: Any, count: int) -> None:
    ids, _ = model.tokenize(["a"], is_query=True)
    short = ids[:, -count:]
    with pytest.raises(ValueError, match="ids row 0"):
        model.texts.locate(short, torch.ones_like(short), True)


def test_locate_refuses_a_text_that_overlaps_the_prompt(model: Any) -> None:
    layout = model.texts.layouts[True]
    row = torch.tensor([layout.prefix[:-1] + layout.closing])
    with pytest.raises(ValueError, match="does not have this model's query prompt around its text"):
        model.texts.locate(row, torch.ones_like(row), True)


def test_text_of_leaves_out_a_character_cut_in_two(model: Any) -> None:
    ids = model.texts.tokenize(["a 😀"], True)[0][len(model.texts.layouts[True].prefix) :]
    text_ids = ids[: -len(model.texts.layouts[True].closing)]
    assert model.texts.text_of(text_ids) == "a 😀"
    assert model.texts.text_of(text_ids[:-1]).rstrip() == "a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("", ""),
        ("\ud83d\ude00", "😀"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud800\ud83d\ude00x", "\ufffd😀x"),
    ],
)
def test_lone_surrogates(text: str, expected: str, model: Any) -> None:
    assert without_lone_surrogates(text) == expected
    assert torch.equal(model.tokenize([text], is_query=True)[0], model.tokenize([expected], is_query=True)[0])
    assert model.content_token_ids([text]) == model.content_token_ids([expected])


def test_content_ids_are_sorted_unique_and_each_word_is_tokenised_alone(model: Any) -> None:
    [ids] = model.content_token_ids(["Earth, earth; the seasons of the EARTH!"])
    words = [model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("earth", "seasons")]
    assert ids == sorted({token for word in words for token in word})
    assert model.content_token_ids(["", "the of and", "?!"]) == [[], [], []]


def test_a_full_word_cache_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["red green blue", "green yellow", "red blue violet", "red green blue"]
    expected = model.content_token_ids(texts)
    monkeypatch.setattr(RetrievalTokenizer, "WORD_CACHE_SIZE", 2)
    fresh = RetrievalTokenizer(model.tokenizer, model.config, render_prompts(model.tokenizer, model.config))
    assert [fresh.content_ids(text) for text in texts] == expected


@pytest.mark.once
def test_the_word_cache_is_bounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetrievalTokenizer, "WORD_CACHE_SIZE", 100)
    fresh = RetrievalTokenizer(model.tokenizer, model.config, render_prompts(model.tokenizer, model.config))
    tracemalloc.start()
    for number in range(5_000):
        fresh.content_ids(f"word{number}")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000  # 5,000 words would take 1 MB


@pytest.mark.parametrize(
    "texts", [["a"], ("a",), {"k": "a"}.values(), np.array(["a"]), iter(["a"])], ids=lambda t: type(t).__name__
)
def test_any_iterable_of_strings_will_do(texts: Any) -> None:
    assert check_texts(texts) == ["a"]


def test_find_masks() -> None:
    ids = torch.tensor([[7, 1, 7, 2], [3, 7, 7, 7]])
    assert find_masks(ids[:1], 7, [2]).tolist() == [[0, 2]]
    with pytest.raises(ValueError, match=r"ids row 1 holds 3 \[MASK\] tokens \(id 7\), not 2"):
        find_masks(ids, 7, [2])


def test_settings_changed_after_loading_count(load_release: Callable[..., Any]) -> None:
    model = load_release("tiny-llada", "llada-single", merge_adapter=True)
    before = model.tokenize(["word " * 300], is_query=False)[0].shape[1]
    saved = model.config.max_length, model.config.num_passage_masks
    try:
        model.config.max_length, model.config.num_passage_masks = saved[0] + 10, saved[1] + 2
        assert (
            model.tokenize(["word " * 300], is_query=False)[0].shape[1] == before + 12
        )  # prompt and text share max_length
    finally:
        model.config.max_length, model.config.num_passage_masks = saved


def test_a_tokenizer_that_is_set_after_loading_counts(load_release: Callable[..., Any]) -> None:
    model = copy.copy(load_release("tiny-llada", "llada-q4p4"))
    assert model.texts.tokenizer is model.tokenizer
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.chat_template = "{{ messages[0].content }} {{ messages[1].content }} now: "
    (row,), _ = model.tokenize(["a cat"], is_query=True)
    assert " now: " in model.tokenizer.decode(row)


def test_a_recorded_prompt_is_recovered_or_refused(model: Any) -> None:
    layout = model.texts.layouts[True]
    assert read_prompt(model.tokenizer, layout.prefix, layout.suffix, render_prompt) == model.config.prompt(True)
    # One token of the suffix spelled letter by letter: the same text in ids that another tokenizer would make.
    start, text = next((n, t) for n, i in enumerate(layout.suffix) if len(t := model.tokenizer.decode([i])) > 2)
    others = [token for letter in text for token in model.tokenizer(letter, add_special_tokens=False)["input_ids"]]
    suffix = [*layout.suffix[:start], *others, *layout.suffix[start + 1 :]]
    with pytest.raises(ValueError, match="the adapter was trained with another tokenizer"):
        read_prompt(model.tokenizer, layout.prefix, suffix, render_prompt)
    with pytest.raises(ValueError, match="do not follow the tokenizer's chat template"):
        read_prompt(model.tokenizer, layout.prefix[2:], layout.suffix, render_prompt)
