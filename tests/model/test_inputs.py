"""What people really pass to the model: series of any kind, numpy's numbers, models in any mode and on any place."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_folders import ADAPTERS, KINDS
from datasets import Dataset
from transformers import AutoModel, Trainer, TrainingArguments

TEXTS = ["what causes the seasons on earth", "A cat.", "", "the tilt of the axis"]


@pytest.fixture
def model(load_release: Callable[..., Any]) -> Any:
    return load_release("tiny-llada", "llada-q4p4")


@pytest.fixture
def own(model: Any) -> Any:
    """A copy to change."""
    return copy.deepcopy(model)


def same(got: Any, expected: Any) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------------ texts


class Records:
    """A sequence with a length, as libraries write them."""

    def __init__(self, texts: list[str], length: int) -> None:
        self.texts, self.length = texts, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


SERIES: dict[str, Callable[[list[str]], Any]] = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda texts: (text for text in texts),
    "numpy array of strings": np.array,
    "numpy array of objects": lambda texts: np.array(texts, dtype=object),
    "pandas series": pd.Series,
    "pandas series with an index of its own": lambda texts: pd.Series(texts, index=[7, 7, 3, -1]),
    "pandas series with an index of names": lambda texts: pd.Series(texts, index=list("dcba")),
    "filtered pandas series": lambda texts: pd.Series(["x", *texts, "y"])[1:-1],
    "categories": lambda texts: pd.Series(texts, dtype="category"),
    "pandas index": pd.Index,
    "column of a table": lambda texts: pd.DataFrame({"id": range(4), "text": texts})["text"],
    "column of a dataset": lambda texts: Dataset.from_dict({"text": texts})["text"],
    "values of a dict": lambda texts: dict(enumerate(texts)).values(),
    "a class of its own": lambda texts: Records(texts, len(texts)),
}


@pytest.mark.parametrize("kind", SERIES)
def test_every_series_of_texts(kind: str, model: Any) -> None:
    expected = model.encode_texts(TEXTS, True)
    assert same(model.encode_texts(SERIES[kind](TEXTS), True), expected)
    assert torch.equal(model.tokenize(SERIES[kind](TEXTS), True)[0], model.tokenize(TEXTS, True)[0])
    assert model.content_token_ids(SERIES[kind](TEXTS)) == model.content_token_ids(TEXTS)


TABLE = pd.DataFrame({"id": [1, 2, 3], "title": list("abc"), "text": list("def"), "url": list("ghi")})
NO_SERIES: dict[str, tuple[Any, str]] = {
    "DataFrame": (TABLE, r"got DataFrame of shape \[3, 4\]; pass one column of it"),
    "DataFrame of one column": (TABLE[["text"]], r"got DataFrame of shape \[3, 1\]; pass one column"),
    "empty DataFrame": (TABLE[:0], r"got DataFrame of shape \[0, 4\]; pass one column"),
    "Dataset": (Dataset.from_pandas(TABLE), r"got Dataset of shape \[3, 4\]; pass one column"),
    "two dimensions": (np.array([["a", "b"]]), r"got ndarray of shape \[1, 2\]; pass one column"),
    "no dimension": (np.array("hello"), r"got ndarray of shape \[\]; pass one column"),
    "dict": ({"a": "x"}, r"got dict, whose entries have names; pass list\(texts\.values\(\)\)"),
    "set": ({"a"}, "got set, which has no order; pass a list"),
    "frozenset": (frozenset("a"), "got frozenset, which has no order; pass a list"),
    "str": ("hello", r"got one str; write \[text\]"),
    "numpy string": (np.str_("hello"), r"got one str_; write \[text\]"),
    "bytes": (b"hello", r"got one bytes; write \[text\]"),
    "bytearray": (bytearray(b"hello"), r"got one bytearray; write \[text\]"),
    "number": (5, "got int"),
    "None": (None, "got NoneType"),
}


@pytest.mark.parametrize("kind", NO_SERIES)
def test_what_is_no_series_of_texts(kind: str, model: Any) -> None:
    texts, words = NO_SERIES[kind]
    for call in (model.encode_texts, model.tokenize):
        with pytest.raises(TypeError, match=f"`texts` must be a list of strings, {words}"):
            call(texts, True)


@pytest.mark.parametrize(
    ("texts", "number", "kind"),
    [
        (pd.Series(["a", None, "b"], dtype=object), 1, "NoneType"),
        (pd.Series(["a", "b", float("nan")], dtype=object), 2, "float"),
        (pd.Series(["a", pd.NA], dtype=object), 1, "NAType"),
        (pd.Series([1, 2]), 0, "int64|int"),
        (np.array([b"a"]), 0, "bytes_"),
        (np.array([("a", 1)], dtype=[("text", "U1"), ("id", int)]), 0, "void"),
        (np.array([("a", 1)], dtype=[("text", "U1"), ("id", int)]).view(np.recarray), 0, "record"),
        (torch.zeros(3), 0, "Tensor"),
        ([*TEXTS, {"text": "x"}], 4, "dict"),
        ([np.array(["a"])], 0, "ndarray"),
    ],
    ids=lambda case: str(case)[:20],
)
def test_entries_that_are_no_texts_are_numbered(texts: Any, number: int, kind: str, model: Any) -> None:
    with pytest.raises(TypeError, match=rf"`texts\[{number}\]` must be a string, got ({kind}): "):
        model.encode_texts(texts, True)


@pytest.mark.parametrize(("length", "words"), [(6, "6, but gave 4"), (3, "3, but gave more"), (1, "1, but gave more")])
def test_a_length_that_is_wrong(length: int, words: str, model: Any) -> None:
    """Memory was made for as many vectors as `len` says."""
    with pytest.raises(ValueError, match=f"`texts` has a length of {words}; pass a list of them"):
        model.encode_texts(Records(TEXTS, length), True)


def test_a_length_of_zero_is_not_believed(model: Any) -> None:
    with pytest.raises(ValueError, match="`texts` has a length of 0, but gave more"):
        model.encode_texts(Records(TEXTS, 0), True)
    with pytest.raises(ValueError, match="`texts` is empty; pass at least one string"):
        model.encode_texts(Records([], 0), True)


# ------------------------------------------------------------------------------------------ sides and numbers


@pytest.mark.parametrize("side", ["passage", "query", "", 1, 0, None, [True]], ids=repr)
def test_a_side_is_true_or_false(side: Any, model: Any) -> None:
    words = r"`is_query` must be True \(queries\) or False \(passages\), got "
    ids, mask = model.tokenize(TEXTS, True)
    for call in (
        lambda: model.encode_texts(TEXTS, side),
        lambda: model.tokenize(TEXTS, side),
        lambda: model.encode(ids, mask, is_query=side),
        lambda: model(ids, mask, is_query=side),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_numpys_numbers_are_numbers(model: Any) -> None:
    expected = model.encode_texts(TEXTS, True, batch_size=2, sparse_top_k=5, tokens_per_batch=300)
    for kind in (np.int64, np.int32, np.uint8):
        numbers = {"batch_size": kind(2), "sparse_top_k": kind(5), "tokens_per_batch": np.int64(300)}
        assert same(model.encode_texts(TEXTS, np.bool_(True), **numbers), expected)
    ids, mask = model.tokenize(TEXTS, np.bool_(False))
    assert model.encode(ids, mask, np.bool_(False), True, np.int16(3)).sparse_indices.shape == (4, 3)


def test_numpys_numbers_in_the_config(tmp_path: Path, build_release: Callable[..., Path]) -> None:
    folder = build_release("tiny-llada", "llada-q4p4")
    options = {"num_query_masks": np.int64(2), "max_length": np.uint16(200), "sparse_top_k": np.int32(9)}
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)
    assert model.encode_texts(TEXTS, True).repr_hidden.shape[1] == 2
    model.save_pretrained(tmp_path / "saved-numpy")
    again = AutoModel.from_pretrained(tmp_path / "saved-numpy", trust_remote_code=True, torch_dtype=torch.float32)
    assert (again.config.num_query_masks, again.config.max_length, again.config.sparse_top_k) == (2, 200, 9)


@pytest.mark.parametrize("given", ["hello", ["hello"], None, 5, np.zeros((1, 3), dtype=np.int64), torch.zeros(3, 4)])
def test_calling_the_model_with_what_are_no_ids(given: Any, model: Any) -> None:
    with pytest.raises(ValueError, match=r"input_ids must be an integer tensor \[B, L\].* Give texts to encode_texts"):
        model(given)


# ------------------------------------------------------------------------------------------ sides of outputs


def test_outputs_know_their_side(model: Any) -> None:
    ids, mask = model.tokenize(TEXTS, False)
    for out, side in (
        (model.encode_texts(TEXTS, True), "query"),
        (model.encode_texts(iter(TEXTS), False), "passage"),
        (model.encode(ids, mask, is_query=False, compute_sparse=True), "passage"),
    ):
        assert out.side == side
        assert "side" not in out
        assert set(out) == {"repr_hidden", "sparse_indices", "sparse_values"}
        assert all(isinstance(value, torch.Tensor) for value in out.to_tuple())
        assert pickle.loads(pickle.dumps(out)).side == copy.deepcopy(out).side == side
    assert model(ids, mask, is_query=False).side is None


def test_swapped_sides_are_not_scored(model: Any) -> None:
    queries, passages = model.encode_texts(TEXTS[:2], True), model.encode_texts(TEXTS, False)
    for mode in ("single_dense", "multi_dense", "sparse_max", "fusion_multi_sparse_max"):
        assert model.score(queries, passages, mode).shape == (2, 4)
        with pytest.raises(ValueError, match=r"`queries` are encoded passages \(is_query=False\) .* swap the two"):
            model.score(passages, queries, mode)
        assert torch.equal(model.score(dict(queries), dict(passages), mode), model.score(queries, passages, mode))
        assert model.score(dict(passages), dict(queries), mode).shape == (4, 2)  # what knows no side is not refused
        assert model.score(passages, passages, mode).shape == (4, 4)  # how alike passages are


# ------------------------------------------------------------------------------------------ modes


def with_dropout(model: Any) -> Any:
    """Make every training pass random, as adapters in training are."""
    for layer in model.backbone.layers:
        layer.mlp.register_forward_hook(
            lambda module, _, out: torch.nn.functional.dropout(out, 0.5, training=module.training)
        )
    return model


def modes(model: Any) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_encoding_is_never_random(own: Any) -> None:
    expected = with_dropout(own).encode_texts(TEXTS, True)
    own.train()
    own.backbone.layers[1].eval()  # a layer that is kept as it is
    before = modes(own)
    assert set(before.values()) == {True, False}
    assert same(own.encode_texts(TEXTS, True), expected)
    ids, mask = own.tokenize(TEXTS, True)
    first = own.encode(ids, mask, True, compute_sparse=True)
    assert torch.allclose(first.repr_hidden, expected.repr_hidden, rtol=0, atol=1e-6)
    assert same(own.encode(ids, mask, True, compute_sparse=True), first)
    assert modes(own) == before
    assert not torch.equal(*(own(ids, mask, is_query=True).mask_hidden for _ in range(2)))  # training passes are random


def test_the_mode_is_given_back_after_an_error(own: Any) -> None:
    own.train()
    own.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        own.encode_texts(TEXTS, True)
    own.backbone.norm.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        own.encode_texts(TEXTS, True)
    assert all(modes(own).values())


def test_threads_that_encode_in_train_mode(own: Any) -> None:
    expected = with_dropout(own).encode_texts(TEXTS, True)
    own.train()
    found: list[Any] = []

    def encode() -> None:
        for _ in range(5):
            found.append(own.encode_texts(TEXTS, True))

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(same(out, expected) for out in found)
    assert all(modes(own).values())


def test_a_fresh_trainer(own: Any, tmp_path: Path) -> None:
    expected = with_dropout(own).encode_texts(TEXTS, True)
    trainer = Trainer(own, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert same(own.encode_texts(TEXTS, True), expected)
    own.train()
    assert id(trainer.model) == id(own)
    assert same(own.encode_texts(TEXTS, True), expected)


def test_an_adapter_beside_the_weights_in_train_mode(load_release: Callable[..., Any]) -> None:
    """peft's recipe has dropout; what is loaded computes what was trained, in whatever mode."""
    model = copy.deepcopy(load_release("tiny-llada", "llada-q4p4", merge_adapter=False))
    ids, mask = model.tokenize(TEXTS, True)
    expected = model(ids, mask, is_query=True).mask_hidden
    assert torch.equal(model.train()(ids, mask, is_query=True).mask_hidden, expected)


