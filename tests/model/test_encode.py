"""`encode` and `encode_texts`: what they return, and that nothing but the text itself changes it."""

from __future__ import annotations

import random
import resource
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

CASES = {
    "llada-single": "tiny-llada",
    "llada-q4p4": "tiny-llada",
    "dream-q4p16": "tiny-dream",
    "dream-q4p4": "tiny-dream",
}
DENSE_TOLERANCE, SPARSE_TOLERANCE = 3e-6, 2e-5
TEXTS = [
    "what causes the seasons on earth?",
    "",
    "A cat.",
    "The tilt of the Earth's axis gives each hemisphere more sun in its summer. " * 3,
    "   ",
    "the of and",
    "日本語のテキスト und Größe 😀",
    "copy files between two computers over a network, safely and quickly",
]


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest, load_release: Callable[..., Any]) -> Any:
    return load_release(CASES[request.param], request.param)


@pytest.fixture
def small(load_release: Callable[..., Any]) -> Any:
    return load_release("tiny-llada", "llada-q4p4")


def weights_of(out: Any, row: int) -> dict[int, float]:
    pairs = zip(out.sparse_indices[row].tolist(), out.sparse_values[row].tolist(), strict=True)
    return {token: value for token, value in pairs if value > 0}


def assert_same(got: Any, row: int, expected: Any, expected_row: int = 0) -> None:
    assert torch.allclose(got.repr_hidden[row], expected.repr_hidden[expected_row], rtol=0, atol=DENSE_TOLERANCE)
    ours, theirs = weights_of(got, row), weights_of(expected, expected_row)
    for token in ours.keys() | theirs.keys():
        assert ours.get(token, 0.0) == pytest.approx(theirs.get(token, 0.0), abs=SPARSE_TOLERANCE)


def encode_alone(model: Any, text: str, is_query: bool, **options: Any) -> Any:
    return model.encode(*model.tokenize([text], is_query=is_query), is_query, compute_sparse=True, **options)


def shift_padding(model: Any, ids: torch.Tensor, mask: torch.Tensor, side: str, extra: int) -> Any:
    """Add padding in front, and move it behind each row for side="right"; "mixed" does so for every other row."""
    ids, mask = F.pad(ids, (extra, 0), value=model.texts.pad_id), F.pad(mask, (extra, 0))
    for row in range(len(ids)):
        if side == "right" or (side == "mixed" and row % 2):
            shift = int((mask[row] == 0).sum())
            ids[row], mask[row] = ids[row].roll(-shift), mask[row].roll(-shift)
    return ids, mask


# ------------------------------------------------------------------------------------------------ batch invariance


@pytest.mark.once
@pytest.mark.parametrize("is_query", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_changes_no_text(case: str, attention: str, is_query: bool, load_release: Callable[..., Any]) -> None:
    model = load_release(CASES[case], case, attn_implementation=attention)
    alone = [encode_alone(model, text, is_query) for text in TEXTS]
    shuffler = random.Random(0)
    for side, extra in (("left", 0), ("left", 17), ("right", 0), ("right", 9), ("mixed", 40)):
        rows = shuffler.sample(range(len(TEXTS)), shuffler.randint(2, len(TEXTS)))
        ids, mask = model.tokenize([TEXTS[row] for row in rows], is_query=is_query)
        out = model.encode(*shift_padding(model, ids, mask, side, extra), is_query, compute_sparse=True)
        for place, row in enumerate(rows):
            assert_same(out, place, alone[row])


@pytest.mark.parametrize("filler", [0, 7])
def test_what_lies_under_the_padding_is_not_seen(model: Any, filler: int) -> None:
    ids, mask = model.tokenize(TEXTS, is_query=True)
    expected = model.encode(ids, mask, True, compute_sparse=True)
    out = model.encode(ids.masked_fill(mask == 0, filler), mask, True, compute_sparse=True)
    for row in range(len(TEXTS)):
        assert_same(out, row, expected, row)


@pytest.mark.once
@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 3}, {"tokens_per_batch": 1}, {"tokens_per_batch": 300}, {}]
)
@pytest.mark.parametrize("is_query", [True, False])
def test_encode_texts_equals_encode(model: Any, is_query: bool, options: dict[str, int]) -> None:
    out = model.encode_texts(TEXTS, is_query, **options)
    assert out.repr_hidden.shape[0] == len(TEXTS)
    for row, text in enumerate(TEXTS):
        assert_same(out, row, encode_alone(model, text, is_query))


