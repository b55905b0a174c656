"""The vectors and similarities of sentence-transformers are those of AutoModel and score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers_folders import CHECKPOINTS, MODES, RELEASES, TEXTS, Folders
from transformers import AutoModel

PASSAGES = [*TEXTS, "An SQL engine in a single library.", "Plays MP3 and Ogg Vorbis files from the internet."]


def as_lists(kind: str, vectors: Any) -> list[list[Any]]:
    """Return vectors as plain Python numbers, one list of vectors a text."""
    if kind == "multi-vector":
        return [text.tolist() for text in vectors]
    dense = vectors.to_dense() if isinstance(vectors, torch.Tensor) else vectors
    return [[text] for text in dense.tolist()]


def by_hand(kind: str, queries: list[list[Any]], passages: list[list[Any]]) -> torch.Tensor:
    """Score with loops over numbers: cosine, dot product, or the mean of the best similarities."""

    def dot(a: list[float], b: list[float]) -> float:
        total = sum(x * y for x, y in zip(a, b, strict=True) if x and y)
        return total / (dot(a, a) * dot(b, b)) ** 0.5 if kind == "dense" and a is not b else total

    return torch.tensor(
        [
            [sum(max(dot(q, p) for p in passage) for q in query) / len(query) for passage in passages]
            for query in queries
        ]
    )


def test_same_scores_as_automodel(folders: Folders, release: str, kind: str) -> None:
    model, plain = folders.model(release, kind), folders.plain(release)
    queries, passages = model.encode_query(TEXTS), model.encode_document(PASSAGES)
    found = model.similarity(queries, passages)
    expected = plain.score(plain.encode_texts(TEXTS, True), plain.encode_texts(PASSAGES, False), MODES[kind])
    assert found.shape == (len(TEXTS), len(PASSAGES))
    torch.testing.assert_close(found.float(), expected, atol=2e-5, rtol=1e-5)
    hand = by_hand(kind, as_lists(kind, queries), as_lists(kind, passages))
    torch.testing.assert_close(found.float(), hand, atol=2e-5, rtol=1e-5)
    pairs = model.similarity_pairwise(queries, model.encode_document(PASSAGES[: len(TEXTS)]))
    torch.testing.assert_close(pairs, found.diagonal(), atol=2e-5, rtol=1e-5)


def test_queries_with_budgets_of_their_own(folders: Folders, kind: str) -> None:
    """K_q differs within a batch: vectors that a query has not are in no mean, no maximum and no output."""
    table = {"length": [2, 8], "entropy": [], "num_query_masks": [[1], [3], [6]]}
    model = folders.load("multi", kind, config_kwargs={"query_budget_table": table})
    plain = model[0].model
    queries, passages = model.encode_query(TEXTS), model.encode_document(PASSAGES)
    expected = plain.encode_texts(TEXTS, True)
    counts = expected.repr_mask.sum(dim=1).tolist()
    assert set(counts) == {1, 3, 6}
    if kind == "multi-vector":
        assert [len(text) for text in queries] == counts
    scores = plain.score(expected, plain.encode_texts(PASSAGES, False), MODES[kind])
    torch.testing.assert_close(model.similarity(queries, passages).float(), scores, atol=2e-5, rtol=1e-5)
    # A query before a document that has more vectors than it, in one batch.
    features = model[0]._features([True, False, True], ["SQL", *TEXTS[:1], TEXTS[5]])
    if kind != "sparse":
        assert model[0](features)["attention_mask"].sum(dim=1).tolist() == [1, 4, 6]


@pytest.mark.parametrize("is_query", [True, False])
def test_same_vectors_as_automodel(folders: Folders, release: str, kind: str, is_query: bool) -> None:
    model, plain = folders.model(release, kind), folders.plain(release)
    found = (model.encode_query if is_query else model.encode_document)(TEXTS)
    expected = plain.encode_texts(TEXTS, is_query)
    if kind == "multi-vector":
        assert [text.shape for text in found] == [expected.repr_hidden.shape[1:]] * len(TEXTS)
        torch.testing.assert_close(torch.stack(list(found)), expected.repr_hidden, atol=3e-6, rtol=0)
    elif kind == "dense":
        means = expected.repr_hidden.mean(dim=1)
        torch.testing.assert_close(torch.from_numpy(found), means / means.norm(dim=1, keepdim=True), atol=3e-6, rtol=0)
        assert found.dtype == np.float32
    else:
        dense = found.to_dense()
        for row, (ids, weights) in enumerate(zip(expected.sparse_indices, expected.sparse_values, strict=True)):
            weight_of = {i: w for i, w in zip(ids.tolist(), weights.tolist(), strict=True) if w}
            assert set(dense[row].nonzero().flatten().tolist()) == set(weight_of)
            assert all(abs(dense[row, i].item() - w) < 2e-5 for i, w in weight_of.items())
        assert not dense[1].any()  # an empty text has no words


def test_sides_differ(folders: Folders, kind: str) -> None:
    """Else the tests above could not tell a query from a document."""
    model = folders.model("multi", kind)
    query, document = model.encode_query([TEXTS[0]])[0], model.encode_document([TEXTS[0]])[0]
    query, document = (torch.as_tensor(v.to_dense() if kind == "sparse" else v) for v in (query, document))
    assert not torch.allclose(query, document, atol=1e-3)


def test_similarity_functions(folders: Folders) -> None:
    assert folders.model("multi", "dense").similarity_fn_name == "cosine"
    assert folders.model("multi", "sparse").similarity_fn_name == "dot"


def test_similarity_of_several_vectors_is_the_mean(folders: Folders) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", "6")
    model, plain = folders.model("multi", "multi-vector"), folders.plain("multi")
    assert isinstance(model, sentence_transformers.MultiVectorEncoder)
    assert model.similarity_fn_name == "meanmaxsim"
    query, passage = model.encode_query(TEXTS[0]), model.encode_document(TEXTS[3])
    assert query.shape == (4, 192)
    expected = plain.score(plain.encode_texts(TEXTS[:1], True), plain.encode_texts(TEXTS[3:4], False), "multi_dense")
    torch.testing.assert_close(model.similarity(query, passage), expected, atol=2e-6, rtol=0)
    summed = folders.load("multi", "multi-vector", similarity_fn_name="maxsim")
    torch.testing.assert_close(summed.similarity(query, passage), 4 * expected, atol=8e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_do_not_matter(folders: Folders, kind: str, batch_size: int) -> None:
    model = folders.model("multi", kind)
    expected = as_lists(kind, model.encode_document(TEXTS))
    found = as_lists(kind, model.encode_document(TEXTS, batch_size=batch_size))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=3e-6, rtol=0)


def test_one_string_gives_one_vector(folders: Folders, kind: str) -> None:
    model = folders.model("multi", kind)
    one, many = model.encode_query(TEXTS[0]), model.encode_query(TEXTS[:1])[0]
    if kind == "sparse":
        one, many = one.to_dense(), many.to_dense()
    assert one.shape == many.shape
    assert np.allclose(one, many, atol=3e-6)


@pytest.mark.once
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_text(folders: Folders, texts: list[str]) -> None:
    model, plain = folders.model("single", "dense"), folders.plain("single")
    means = plain.encode_texts(texts, True).repr_hidden.mean(dim=1)
    found = torch.from_numpy(model.encode_query(texts))
    torch.testing.assert_close(found, means / means.norm(dim=1, keepdim=True), atol=3e-6, rtol=0)


def test_budgets_of_the_sides_may_differ(folders: Folders, kind: str) -> None:
    """K_q = 2 beside K_p = 4, also in one batch."""
    model = folders.load("multi", kind, config_kwargs={"num_query_masks": 2})
    options = {"num_query_masks": 2, "torch_dtype": torch.float32}
    plain = AutoModel.from_pretrained(CHECKPOINTS / RELEASES["multi"], trust_remote_code=True, **options)
    expected = plain.score(plain.encode_texts(TEXTS, True), plain.encode_texts(PASSAGES, False), MODES[kind])
    found = model.similarity(model.encode_query(TEXTS), model.encode_document(PASSAGES))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    mixed = model.encode(["<|query|>" + text for text in TEXTS] + ["<|document|>" + text for text in PASSAGES])
    if kind == "multi-vector":
        assert [len(text) for text in mixed] == [2] * len(TEXTS) + [4] * len(PASSAGES)
    if kind == "sparse":
        found = (mixed @ mixed.T).to_dense()[: len(TEXTS), len(TEXTS) :]
    else:
        found = model.similarity(mixed[: len(TEXTS)], mixed[len(TEXTS) :])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