# ------------------------------------------------------------------------------------------ places

PARTS = [
    "backbone.embed_tokens",
    *(f"backbone.layers.{number}" for number in range(4)),
    "backbone.norm",
    "backbone.rotary_emb",
    "lm_head",
]
PLACES = {part: {**dict.fromkeys(PARTS, "cpu"), part: "disk"} for part in PARTS}
PLACES["all parts"] = dict.fromkeys(PARTS, "disk")
PLACES["all but the embedding"] = {**dict.fromkeys(PARTS, "disk"), "backbone.embed_tokens": "cpu"}
PLACES["all in memory"] = dict.fromkeys(PARTS, "cpu")
WITHOUT_WEIGHTS_ON_DISK = ("backbone.rotary_emb", "all in memory")


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PLACES)
def test_each_part_on_the_disk(kind: str, part: str, build_release: Any, load_release: Any, tmp_path: Path) -> None:
    expected = load_release(f"tiny-{kind}", ADAPTERS[kind], merge_adapter=False)
    options = {"device_map": PLACES[part], "offload_folder": str(tmp_path), "merge_adapter": False}
    folder = build_release(f"tiny-{kind}", ADAPTERS[kind])
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)
    assert any(weight.is_meta for weight in model.parameters()) == (part not in WITHOUT_WEIGHTS_ON_DISK)
    assert model.device.type == "cpu"
    for side in (True, False):
        got, want = model.encode_texts(TEXTS, side), expected.encode_texts(TEXTS, side)
        assert torch.allclose(got.repr_hidden, want.repr_hidden, rtol=0, atol=3e-6)
        assert torch.allclose(got.sparse_values, want.sparse_values, rtol=0, atol=2e-5)
    ids, mask = (tensor.to(model.device) for tensor in model.tokenize(TEXTS, True))
    out = model.encode(ids, mask, is_query=True, compute_sparse=True, content_filter=False)
    assert torch.allclose(out.repr_hidden, expected.encode_texts(TEXTS, True).repr_hidden, rtol=0, atol=3e-6)