# ------------------------------------------------------------------------------------------------ what encode returns


def test_shapes_dtypes_and_norm(model: Any) -> None:
    for is_query, k in ((True, model.config.num_query_masks), (False, model.config.num_passage_masks)):
        out = model.encode(*model.tokenize(TEXTS, is_query=is_query), is_query, compute_sparse=True)
        assert out.repr_hidden.shape == (len(TEXTS), k, model.config.hidden_size)
        assert out.sparse_indices.shape == out.sparse_values.shape == (len(TEXTS), 128)
        assert (out.repr_hidden.dtype, out.sparse_values.dtype) == (torch.float32, torch.float32)
        assert out.sparse_indices.dtype == torch.int64
        assert torch.allclose(out.repr_hidden.norm(dim=-1), torch.ones(len(TEXTS), k), atol=1e-6)
        assert out["repr_hidden"] is out.repr_hidden
        assert out["sparse_values"] is out.sparse_values
        assert not out.repr_hidden.requires_grad


@pytest.mark.parametrize("kind", [list, iter])
def test_another_default_device_and_dtype_of_torch(small: Any, kind: Callable[..., Any]) -> None:
    expected, before = small.encode_texts(TEXTS, is_query=True), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # stands for `torch.set_default_device("cuda")`
            found = small.encode_texts(kind(TEXTS), is_query=True)
            ids, mask = small.tokenize(TEXTS, is_query=True)
            batch = small.encode(ids, mask, is_query=True, compute_sparse=True)
            scores = small.score({name: values.numpy() for name, values in found.items()}, batch)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.testing.assert_close(batch["repr_hidden"], expected["repr_hidden"], rtol=0, atol=DENSE_TOLERANCE)
    assert (ids.device.type, scores.device.type) == ("cpu", "cpu")


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_hooks_of_the_last_layer_run(part: str, small: Any) -> None:
    last, seen = small.backbone.layers[-1], []
    module = last if part == "layer" else last.self_attn
    handle = module.register_forward_hook(lambda *_: seen.append(part))
    try:
        watched = small.encode_texts(TEXTS, is_query=True)
    finally:
        handle.remove()
    assert seen
    expected = small.encode_texts(TEXTS, is_query=True)
    assert torch.allclose(watched.repr_hidden, expected.repr_hidden, rtol=0, atol=DENSE_TOLERANCE)


def test_without_sparse_there_are_no_sparse_keys(model: Any) -> None:
    for out in (model.encode(*model.tokenize(["a"], is_query=True), True),
                model.encode_texts(["a"], True, compute_sparse=False)):  # fmt: skip
        assert set(out) == {"repr_hidden"}
        assert out.sparse_indices is None
        assert "sparse_values" not in out


def reference_weights(model: Any, text: str, is_query: bool) -> torch.Tensor:
    """Weights of the whole vocabulary [V] by the definition: head on every position, then max over the masks."""
    ids, mask = model.tokenize([text], is_query=is_query)
    with torch.no_grad():
        logits = model.lm_head(model.hidden_states(ids, mask)).float()
    weights = torch.log1p(F.relu(logits[0, ids[0] == model.texts.mask_id].amax(dim=0)))
    weights[model.texts.mask_id] = 0.0
    return weights


@pytest.mark.parametrize("is_query", [True, False])
def test_sparse_vectors_by_their_definition(model: Any, is_query: bool) -> None:
    for text in TEXTS:
        weights = reference_weights(model, text, is_query)
        whole = encode_alone(model, text, is_query, content_filter=False, sparse_top_k=model.config.vocab_size)
        found = weights_of(whole, 0)
        assert found.keys() == set(weights.nonzero().flatten().tolist())
        assert list(found.values()) == pytest.approx(weights[list(found)].tolist(), abs=SPARSE_TOLERANCE)
        content = model.content_token_ids([text])[0]
        filtered = weights_of(encode_alone(model, text, is_query), 0)
        assert filtered.keys() == {token for token in content if weights[token] > 0}
        for token, value in filtered.items():
            assert value == pytest.approx(float(weights[token]), abs=SPARSE_TOLERANCE)


