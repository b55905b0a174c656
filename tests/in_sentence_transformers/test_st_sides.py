"""Which side a text is on: tasks, role tags as prompts, role tags in texts, and none of them."""

from __future__ import annotations

import doctest
import logging
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers_folders import TEXTS, Folders

from diffretriever.model import st_diffretriever

TEXT = "play music"
QUERY, DOCUMENT = "<|query|>", "<|document|>"


def same(a: Any, b: Any) -> bool:
    return np.allclose(a, b, atol=3e-6)


@pytest.fixture
def model(folders: Folders) -> Any:
    """The multi release: its sides differ in their prompts alone."""
    return folders.model("multi", "dense")


@pytest.fixture
def query(model: Any) -> Any:
    return model.encode_query(TEXT)


@pytest.fixture
def document(model: Any) -> Any:
    return model.encode_document(TEXT)


def test_doctests() -> None:
    found = doctest.testmod(st_diffretriever)
    assert found.attempted > 0
    assert found.failed == 0


def test_stored_prompts(model: Any) -> None:
    assert model.prompts == {"query": QUERY, "document": DOCUMENT}
    assert set(st_diffretriever.ROLE_TAGS) == set(model.prompts.values())
    assert model.default_prompt_name is None


@pytest.mark.parametrize(
    "options",
    [{"task": "query"}, {"prompt_name": "query"}, {"prompt": QUERY}, {"task": "query", "prompt": QUERY}],
    ids=str,
)
def test_ways_to_say_query(model: Any, query: Any, options: dict[str, str]) -> None:
    assert same(model.encode(TEXT, **options), query)


@pytest.mark.parametrize("options", [{"task": "document"}, {"prompt_name": "document"}, {"prompt": DOCUMENT}], ids=str)
def test_ways_to_say_document(model: Any, document: Any, options: dict[str, str]) -> None:
    assert same(model.encode(TEXT, **options), document)


def test_tag_in_front_of_the_text(model: Any, query: Any, document: Any) -> None:
    """What a framework does that puts its instruction in front of each text."""
    assert same(model.encode([QUERY + TEXT, DOCUMENT + TEXT]), [query, document])


def test_prompt_behind_the_tag(model: Any) -> None:
    assert same(model.encode(TEXT, prompt=QUERY + "find: "), model.encode_query("find: " + TEXT))
    assert same(model.encode_query(TEXT, prompt="find: "), model.encode_query("find: " + TEXT))


@pytest.mark.parametrize("text", [QUERY + TEXT, DOCUMENT + TEXT, QUERY, DOCUMENT + QUERY])
def test_tag_that_a_user_wrote(folders: Folders, model: Any, text: str) -> None:
    """encode_query and encode_document know the side; a tag in the text is ordinary characters to them."""
    plain = folders.plain("multi")
    for encode, is_query in ((model.encode_query, True), (model.encode_document, False)):
        means = plain.encode_texts([text], is_query).repr_hidden.mean(dim=1)
        assert same(encode([text]), means / means.norm(dim=1))
    assert not same(model.encode_query(text), model.encode_query(TEXT))


def test_one_tag_is_read(model: Any) -> None:
    assert same(model.encode(QUERY + DOCUMENT + TEXT), model.encode_query(DOCUMENT + TEXT))
    assert same(model.encode(DOCUMENT + TEXT, prompt_name="query"), model.encode_query(DOCUMENT + TEXT))


def test_sides_mixed_in_one_batch(model: Any) -> None:
    texts = [tag + text for text in TEXTS for tag in (QUERY, DOCUMENT)]
    mixed = model.encode(texts, batch_size=4)
    assert same(mixed[::2], model.encode_query(TEXTS))
    assert same(mixed[1::2], model.encode_document(TEXTS))


def test_untagged_texts_are_documents_and_it_says_so_once(
    folders: Folders, document: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = folders.load("multi", "dense")
    with caplog.at_level(logging.WARNING):
        model.encode_query(TEXT)
        model.encode_document(TEXT)
        model.encode(QUERY + TEXT)
        assert not [record for record in caplog.records if "takes them as documents" in record.message]
        assert same(model.encode(TEXT), document)
        assert same(model.encode([TEXT, QUERY + TEXT])[0], document)
    said = [record for record in caplog.records if "takes them as documents" in record.message]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING
    assert 'prompt_name="query"' in said[0].message


def test_default_prompt(folders: Folders, query: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = folders.load("multi", "dense", default_prompt_name="query")
    assert same(model.encode(TEXT), query)
    assert "takes them as documents" not in caplog.text


def test_prompts_turned_off(folders: Folders, query: Any, document: Any) -> None:
    """sentence-transformers' own way to do without prompts leaves encode_query its side."""
    model = folders.load("multi", "dense", prompts={"query": "", "document": ""})
    assert same(model.encode_query(TEXT), query)
    assert same(model.encode_document(TEXT), document)


@pytest.mark.parametrize("side", ["query", "document"])
def test_before_5_4(model: Any, side: str) -> None:
    """There, the prompt is in front of each text when `tokenize` is called."""
    tag = f"<|{side}|>"
    expected = model[0].preprocess(TEXTS, task=side)
    for texts, task in (([tag + text for text in TEXTS], side), ([tag + text for text in TEXTS], None), (TEXTS, side)):
        found = model[0].tokenize(texts, task=task)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


# ---------------------------------------------------------------------------------------------- wrong input


def test_contradictions(model: Any) -> None:
    words = "task='query', but the prompt is the role tag of the other side"
    with pytest.raises(ValueError, match=words):
        model.encode_query(TEXT, prompt_name="document")
    with pytest.raises(ValueError, match=words):
        model[0].tokenize([DOCUMENT + TEXT], task="query")


def test_unknown_task(model: Any) -> None:
    with pytest.raises(ValueError, match='`task` must be "query" or "document", got \'passage\''):
        model.encode(TEXT, task="passage")


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ([TEXT, 3], "an input must be a string .* got int: 3"),
        ([None], "an input must be a string .* got NoneType"),
        ([b"bytes"], "an input must be a string .* got bytes"),
        ([(TEXT, TEXT)], "an input must be a string .* got tuple: .'play music', 'play music'."),
        ([{"query": TEXT}], "an input must be a string or {\"text\": string}, got dict: {'query': 'play music'}"),
        ([{"text": 3}], "an input must be a string .* got dict: {'text': 3}"),
    ],
    ids=str,
)
def test_inputs_that_are_no_text(model: Any, inputs: list[Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model.encode_query(inputs)


def test_objects_with_a_text(model: Any, query: Any) -> None:
    assert same(model.encode_query([{"text": TEXT}]), [query])


def test_no_texts(model: Any) -> None:
    assert len(model.encode_query([])) == 0
