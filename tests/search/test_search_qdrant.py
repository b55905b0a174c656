"""Qdrant's embedded engine against exact search, its upload, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffretriever.search import MODES, EngineError, QdrantEngine, Searcher, upload
from diffretriever.search.qdrant.calls import QdrantCalls
from diffretriever.store.store import ShardContents, Store, write_store

WIDTH, TERMS = 12, 6


def vectors(seed: int, texts: int, k: int, missing: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = {"repr_hidden": torch.nn.functional.normalize(torch.randn(texts, k, WIDTH, generator=generator), dim=-1)}
    side["sparse_indices"] = torch.randint(0, 20, (texts, TERMS), generator=generator)
    side["sparse_values"] = torch.rand(texts, TERMS, generator=generator) * (torch.arange(TERMS) < 4)
    if missing:
        side["repr_mask"] = torch.rand(texts, k, generator=generator) > 0.5
    return side


def make_store(folder: Path, texts: int = 30, seed: int = 0, **fields: Any) -> Store:
    """Write a store of two shards."""
    side, shards = vectors(seed, texts, 3), []
    for start in range(0, texts, texts // 2):
        part = {name: tensor[start : start + texts // 2] for name, tensor in side.items()}
        names = [f"passage {start + row}" for row in range(len(part["repr_hidden"]))]
        shards.append(ShardContents(names, **part, texts=[f"Text of {name}." for name in names]))
    return write_store(folder, shards, {"dtype": "float32", **fields})


@pytest.fixture
def location(tmp_path: Path) -> str:
    return str(tmp_path / "qdrant")


@pytest.fixture
def engine(location: str, tmp_path: Path) -> Iterator[QdrantEngine]:
    """A collection uploaded from a store of 30 passages."""
    upload(make_store(tmp_path / "store"), location, "passages")
    engine = QdrantEngine(location, "passages")
    yield engine
    engine.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("candidates", "fusion"), [(7, "exact"), (7, "runs"), (None, "exact")])
def test_equals_exact_search(
    engine: QdrantEngine, tmp_path: Path, mode: str, candidates: int | None, fusion: str
) -> None:
    queries = vectors(1, 9, k=4)
    exact = Searcher(Store.open(tmp_path / "store"), fusion=fusion).search(queries, mode, 5, candidates=candidates)
    found = Searcher(engine, fusion=fusion).search(queries, mode, 5, candidates=candidates)
    assert found.ids == exact.ids
    assert torch.allclose(found.scores, exact.scores, atol=1e-6)
    assert torch.equal(found.positions, exact.positions)


@pytest.mark.parametrize("mode", MODES)
def test_missing_vectors_and_empty_sparse_ones(location: str, mode: str) -> None:
    passages, queries = vectors(2, 25, k=2, missing=True), vectors(3, 12, k=2, missing=True)
    passages["sparse_values"][::4], queries["sparse_values"][::3] = 0.0, 0.0
    upload(passages, location, "some")
    engine = QdrantEngine(location, "some")
    for candidates in (3, None):
        exact = Searcher(passages).search(queries, mode, 4, candidates=candidates)
        found = Searcher(engine).search(queries, mode, 4, candidates=candidates)
        for mine, theirs in zip(exact, found, strict=True):
            assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in theirs], abs=1e-6)
    engine.close()


def test_a_second_upload_sends_nothing(location: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    assert upload(store, location, "passages") == 30
    assert upload(store, location, "passages") == 0


def test_an_interrupted_upload_is_refused_then_completed(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store")
    sent = []

    def dies(self: QdrantCalls, method: Any, *arguments: Any, **options: Any) -> Any:
        if method.__name__ == "upsert":
            sent.append(len(options["points"]))
            if len(sent) == 3:
                raise KeyboardInterrupt
        return method(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(QdrantCalls, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            upload(store, location, "passages", batch_size=4)
    with pytest.raises(EngineError, match=r"'passages' holds 8 of 30 passages; its upload was interrupted"):
        QdrantEngine(location, "passages")
    assert upload(store, location, "passages", batch_size=7) == 22
    engine = QdrantEngine(location, "passages")
    queries = vectors(5, 3, k=1)
    exact = Searcher(store).search(queries, "multi_dense", 30)
    assert Searcher(engine).search(queries, "multi_dense", 30).ids == exact.ids
    engine.close()


def test_holes_are_found_and_filled(location: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    upload(store, location, "passages")
    calls = QdrantCalls(location)
    calls(calls.client.delete, "passages", points_selector=[3, 17])
    calls.close()
    assert upload(store, location, "passages", batch_size=5) == 2


def test_payload_holds_id_and_text(engine: QdrantEngine) -> None:
    assert engine.ids([4, 29]) == ["passage 4", "passage 29"]
    assert engine.texts([29, 0]) == ["Text of passage 29.", "Text of passage 0."]


def test_texts_can_stay_at_home(location: str, tmp_path: Path) -> None:
    upload(make_store(tmp_path / "store"), location, "passages", texts=False)
    engine = QdrantEngine(location, "passages")
    assert engine.texts([0]) == [None]
    engine.close()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weights_sha256": "other"}, "`weights` '', not 'other'"),
        ({"prompts": {"query": {"user": "Q {text}"}}}, "`prompts.query` none, not one"),
    ],
)
def test_a_collection_of_another_model_is_refused(
    location: str, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    upload(make_store(tmp_path / "store"), location, "passages")
    with pytest.raises(ValueError, match=r"made from other passages or another model") as raised:
        upload(make_store(tmp_path / "other", **fields), location, "passages")
    assert any(word in str(raised.value) for word in words.split("|"))


def test_a_collection_of_other_dimensions_is_refused(location: str) -> None:
    upload(vectors(0, 5, 2), location, "passages")
    wide = {"repr_hidden": torch.ones(5, 2, 16), **{k: v for k, v in vectors(0, 5, 2).items() if k != "repr_hidden"}}
    with pytest.raises(ValueError, match=r"`hidden_size` 12, not 16"):
        upload(wide, location, "passages")


def test_a_collection_of_another_corpus_is_refused(location: str, tmp_path: Path) -> None:
    upload(make_store(tmp_path / "store"), location, "passages")
    with pytest.raises(ValueError, match=r"`count` 30, not 20"):
        upload(make_store(tmp_path / "other", texts=20), location, "passages")


def test_a_strangers_collection_is_refused(location: str) -> None:
    from qdrant_client import models

    calls = QdrantCalls(location)
    plain = models.VectorParams(size=4, distance=models.Distance.DOT)
    calls(calls.client.create_collection, "theirs", vectors_config=plain)
    calls.close()
    with pytest.raises(ValueError, match="'theirs' was not made by `diffretriever index`"):
        upload(vectors(0, 5, 2), location, "theirs")
    with pytest.raises(ValueError, match=r"no collection 'mine'; there is theirs"):
        QdrantEngine(location, "mine")


def test_queries_of_another_model_are_refused(engine: QdrantEngine, tmp_path: Path) -> None:
    queries = make_store(tmp_path / "queries", seed=4, side="query", adapter_sha256="another")
    with pytest.raises(ValueError, match=r"`adapter` none, not 'another'. Encode both"):
        Searcher(engine).search(queries, "multi_dense")
    with pytest.raises(ValueError, match="queries have 7 dimensions, passages 12"):
        Searcher(engine).search({"repr_hidden": torch.ones(1, 1, 7)}, "multi_dense")


def test_a_folder_in_use_is_named(engine: QdrantEngine, location: str) -> None:
    with pytest.raises(EngineError, match="in use by another process"):
        QdrantEngine(location, "passages")


def test_quantisation_words(location: str, tmp_path: Path) -> None:
    from qdrant_client import models

    upload(make_store(tmp_path / "store"), location, "scalar", quantization="scalar")
    calls = QdrantCalls(location)
    chosen = calls(calls.client.get_collection, "scalar").config.params.vectors["multi"].quantization_config
    assert chosen.scalar.type == models.ScalarType.INT8
    calls.close()
    with pytest.raises(ValueError, match="'octal' is not known; it is one of scalar, binary"):
        upload(make_store(tmp_path / "again"), location, "octal", quantization="octal")


def test_requests_stay_below_a_servers_limit() -> None:
    from diffretriever.search.qdrant.upload import default_batch_size
    from diffretriever.store.segments import TensorSegment

    for k, width, expected in ((1, 8, 256), (4, 4096, 48), (16, 4096, 14), (64, 65536, 1)):
        size = default_batch_size([TensorSegment(torch.ones(1, 1, 1).expand(1, k, width))])
        assert size == expected
        assert size == 1 or size * (k + 1) * width * 20 <= 32 * 1024 * 1024  # bytes of JSON