@pytest.mark.once
@pytest.mark.parametrize("top_k", [1, 2, 5, 128, 2000, 10**6])
@pytest.mark.parametrize("content_filter", [True, False])
def test_top_k(model: Any, top_k: int, content_filter: bool) -> None:
    ids, mask = model.tokenize(TEXTS, is_query=True)
    every = model.encode(
        ids, mask, True, compute_sparse=True, sparse_top_k=model.config.vocab_size, content_filter=content_filter
    )
    out = model.encode(ids, mask, True, compute_sparse=True, sparse_top_k=top_k, content_filter=content_filter)
    slots = min(top_k, model.config.vocab_size)
    assert out.sparse_values.shape == (len(TEXTS), slots)
    assert (out.sparse_values.diff(dim=1) <= 0).all()
    assert (out.sparse_values >= 0).all()
    unused = out.sparse_values == 0
    assert (out.sparse_indices[unused] == 0).all()
    assert model.texts.mask_id not in out.sparse_indices[~unused]
    assert torch.equal(out.sparse_values, every.sparse_values[:, :slots])
    assert torch.equal(out.sparse_indices, every.sparse_indices[:, :slots])


def test_texts_without_content_words_have_empty_sparse_vectors(model: Any) -> None:
    out = model.encode_texts(["", "   ", "the of and", "?!"], is_query=False)
    assert out.sparse_values.count_nonzero() == 0
    assert out.sparse_indices.count_nonzero() == 0
    assert out.repr_hidden.isfinite().all()


@pytest.mark.once
@pytest.mark.parametrize("top_k", [1, 2, 3, 10])
@pytest.mark.parametrize("content_filter", [True, False])
def test_equal_weights_keep_the_lower_ids(small: Any, top_k: int, content_filter: bool, monkeypatch: Any) -> None:
    # Equal head rows give equal logits; which of them is kept must not depend on the batch.
    head = torch.nn.Linear(64, small.config.vocab_size, bias=False)
    torch.nn.init.zeros_(head.weight)
    head.weight.data[:, 0] = 1.0  # one term a sum: equal to the last bit in every batch
    monkeypatch.setitem(small._modules, "lm_head", head)
    ids, mask = small.tokenize(TEXTS, is_query=True)
    batch = small.encode(ids, mask, True, compute_sparse=True, sparse_top_k=top_k, content_filter=content_filter)
    lists = small.content_token_ids(TEXTS) if content_filter else [list(range(small.config.vocab_size))] * len(TEXTS)
    for row, text in enumerate(TEXTS):
        if batch.sparse_values[row, 0] > 0:
            lowest = [token for token in lists[row] if token != small.texts.mask_id][:top_k]
            assert batch.sparse_indices[row, : len(lowest)].tolist() == lowest
        alone = encode_alone(small, text, True, sparse_top_k=top_k, content_filter=content_filter)
        assert torch.equal(alone.sparse_indices[0], batch.sparse_indices[row])


def test_content_token_ids_given(model: Any) -> None:
    ids, mask = model.tokenize(TEXTS, is_query=True)
    derived = model.encode(ids, mask, True, compute_sparse=True)
    given = model.encode(ids, mask, True, compute_sparse=True, content_token_ids=model.content_token_ids(TEXTS))
    assert torch.equal(given.sparse_indices, derived.sparse_indices)
    chosen = [[5, 17, model.texts.mask_id, 17, 900], *[[]] * (len(TEXTS) - 1)]
    out = model.encode(ids, mask, True, compute_sparse=True, content_token_ids=chosen)
    weights = reference_weights(model, TEXTS[0], True)
    assert weights_of(out, 0).keys() == {token for token in (5, 17, 900) if weights[token] > 0}
    assert out.sparse_values[1:].count_nonzero() == 0


def test_a_long_text_has_the_content_of_what_was_read(model: Any) -> None:
    text = "first " + "word " * 200 + "unseen"
    kept = weights_of(encode_alone(model, text, False), 0).keys()
    [whole] = model.content_token_ids([text])
    [read] = model.content_token_ids(["first word"])
    assert kept <= set(read)
    assert set(read) < set(whole)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_ids_of_other_integer_types(model: Any, dtype: torch.dtype) -> None:
    ids, mask = model.tokenize(TEXTS, is_query=True)
    expected = model.encode(ids, mask, True)
    assert torch.equal(model.encode(ids.to(dtype), mask.to(dtype), True).repr_hidden, expected.repr_hidden)
    assert torch.equal(model.encode(ids, mask.bool(), True).repr_hidden, expected.repr_hidden)
    assert torch.equal(model.encode(ids, mask.float() * 2, True).repr_hidden, expected.repr_hidden)


def test_the_mask_may_be_left_out_without_padding(model: Any) -> None:
    ids, mask = model.tokenize(["one text"], is_query=True)
    assert torch.equal(model.encode(ids, is_query=True).repr_hidden, model.encode(ids, mask, True).repr_hidden)


