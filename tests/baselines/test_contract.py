"""The contract that DiffRetriever and the baselines share, so that the tools need not know which they have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from causal_backbones import TEXTS
from torch.nn import functional as F

from diffretriever.baselines.contract import RetrievalConfig, RetrievalModel, RetrievalTexts
from diffretriever.model.scoring import SCORING_MODES
from diffretriever.store.identity import describe_model

MODELS = ("diffretriever", "promptreps", "repllama", "diffembed")
DENSE_ONLY = ("repllama", "diffembed")


@pytest.fixture(params=MODELS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(method: str, load: Callable[..., Any], load_release: Callable[..., Any]) -> Any:
    if method == "diffretriever":
        return load_release("tiny-llada", "llada-q4p4")
    return load(
        method, "llama", **({"num_query_vectors": 4, "num_passage_vectors": 3} if method == "promptreps" else {})
    )


def test_each_method_is_a_retrieval_model(model: Any) -> None:
    assert isinstance(model, RetrievalModel)
    assert isinstance(model.config, RetrievalConfig)
    assert isinstance(model.texts, RetrievalTexts)
    for name in ("tokenize", "encode", "encode_prepared", "encode_texts", "score", "encode_batches"):
        promised = inspect.signature(getattr(RetrievalModel, name)).parameters
        assert list(inspect.signature(getattr(type(model), name)).parameters) == list(promised)


def test_an_identity_can_be_made_of_it(model: Any) -> None:
    settings = describe_model(model, True, "float32")
    assert settings.num_masks == model.config.num_masks(True)
    assert settings.hidden_size == model.encode_texts(["a"], True).repr_hidden.shape[2]


@pytest.mark.parametrize("is_query", [True, False])
def test_encode_texts_is_encode_in_order(model: Any, is_query: bool) -> None:
    out = model.encode_texts(TEXTS, is_query, tokens_per_batch=300)
    sparse = "sparse_indices" in out
    assert sparse == (model.config.sparse_top_k > 0)
    assert out.repr_hidden.shape == (len(TEXTS), model.config.num_masks(is_query), model.config.hidden_size)
    for row, text in enumerate(TEXTS):
        alone = model.encode(*model.tokenize([text], is_query), is_query, compute_sparse=sparse)
        assert alone.keys() == out.keys()
        for name, values in alone.items():
            assert values.dtype == out[name].dtype
            assert torch.allclose(values[0].float(), out[name][row].float(), rtol=0, atol=2e-5), name


def test_sides_are_true_or_false(model: Any) -> None:
    with pytest.raises(TypeError, match="`is_query` must be True"):
        model.tokenize(TEXTS, "passage")
    with pytest.raises(TypeError, match="`is_query` must be True"):
        model.encode(*model.tokenize(TEXTS, False), "passage")


def test_prepared_texts_are_those_of_encode(model: Any) -> None:
    sparse = model.config.sparse_top_k > 0
    texts = [*TEXTS, "word " * 300]
    prepared = model.texts.prepare(texts, True, content_filter=sparse)
    assert prepared[-1].cut
    assert not prepared[0].cut
    found = model.encode_prepared(prepared, True, sparse)
    expected = model.encode(*model.tokenize(texts, True), True, compute_sparse=sparse)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.allclose(found[name].float(), values.float(), rtol=0, atol=2e-5), name


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_any_source(model: Any, kind: Any) -> None:
    expected = model.encode_texts(TEXTS, True).repr_hidden
    assert torch.allclose(model.encode_texts(kind(TEXTS), True).repr_hidden, expected, rtol=0, atol=1e-5)


def test_progress_bar(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model.encode_texts(TEXTS, True, show_progress_bar=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


def test_vectors_are_normalised_unless_the_config_says_not(model: Any) -> None:
    ids, mask = model.tokenize(TEXTS, True)
    found = model.encode(ids, mask, True)
    exists = found.get("repr_mask", torch.ones(found.repr_hidden.shape[:2], dtype=torch.bool))
    assert torch.allclose(found.repr_hidden[exists].norm(dim=-1), torch.ones(int(exists.sum())), atol=1e-5)
    model.config.normalize = False
    try:
        raw = model.encode(ids, mask, True).repr_hidden
    finally:
        model.config.normalize = True
    assert not torch.allclose(raw[exists].norm(dim=-1), torch.ones(int(exists.sum())), atol=0.1)
    assert torch.allclose(F.normalize(raw, dim=-1), found.repr_hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "error", "said"),
    [("a", TypeError, "write"), ([], ValueError, "is empty"), (["a", 3], TypeError, r"`texts\[1\]` must be a string")],
)
def test_texts_that_are_none(model: Any, texts: Any, error: type[Exception], said: str) -> None:
    for ask in (model.tokenize, model.encode_texts):
        with pytest.raises(error, match=said):
            ask(texts, True)


def test_ids_that_are_none_of_this_side(model: Any, method: str) -> None:
    ids, mask = model.tokenize(["a"], False)
    with pytest.raises(ValueError, match="input_ids must be an integer tensor"):
        model.encode(ids.float(), mask, False)
    if method in ("diffretriever", "promptreps"):
        with pytest.raises(ValueError, match=r"is a passage, but encode|does not have this model's query prompt|MASK"):
            model.encode(ids, mask, True)


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("mode", SCORING_MODES)
def test_scores(model: Any, mode: str, method: str) -> None:
    queries, passages = model.encode_texts(TEXTS[:4], True), model.encode_texts(TEXTS, False)
    if method in DENSE_ONLY and "sparse" in mode:
        with pytest.raises(
            ValueError, match=rf"has no sparse vectors for mode '{mode}'; its modes are single_dense and"
        ):
            model.score(queries, passages, mode)
        return
    assert model.score(queries, passages, mode).shape == (4, len(TEXTS))


def test_sides_that_are_swapped(model: Any) -> None:
    queries, passages = model.encode_texts(["a"], True), model.encode_texts(["b"], False)
    with pytest.raises(ValueError, match=r"`queries` are encoded passages .* swap the two"):
        model.score(passages, queries, "multi_dense")


def test_vectors_that_do_not_exist_count_nowhere(load: Callable[..., Any]) -> None:
    model = load("promptreps", "llama", num_query_vectors=4, num_passage_vectors=3)
    queries, passages = model.encode_texts(TEXTS, True), model.encode_texts(TEXTS, False)
    multi, single = model.score(queries, passages), model.score(queries, passages, "single_dense")
    assert not queries.repr_mask.all()
    assert not passages.repr_mask.all()
    for q, query in enumerate(queries.repr_hidden):
        mine = query[queries.repr_mask[q]]
        for p, passage in enumerate(passages.repr_hidden):
            theirs = passage[passages.repr_mask[p]]
            assert multi[q, p].item() == pytest.approx((mine @ theirs.T).amax(dim=1).mean().item(), abs=1e-5)
            means = F.cosine_similarity(mine.mean(dim=0), theirs.mean(dim=0), dim=0)
            assert single[q, p].item() == pytest.approx(means.item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------ sparse vectors


@pytest.mark.parametrize("method", DENSE_ONLY)
def test_sparse_vectors_of_a_method_without(load: Callable[..., Any], method: str) -> None:
    model = load(method, "llama")
    with pytest.raises(ValueError, match="has no sparse vectors; leave compute_sparse out"):
        model.encode_texts(["a"], True, compute_sparse=True)


def test_a_sparse_vocabulary_of_the_callers(load: Callable[..., Any]) -> None:
    model = load("promptreps", "llama", num_query_vectors=4)
    ids, mask = model.tokenize(["moon tides", "a"], True)
    given = model.encode(ids, mask, True, compute_sparse=True, content_token_ids=[[7, 9], []])
    assert set(given.sparse_indices[0].tolist()) <= {0, 7, 9}
    assert not given.sparse_values[1].any()
    with pytest.raises(ValueError, match="content_token_ids has 1 lists for 2 texts"):
        model.encode(ids, mask, True, compute_sparse=True, content_token_ids=[[7]])
    with pytest.raises(ValueError, match="leave `content_token_ids` out"):
        model.encode(ids, mask, True, compute_sparse=True, content_token_ids=[[7], [9]], content_filter=False)
    with pytest.raises(ValueError, match="`sparse_top_k` must be a whole number"):
        model.encode(ids, mask, True, compute_sparse=True, sparse_top_k=0)


# ------------------------------------------------------------------------------------------------ overflow


def test_vectors_that_are_not_finite(load: Callable[..., Any]) -> None:
    model = load("repllama", "qwen2")
    ids, mask = model.tokenize(["a", "b"], True)
    norm = model.backbone.model.norm.weight
    before = norm.detach().clone()
    norm.data[3] = torch.inf
    try:
        with pytest.raises(ValueError, match=r"rows \[0, 1\] are not finite: the weights backbone.model.norm.weight"):
            model.encode(ids, mask, True)
    finally:
        norm.data.copy_(before)
