"""What encode and the models' attributes offer in sentence-transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers_folders import TEXTS, Folders


@pytest.fixture
def dense(folders: Folders) -> Any:
    return folders.model("multi", "dense")


def test_kinds_of_output(dense: Any) -> None:
    array = dense.encode_query(TEXTS)
    tensor = dense.encode_query(TEXTS, convert_to_tensor=True)
    rows = dense.encode_query(TEXTS, convert_to_numpy=False)
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert isinstance(rows, list)
    assert torch.equal(torch.from_numpy(array), tensor)
    assert torch.equal(torch.stack(rows), tensor)
    assert array.shape == (len(TEXTS), 192)


def test_vectors_have_unit_length(dense: Any) -> None:
    plain, normalised = dense.encode_document(TEXTS), dense.encode_document(TEXTS, normalize_embeddings=True)
    assert np.allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-6)
    assert np.allclose(plain, normalised, atol=1e-6)


def test_truncated(folders: Folders, dense: Any) -> None:
    model = folders.load("multi", "dense", truncate_dim=32)
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    assert queries.shape == (len(TEXTS), 32)
    assert np.array_equal(queries, dense.encode_query(TEXTS)[:, :32])
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(documents, axis=1)
    assert np.allclose(model.similarity(queries, documents), queries @ documents.T / norms, atol=1e-5)
    short = dense.encode_query(TEXTS, truncate_dim=32, normalize_embeddings=True) if _takes_truncate_dim() else None
    assert short is None or np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)


def _takes_truncate_dim() -> bool:
    from inspect import signature

    from sentence_transformers import SentenceTransformer

    return "truncate_dim" in signature(SentenceTransformer.encode).parameters


def test_vectors_of_each_mask(dense: Any, folders: Folders) -> None:
    """output_value="token_embeddings" is the K vectors that the dense one is the mean of."""
    found = dense.encode_query(TEXTS, output_value="token_embeddings")
    expected = folders.plain("multi").encode_texts(TEXTS, True).repr_hidden
    torch.testing.assert_close(torch.stack(found), expected, atol=3e-6, rtol=0)
    everything = dense.encode_query(TEXTS, output_value=None)
    assert all(item["token_embeddings"].shape == (4, 192) for item in everything)


def test_quantised(dense: Any) -> None:
    bits = dense.encode_document(TEXTS, precision="ubinary")
    assert np.array_equal(bits, np.packbits(dense.encode_document(TEXTS) > 0, axis=1))


def test_progress_bar(folders: Folders, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = folders.model("single", kind)
    model.encode_query(TEXTS, batch_size=2, show_progress_bar=False)
    assert "Batches" not in capfd.readouterr().err
    model.encode_query(TEXTS, batch_size=2, show_progress_bar=True)
    assert "4/4" in capfd.readouterr().err


def test_dimensions(folders: Folders, kind: str) -> None:
    model = folders.model("multi", kind)
    name = (
        "get_embedding_dimension" if hasattr(model, "get_embedding_dimension") else "get_sentence_embedding_dimension"
    )
    expected = folders.plain("multi").config.vocab_size if kind == "sparse" else 192
    assert getattr(model, name)() == expected
    assert model[0].get_sentence_embedding_dimension() == expected
    assert model.encode_query(TEXTS)[0].shape[-1] == expected


@pytest.mark.filterwarnings("ignore:.*get_embedding_dimension")
def test_dimension_by_its_old_name(dense: Any, folders: Folders) -> None:
    assert dense.get_sentence_embedding_dimension() == 192
    assert folders.load("multi", "dense", truncate_dim=16).get_sentence_embedding_dimension() == 16


def test_max_seq_length(folders: Folders) -> None:
    model, plain = folders.load("single", "dense"), folders.plain("single")
    before = model.encode_document(TEXTS)
    assert model.max_seq_length == plain.config.max_length == 120
    model.max_seq_length = 40
    assert model.max_seq_length == 40
    after = model.encode_document(TEXTS)
    long = max(range(len(TEXTS)), key=lambda row: len(TEXTS[row]))
    assert not np.allclose(after[long], before[long], atol=1e-3)
    short = [row for row in range(len(TEXTS)) if len(TEXTS[row]) < 33 and TEXTS[row].isascii()]
    assert len(short) >= 3
    assert np.allclose(after[short], before[short], atol=3e-6)
    tokens = model[0].preprocess([TEXTS[long]], task="document")["input_ids"]
    assert tokens.shape[1] == 40 + 1 + 3  # the masks and the closing tokens come on top


@pytest.mark.parametrize("value", [0, 5, "many", None])
def test_max_seq_length_that_cannot_be(folders: Folders, value: Any) -> None:
    model = folders.model("single", "dense")
    with pytest.raises(ValueError, match=r"`max_length`"):
        model.max_seq_length = value
    assert model.max_seq_length == 120
    assert model.encode_query("it still works").shape == (192,)


def test_sparse_weights_kept(folders: Folders) -> None:
    model, plain = folders.model("multi", "sparse"), folders.plain("multi")
    found = model.encode_document(TEXTS, max_active_dims=3).to_dense()
    expected = plain.encode_texts(TEXTS, False, sparse_top_k=3)
    assert (found > 0).sum(dim=1).tolist() == (expected.sparse_values > 0).sum(dim=1).tolist()
    assert (found > 0).sum(dim=1).max() == 3
    torch.testing.assert_close(found.sort(dim=1).values[:, -3:].flip(1), expected.sparse_values, atol=2e-5, rtol=0)


def test_more_sparse_weights_than_the_release_keeps(folders: Folders) -> None:
    """max_active_dims may also be more than `sparse_top_k`."""
    model = folders.load("multi", "sparse", config_kwargs={"sparse_top_k": 4})
    text = "Copies directories to a remote machine, compresses archives, restores files, encrypts backups"
    assert len(model.decode(model.encode_document(text))) == 4
    assert len(model.decode(model.encode_document(text, max_active_dims=8))) == 8


def test_words_of_a_sparse_vector(folders: Folders) -> None:
    model = folders.model("single", "sparse")
    words = model.decode(model.encode_document("Plays MP3 and Ogg Vorbis files."), top_k=4)
    assert {word.strip("Ġ ").lower() for word, _ in words} <= {"plays", "mp", "mp3", "ogg", "vorbis", "files"}
    assert [weight for _, weight in words] == sorted((weight for _, weight in words), reverse=True)
    assert model.sparsity(model.encode_document(TEXTS))["active_dims"] < 40


def test_sparse_vectors_under_another_default_dtype_of_torch(folders: Folders) -> None:
    model, before = folders.model("single", "sparse"), torch.get_default_dtype()
    expected = model.encode_query(TEXTS).to_dense()
    torch.set_default_dtype(torch.float64)
    try:
        found = model.encode_query(TEXTS).to_dense()
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_sparse_output_as_plain_tensors(folders: Folders) -> None:
    model = folders.model("single", "sparse")
    sparse, plain = model.encode_query(TEXTS), model.encode_query(TEXTS, convert_to_sparse_tensor=False)
    assert sparse.is_sparse
    assert not plain.is_sparse
    assert torch.equal(sparse.to_dense(), plain)


def test_what_infinity_reads(dense: Any) -> None:
    """It takes a first architecture with "ColBERT" in its name for several vectors; tests/engines starts it."""
    assert dense[0].auto_model.config.architectures == ["DiffRetriever"]


def test_unknown_option(dense: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="is_query"):
        dense.encode(TEXTS, is_query=True)


def test_tokenizer_options_for_one_call(dense: Any) -> None:
    words = "so text cannot be set for the tokenizer; set max_seq_length"
    with pytest.raises(ValueError, match=words):
        dense[0].preprocess(TEXTS, task="query", processing_kwargs={"text": {"max_length": 9}})


def test_training_is_refused(folders: Folders) -> None:
    model = folders.load("single", "dense")
    features = model[0].preprocess(TEXTS, task="query")
    assert model(features)["sentence_embedding"].shape == (len(TEXTS), 192)  # as loaded, it encodes
    model.train()
    with pytest.raises(RuntimeError, match=r"gives no gradients in sentence-transformers.*diffretriever train"):
        model(model[0].preprocess(TEXTS, task="query"))
    assert model.encode_query(TEXTS).shape == (len(TEXTS), 192)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(folders: Folders, kind: str) -> None:
    model = folders.load("multi", kind, device=None)
    assert model.device.type == "cuda"
    on_gpu = model.similarity(model.encode_query(TEXTS), model.encode_document(TEXTS)).cpu()
    model = folders.model("multi", kind)
    expected = model.similarity(model.encode_query(TEXTS), model.encode_document(TEXTS))
    torch.testing.assert_close(on_gpu, expected, atol=1e-3, rtol=1e-3)