@pytest.mark.parametrize("case", ["llada-q4p4", "dream-q4p16"])
def test_unnormalised(case: str, load_release: Callable[..., Any]) -> None:
    normal, raw = load_release(CASES[case], case), load_release(CASES[case], case, normalize=False)
    ids, mask = normal.tokenize(TEXTS, is_query=True)
    hidden = raw.encode(ids, mask, True).repr_hidden
    assert (hidden.norm(dim=-1) - 1).abs().min() > 1e-3
    assert torch.allclose(F.normalize(hidden, dim=-1), normal.encode(ids, mask, True).repr_hidden, atol=1e-6)


def test_forward_is_encode_with_gradient(model: Any) -> None:
    ids, mask = model.tokenize(TEXTS[:3], is_query=True)
    hidden = model(ids, mask, is_query=True).mask_hidden
    assert hidden.requires_grad
    expected = model.encode(ids, mask, True).repr_hidden
    assert torch.allclose(F.normalize(hidden.float(), dim=-1), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------ several steps


def plain_steps(model: Any, text: str, is_query: bool, steps: int) -> torch.Tensor:
    """Multi-step denoising of one text (paper App. A.1) as a loop over Python numbers; [K, H]."""
    ids, mask = model.tokenize([text], is_query=is_query)
    places = (ids[0] == model.texts.mask_id).nonzero().flatten().tolist()
    steps = min(steps, len(places))
    states: dict[int, torch.Tensor] = {}
    still_open = list(places)
    for step in range(steps):
        hidden = model.hidden_states(ids, mask)[0]
        states.update({place: hidden[place] for place in still_open})
        if step == steps - 1:
            break
        probabilities = model.lm_head(hidden).float().softmax(dim=-1)
        if model.config.denoise_confidence == "entropy":
            sure = {p: float((probabilities[p] * probabilities[p].log()).sum()) for p in still_open}
        else:
            sure = {p: float(probabilities[p].max()) for p in still_open}
        for place in sorted(still_open, key=lambda p: -sure[p])[: len(places) // steps]:
            ids[0, place] = probabilities[place].argmax()
            still_open.remove(place)
    return torch.stack([states[place] for place in places])


@pytest.mark.once
@pytest.mark.parametrize("steps", [2, 3, 4, 16, 50])
@pytest.mark.parametrize(
    ("case", "rule"),
    [("llada-q4p4", "entropy"), ("llada-q4p4", "probability"), ("llada-single", "entropy"), ("dream-q4p16", "entropy")],
)
def test_several_steps(case: str, rule: str, steps: int, load_release: Callable[..., Any]) -> None:
    model = load_release(CASES[case], case, num_denoise_steps=steps, denoise_confidence=rule)
    texts = TEXTS[:3]
    for is_query in (True, False):
        out = model.encode_texts(texts, is_query)
        assert out.repr_hidden.shape == (3, model.config.num_masks(is_query), model.config.hidden_size)
        for row, text in enumerate(texts):
            with torch.no_grad():
                expected = F.normalize(plain_steps(model, text, is_query, steps).float(), dim=-1)
            assert torch.allclose(out.repr_hidden[row], expected, rtol=0, atol=1e-5)
            assert_same(encode_alone(model, text, is_query), 0, out, row)


def test_several_steps_change_something_and_leave_the_ids_alone(load_release: Callable[..., Any]) -> None:
    one, two = load_release("tiny-llada", "llada-q4p4"), load_release("tiny-llada", "llada-q4p4", num_denoise_steps=2)
    ids, mask = one.tokenize(TEXTS, is_query=True)
    before = ids.clone()
    difference = (one.encode(ids, mask, True).repr_hidden - two.encode(ids.int(), mask, True).repr_hidden).abs()
    changed = (difference.amax(dim=-1) > 1e-3).sum(dim=1)
    assert (changed <= 2).all()  # of 4 masks, 2 are read in the first step
    assert changed.sum() > 0
    assert torch.equal(ids, before)


@pytest.mark.parametrize("is_query", [True, False])
@pytest.mark.parametrize("content_filter", [True, False])
def test_prepared_texts_give_what_their_ids_give(small: Any, is_query: bool, content_filter: bool) -> None:
    ids, mask = small.tokenize(TEXTS, is_query)
    expected = small.encode(ids, mask, is_query, compute_sparse=True, content_filter=content_filter)
    found = small.encode_prepared(small.texts.prepare(TEXTS, is_query, content_filter), is_query)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(small.encode_prepared(small.texts.prepare(TEXTS, is_query), is_query, compute_sparse=False)) == {
        "repr_hidden"
    }


# ------------------------------------------------------------------------------------------------ encode_texts


def batching_of(model: Any) -> Any:
    """Return the module that the model's own code takes its batches from."""
    return sys.modules[sys.modules[type(model).__module__].encode_in_order.__module__]


@pytest.mark.once
@pytest.mark.parametrize("kind", [list, tuple, iter, lambda texts: (text for text in texts), np.array])
@pytest.mark.parametrize("window", [1, 3, 8, 9, 8192])
def test_any_source_and_window(small: Any, kind: Any, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = small.encode_texts(TEXTS, is_query=False)
    monkeypatch.setattr(batching_of(small), "WINDOW", window)
    out = small.encode_texts(kind(TEXTS), is_query=False)
    assert len(out.repr_hidden) == len(TEXTS)
    for row in range(len(TEXTS)):
        assert_same(out, row, expected, row)
    assert out.repr_hidden.device.type == "cpu"


@pytest.mark.parametrize("kind", [list, iter])
def test_an_error_names_the_entry_in_the_whole_input(small: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching_of(small), "WINDOW", 4)
    texts: list[Any] = ["a"] * 9 + [None]
    with pytest.raises(TypeError, match=r"`texts\[9\]` must be a string, got NoneType"):
        small.encode_texts(kind(texts), is_query=True)


@pytest.mark.parametrize(
    "texts", [[], (), iter([]), (str(number) for number in range(0))], ids=["list", "tuple", "iterator", "generator"]
)
def test_no_texts_at_all(small: Any, texts: Any) -> None:
    with pytest.raises(ValueError, match="`texts` is empty; pass at least one string"):
        small.encode_texts(texts, is_query=True)


def test_progress_bar(small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small.encode_texts(TEXTS, True)
    assert capsys.readouterr().err == ""
    small.encode_texts(TEXTS, True, show_progress_bar=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
    small.encode_texts(iter(TEXTS), True, show_progress_bar=True)
    assert f"{len(TEXTS)}text" in capsys.readouterr().err


@pytest.mark.parametrize("is_query", [True, False])
def test_one_text_in_a_list_is_what_an_iterator_of_it_gives(model: Any, is_query: bool) -> None:
    """The one takes a shorter way."""
    for text in TEXTS:
        alone, read = model.encode_texts([text], is_query), model.encode_texts(iter([text]), is_query)
        assert list(alone) == list(read)
        assert alone.side == read.side
        assert all(torch.equal(alone[name], read[name]) for name in alone)
    for one, shown in ((3, "int: 3"), (None, "NoneType: None")):
        with pytest.raises(TypeError, match=rf"`texts\[0\]` must be a string, got {shown}"):
            model.encode_texts([one], is_query)
    with pytest.raises(ValueError, match="`batch_size` must be a whole number of at least 1"):
        model.encode_texts(["a"], is_query, batch_size=0)


def test_an_iterator_is_read_a_window_at_a_time(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching_of(small), "WINDOW", 4)
    read: list[int] = []
    encoded_when_read: list[int] = []
    encode = type(small).encode_prepared

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoded_when_read.append(len(read))
        return encode(self, *args, **kwargs)

    def texts() -> Iterator[str]:
        for number in range(10):
            read.append(number)
            yield f"text {number}"

    monkeypatch.setattr(type(small), "encode_prepared", counting)
    small.encode_texts(texts(), is_query=True, batch_size=4)
    assert encoded_when_read == [4, 8, 10]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("traced", [True, False], ids=["python", "process"])
def test_memory_grows_with_the_output_alone(small: Any, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching_of(small), "WINDOW", 32)

    def texts(number: int) -> Iterator[str]:
        return (f"{n} " + "abc " * 10000 for n in range(number))  # 40 kB each; its output is 1 kB

    small.encode_texts(texts(65), False, sparse_top_k=8)  # allocators and caches warm up
    if traced:
        tracemalloc.start()
        small.encode_texts(texts(350), False, sparse_top_k=8)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6_000_000  # a window of texts and their ids; all the texts are 14 MB
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out = small.encode_texts(texts(350), False, sparse_top_k=8)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert grown < 3 * sum(values.nbytes for values in out.values()) + 8_000_000