@pytest.mark.parametrize("memory", [1_100_000, 1_200_000], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_auto_with_little_memory(kind: str, memory: int, build_release: Any, load_release: Any, tmp_path: Path) -> None:
    expected = load_release(f"tiny-{kind}", ADAPTERS[kind], merge_adapter=False).encode_texts(TEXTS, True)
    options = {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": str(tmp_path)}
    folder = build_release(f"tiny-{kind}", ADAPTERS[kind])
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)
    assert any(weight.is_meta for weight in model.parameters())
    assert torch.allclose(model.encode_texts(TEXTS, True).repr_hidden, expected.repr_hidden, rtol=0, atol=3e-6)


@pytest.mark.parametrize("places", [{"": "disk"}, "auto"], ids=str)
def test_all_of_a_model_on_the_disk(places: Any, build_release: Any, tmp_path: Path) -> None:
    """transformers 4.54 cannot, and it is said what can be done."""
    options = {"device_map": places, "max_memory": {"cpu": 1000}, "offload_folder": str(tmp_path)}
    folder = build_release("tiny-llada", "llada-q4p4")
    said = None
    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)
    except ValueError as error:
        said = str(error)
    if said is None:
        assert model.encode_texts(TEXTS, True).repr_hidden.isfinite().all()
    else:
        assert "leaves nothing of the model in memory, leave a part of it" in said


# ------------------------------------------------------------------------------------------ what else is in the batch


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_how_little_the_rest_of_the_batch_matters(
    kind: str, dtype: torch.dtype, most: float, load_release: Callable[..., Any]
) -> None:
    """README's bounds for the components of unit vectors: bfloat16 keeps 8 bits of each."""
    model = load_release(f"tiny-{kind}", ADAPTERS[kind], torch_dtype=dtype)
    texts = [*TEXTS, "word " * 60, "a longer passage about the seasons, the sun and the axis of the earth " * 2]
    together = model.encode_texts(texts, False, batch_size=len(texts), tokens_per_batch=100_000).repr_hidden
    alone = torch.cat([model.encode_texts([text], False).repr_hidden for text in texts])
    assert (together - alone).abs().max() < most
    assert torch.nn.functional.cosine_similarity(together, alone, dim=-1).min() > 1 - most
