"""What is wrong with texts, ids and settings is said in words: which argument or row, and what was expected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from diffretriever.model.backbone_loading import check_output
from diffretriever.model.chat_template import render_prompts
from diffretriever.model.tokenization_helpers import RetrievalTokenizer


@pytest.fixture
def q4p4(load_release: Callable[..., Any]) -> Any:
    return load_release("tiny-llada", "llada-q4p4")


@pytest.fixture
def q4p16(load_release: Callable[..., Any]) -> Any:
    return load_release("tiny-dream", "dream-q4p16")


@pytest.fixture
def own(q4p4: Any) -> Any:
    """A copy to break."""
    return copy.deepcopy(q4p4)


BAD_TEXTS: dict[str, tuple[Any, type[Exception], str]] = {
    "one string": ("a text", TypeError, r"`texts` must be a list of strings, got one str; write \[text\]"),
    "bytes": (b"a text", TypeError, r"`texts` must be a list of strings, got one bytes"),
    "a number": (3, TypeError, "`texts` must be a list of strings, got int"),
    "None": (None, TypeError, "`texts` must be a list of strings, got NoneType"),
    "an empty list": ([], ValueError, "`texts` is empty; pass at least one string"),
    "None among them": (["a", None], TypeError, r"`texts\[1\]` must be a string, got NoneType: None"),
    "bytes among them": (["a", "b", b"c"], TypeError, r"`texts\[2\]` must be a string, got bytes: b'c'"),
    "a list among them": ([["a"]], TypeError, r"`texts\[0\]` must be a string, got list: \['a'\]"),
    "NaN among them": (["a", float("nan")], TypeError, r"`texts\[1\]` must be a string, got float: nan"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts(name: str, q4p4: Any) -> None:
    texts, error, message = BAD_TEXTS[name]
    with pytest.raises(error, match=message):
        q4p4.tokenize(texts, is_query=True)
    with pytest.raises(error, match=message):
        q4p4.content_token_ids(texts)
    with pytest.raises(error, match=message):
        q4p4.encode_texts(texts, is_query=True)


def test_a_long_bad_entry_is_cut_in_the_message(q4p4: Any) -> None:
    with pytest.raises(TypeError) as caught:
        q4p4.tokenize([b"x" * 100_000], is_query=True)
    assert len(str(caught.value)) < 200


def good_ids(model: Any, is_query: bool = True) -> torch.Tensor:
    ids: torch.Tensor = model.tokenize(["a cat", "a cat"], is_query=is_query)[0]
    return ids


BAD_IDS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "floats": (lambda ids: ids.float(), r"input_ids must be an integer tensor \[B, L\], .* got torch.float32 \[2, "),
    "booleans": (lambda ids: ids > 0, r"input_ids must be an integer tensor .* got torch.bool"),
    "one row without its batch": (
        lambda ids: ids[0],
        r"input_ids must be an integer tensor \[B, L\].* got torch.int64",
    ),
    "a list": (lambda ids: ids.tolist(), "input_ids must be an integer tensor .* got list"),
    "texts": (lambda ids: ["a cat"], "input_ids must be an integer tensor .* got list"),
    "no rows": (lambda ids: ids[:0], "input_ids has no rows; encode at least one text"),
    "no columns": (lambda ids: ids[:, :0], "ids row 0"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_bad_ids(name: str, q4p4: Any) -> None:
    change, message = BAD_IDS[name]
    with pytest.raises(ValueError, match=message):
        q4p4.encode(change(good_ids(q4p4)), is_query=True)


BAD_MASKS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "too short": (
        lambda mask: mask[:, 1:],
        r"attention_mask must have the shape of input_ids, \[2, \d+\]; got \[2, \d+\]",
    ),
    "one row": (lambda mask: mask[:1], r"attention_mask must have the shape of input_ids, \[2, \d+\]; got \[1, \d+\]"),
    "a list": (lambda mask: mask.tolist(), "attention_mask must have the shape of input_ids, .* got list"),
    "a hole": (
        lambda mask: torch.cat([mask[:, :5], mask[:, :1] * 0, mask[:, 6:]], dim=1),
        "attention mask row 0 is not one run of ones; it must be what tokenize",
    ),
    "nothing real": (lambda mask: mask * 0, r"ids row 0 holds 0 \[MASK\] tokens"),
    "the prompt's first token masked": (
        lambda mask: torch.cat([mask[:, :1] * 0, mask[:, 1:]], dim=1),
        "ids row 0 does not have this model's query prompt around its text",
    ),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_attention_masks(name: str, q4p4: Any) -> None:
    change, message = BAD_MASKS[name]
    ids = good_ids(q4p4)
    with pytest.raises(ValueError, match=message):
        q4p4.encode(ids, change(torch.ones_like(ids)), is_query=True)


def test_ids_without_the_masks(q4p4: Any) -> None:
    ids, mask = q4p4.tokenize(["a", "b"], is_query=True)
    plain = q4p4.tokenizer(["a cat"], return_tensors="pt")["input_ids"]
    message = r"ids row 0 holds 0 \[MASK\] tokens \(id 2043\); a query of this model has 4\. Make the ids with tokenize"
    message = message.replace("2043", str(q4p4.texts.mask_id))
    with pytest.raises(ValueError, match=message):
        q4p4.encode(plain, is_query=True)
    ids[1, ids[1] == q4p4.texts.mask_id] = 5
    with pytest.raises(ValueError, match=message.replace("row 0", "row 1")):
        q4p4.encode(ids, mask, is_query=True)
    with pytest.raises(ValueError, match=r"ids row 1 holds 0 \[MASK\] tokens \(id \d+\), not 4"):
        q4p4(ids, mask, is_query=True)


@pytest.mark.parametrize("name", ["q4p4", "q4p16"])
@pytest.mark.parametrize("made_as", [True, False])
def test_ids_of_the_other_side(name: str, made_as: bool, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    side = "query" if made_as else "passage"
    message = rf"ids row 0 is a {side}, but encode\(\) was told is_query={not made_as}; use tokenize"
    with pytest.raises(ValueError, match=message):
        model.encode(*model.tokenize(["a cat"], is_query=made_as), is_query=not made_as)


def test_a_batch_of_both_sides(q4p4: Any) -> None:
    texts = q4p4.texts
    rows = texts.tokenize(["a"], True) + texts.tokenize(["a"], False)
    with pytest.raises(ValueError, match=r"ids row 1 is a passage, but encode\(\) was told is_query=True"):
        q4p4.encode(*texts.pad(rows), is_query=True)


def test_ids_of_another_model(q4p4: Any, q4p16: Any, load_release: Callable[..., Any]) -> None:
    for ids in (good_ids(q4p16), good_ids(load_release("tiny-llada", "llada-single"))):
        with pytest.raises(ValueError, match=r"ids row 0 holds \d \[MASK\] tokens .* of the same model"):
            q4p4.encode(ids, is_query=True)


def test_ids_with_another_prompt(q4p4: Any) -> None:
    ids = good_ids(q4p4)
    ids[1, 12] += 1
    with pytest.raises(ValueError, match="ids row 1 does not have this model's query prompt around its text"):
        q4p4.encode(ids, is_query=True)


def test_content_token_ids(q4p4: Any) -> None:
    ids = good_ids(q4p4)
    for lists, message in (
        ([[1]], "content_token_ids has 1 lists for 2 texts"),
        ([], "content_token_ids has 0 lists for 2 texts"),
        ([[1], [2048]], r"content_token_ids must lie in 0 … 2047, got \[1, 2048\]"),
        ([[-1], []], r"content_token_ids must lie in 0 … 2047, got \[-1, -1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            q4p4.encode(ids, is_query=True, compute_sparse=True, content_token_ids=lists)
    with pytest.raises(ValueError, match="whole vocabulary in; leave `content_token_ids` out"):
        q4p4.encode(ids, is_query=True, compute_sparse=True, content_token_ids=[[], []], content_filter=False)


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True, [3]])
@pytest.mark.parametrize("name", ["batch_size", "tokens_per_batch", "sparse_top_k"])
def test_counts(name: str, value: Any, q4p4: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1, got ") as caught:
        q4p4.encode_texts(["a"], is_query=True, **{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0, -3, 1.5, None])
@pytest.mark.parametrize("name", ["num_query_masks", "num_passage_masks", "num_denoise_steps", "max_length"])
def test_settings_at_load_and_after(name: str, value: Any, own: Any, build_release: Callable[..., Any]) -> None:
    message = f"config field `{name}` must be a whole number of at least 1, got {value!r}"
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(build_release("tiny-llada", "llada-q4p4"), trust_remote_code=True, **{name: value})
    setattr(own.config, name, value)
    with pytest.raises(ValueError, match=message):
        own.encode_texts(["a"], is_query=True)


def test_max_length_too_small_for_the_prompt(own: Any, build_release: Callable[..., Any]) -> None:
    layouts = own.texts.layouts
    prompt = {side: len(layouts[side].prefix) + len(layouts[side].suffix) for side in (True, False)}
    longest = max(prompt.values())
    message = (
        rf"`max_length` is {longest}, but the (query|passage) prompt alone takes {longest} tokens; "
        rf"set it to at least {longest + 1}, better {longest + 100}"
    )
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(build_release("tiny-llada", "llada-q4p4"), trust_remote_code=True, max_length=longest)
    own.config.max_length = longest
    with pytest.raises(ValueError, match=message):
        own.tokenize(["a"], is_query=True)
    own.config.max_length = longest + 1
    ids, _ = own.tokenize(["many words of text"], is_query=prompt[True] == longest)
    assert ids.shape[1] == longest + 1 + 4 + 3


@pytest.mark.parametrize("weight", ["backbone.layers.2.mlp.up_proj.weight", "backbone.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(own: Any, weight: str, value: float) -> None:
    ids = good_ids(own)
    own.get_parameter(weight).data[int(ids[0, 0]) if "embed" in weight else 0] = value
    with pytest.raises(ValueError, match=rf"vectors of rows \[0, 1\] are not finite: the weights {weight} hold NaN"):
        own.encode(ids, is_query=True)


def test_a_sum_that_overflows_is_no_vector_that_does(own: Any) -> None:
    largest = torch.full((2, 1, 4), torch.finfo(torch.float32).max)
    assert check_output(own, {"repr_hidden": largest})["repr_hidden"] is largest
    opposite = torch.tensor([[[1.0]], [[torch.inf]], [[-torch.inf]]])
    with pytest.raises(ValueError, match=r"vectors of rows \[1, 2\] are not finite"):
        check_output(own, {"repr_hidden": largest, "sparse_values": opposite})


def test_a_broken_head_is_named(own: Any) -> None:
    ids = good_ids(own)
    own.lm_head.weight.data[:] = torch.nan
    assert own.encode(ids, is_query=True).repr_hidden.isfinite().all()
    for content_filter in (True, False):
        with pytest.raises(ValueError, match=r"not finite: the weights lm_head\.weight hold NaN or infinite values"):
            own.encode(ids, is_query=True, compute_sparse=True, content_filter=content_filter)


def test_overflow_in_float16_says_what_to_do(own: Any) -> None:
    own.get_parameter("backbone.layers.1.mlp.down_proj.weight").data.mul_(1e4)
    own.half()
    message = r"the weights are finite, so torch.float16 overflowed; load with dtype=torch.float32 or torch.bfloat16"
    own.get_parameter("backbone.layers.1.mlp.up_proj.weight").data.mul_(1e3)
    assert all(weight.isfinite().all() for weight in own.parameters())
    with pytest.raises(ValueError, match=message):
        own.encode(good_ids(own), is_query=True)


def test_a_model_without_tokenizer(q4p4: Any, build_release: Callable[..., Any]) -> None:
    folder = build_release("tiny-llada", "llada-q4p4")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"does not hold its backbone's config; load the model with .*from_pretrained"):
        AutoModel.from_config(config, trust_remote_code=True)
    bare = type(q4p4)(copy.deepcopy(q4p4.config))
    for call in (
        lambda: bare.tokenize(["a"], is_query=True),
        lambda: bare.encode(good_ids(q4p4), is_query=True),
        lambda: bare.encode_texts(["a"], is_query=True),
        lambda: bare(good_ids(q4p4), is_query=True),
    ):
        with pytest.raises(ValueError, match=r"has no tokenizer; load it with from_pretrained, or set model.tokenizer"):
            call()
    bare.tokenizer = q4p4.tokenizer
    assert bare.encode_texts(["a"], is_query=True).repr_hidden.shape == (1, 4, 64)


class TokenizerWithout:
    """A tokenizer of which one thing is missing."""

    def __init__(self, tokenizer: Any, **changed: Any) -> None:
        self.__dict__.update(tokenizer=tokenizer, **changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chat_template": None}, "has no chat template"),
        ({"backend_tokenizer": None}, r"is not a fast tokenizer \(tokenizer.json\)"),
        ({"get_vocab": dict}, r"has no \[MASK\] token \(looked for <\|mdm_mask\|>, <\|mask\|>"),
        ({"get_chat_template": lambda *_, **__: "nothing"}, "shows the user's text 0 times; it must show it once"),
    ],
)
def test_tokenizers_that_will_not_do(changed: dict[str, Any], message: str, own: Any) -> None:
    lacking = TokenizerWithout(own.tokenizer, **changed)
    with pytest.raises(ValueError, match=message):
        RetrievalTokenizer(lacking, own.config, render_prompts(lacking, own.config))
