"""Qdrant's embedded engine against exact search, its upload, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk

from diffretriever.cli.main import main
from diffretriever.search import MODES, EngineError, QdrantEngine, Searcher, upload
from diffretriever.search.qdrant import engine as module
from diffretriever.search.qdrant.calls import QdrantCalls
from diffretriever.search.qdrant.location import Location
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

    calls = QdrantCalls(location, make=True)
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


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("HTTP://localhost:6333", "http://localhost:6333"),
        ("https://host", "https://host:6333"),
        ("https://host/qdrant/", "https://host:443/qdrant"),
        ("http://host/qdrant", "http://host:80/qdrant"),
        ("https://host:8443/qdrant", "https://host:8443/qdrant"),
        ("http://[::1]:6333", "http://[::1]:6333"),
        ("index/qdrant", "index/qdrant"),
        ("./localhost:6333", "localhost:6333"),  # a folder
        (r"C:\index", r"C:\index"),
    ],
)
def test_a_location_is_an_address_or_a_folder(given: str, found: str) -> None:
    assert str(Location.of(given)) == found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *((given, "looks like a server's address; write http://") for given in (
            "localhost:6333", "localhost", "10.0.0.1", "[::1]:6333", "host:6333/x", "grpc://host:6334", "http:/host",
            "http:host", "x.eu.aws.cloud.qdrant.io", "file:///tmp/x")),
        *((given, "is no address; expected http://HOST:PORT") for given in (
            "http://host:x", "http://host:99999", "http://", "http:///x", "http://ho st", "http://host:0")),
        (":memory:", "keeps nothing; give a folder"),
        ("", "keeps nothing; give a folder"),
    ],
)  # fmt: skip
def test_what_looks_like_an_address_makes_no_folder(
    given: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        upload(vectors(0, 5, 2), given, "passages")
    with pytest.raises(ValueError, match=words):
        QdrantEngine(given, "passages")
    assert not list(tmp_path.iterdir())


def test_searching_makes_no_folder_and_uploading_takes_none_of_somebody_else(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="typo: no Qdrant collections here; make one with `diffretriever index`"
    ):
        QdrantEngine(str(tmp_path / "typo"), "passages")
    assert not (tmp_path / "typo").exists()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter.txt").touch()
    with pytest.raises(ValueError, match=r"theirs: holds 'letter.txt', but no Qdrant collections"):
        upload(vectors(0, 5, 2), str(tmp_path / "theirs"), "passages")
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["letter.txt"]
    (tmp_path / "theirs" / "meta.json").touch()
    with pytest.raises(ValueError, match="damaged or somebody else's"):
        upload(vectors(0, 5, 2), str(tmp_path / "theirs"), "passages")
    assert sorted(file.name for file in (tmp_path / "theirs").iterdir()) == ["letter.txt", "meta.json"]


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a:b", "x" * 256, "a\0b"])
def test_names_that_no_collection_can_have(location: str, name: str) -> None:
    for call in (lambda: upload(vectors(0, 5, 2), location, name), lambda: QdrantEngine(location, name)):
        with pytest.raises(ValueError, match="no collection can be called"):
            call()
    assert not Path(location).exists()


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4"])
def test_a_batch_size_is_a_count(location: str, size: Any) -> None:
    with pytest.raises(ValueError, match="`batch_size` must be a whole number of at least 1"):
        upload(vectors(0, 5, 2), location, "passages", batch_size=size)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_is_a_time(location: str, timeout: float) -> None:
    with pytest.raises(ValueError, match="the timeout must be a positive number of seconds"):
        upload(vectors(0, 5, 2), location, "passages", timeout=timeout)


def test_an_index_of_no_passages_is_an_error(location: str) -> None:
    with pytest.raises(ValueError, match="there are no passages to upload"):
        upload({"repr_hidden": torch.ones(0, 2, 4)}, location, "passages")
    assert not Path(location).exists()


@pytest.mark.parametrize("finished", [True, False])
def test_options_that_a_collection_was_made_without_are_refused(location: str, tmp_path: Path, finished: bool) -> None:
    store = make_store(tmp_path / "store")
    upload(store, location, "plain")
    upload(store, location, "scalar", quantization="scalar", texts=False)
    if not finished:
        calls = QdrantCalls(location)
        for name in ("plain", "scalar"):
            calls(calls.client.delete, name, points_selector=[3])
        calls.close()
    missing = 0 if finished else 1
    with pytest.raises(ValueError, match=r"'plain' was made with another quantization_config: None, not {'scalar"):
        upload(store, location, "plain", quantization="scalar")
    with pytest.raises(ValueError, match=r"'plain' was made with texts. Go on without --no-texts"):
        upload(store, location, "plain", texts=False)
    with pytest.raises(ValueError, match=r"'scalar' was made with another quantization_config: {'scalar.*'binary"):
        upload(store, location, "scalar", quantization="binary", texts=False)
    with pytest.raises(ValueError, match=r"'scalar' was made without texts. Go on with --no-texts"):
        upload(store, location, "scalar", quantization="scalar")
    assert upload(store, location, "plain") == missing
    assert upload(store, location, "scalar", quantization="scalar", texts=False) == missing


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"collections": 5}', '{"collections": {"a": {"vectors": 5}}}']
)
def test_a_folder_that_is_not_the_engines_own(location: str, content: str) -> None:
    Path(location).mkdir()
    (Path(location) / "meta.json").write_text(content)
    if content in ("", "{"):  # a new folder, when the disk was full
        assert upload(vectors(0, 5, 2), location, "passages") == 5
        return
    with pytest.raises(ValueError, match=f"{location}: the embedded engine's files are damaged or somebody else's"):
        upload(vectors(0, 5, 2), location, "passages")


@pytest.mark.parametrize("room", [16, 9_000, 13_000, 30_000])
def test_a_full_disk_under_the_embedded_engine(
    location: str, tmp_path: Path, room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "store")
    arguments = ["index", "--store", str(tmp_path / "store"), "--qdrant", location]
    with full_disk(room):
        status = main(arguments)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 3, said
    assert "same command" in said
    assert main(arguments) == 0
    engine = QdrantEngine(location, "passages")
    assert engine.ids([0, 29]) == ["passage 0", "passage 29"]
    engine.close()


def test_requests_are_of_bounded_size(engine: QdrantEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES_PER_REQUEST", 7)
    monkeypatch.setattr(module, "REQUEST_BYTES", 1)
    queries = vectors(1, 9, k=4)
    exact = Searcher(Store.open(tmp_path / "store")).search(queries, "fusion_multi_sparse_max", 30, candidates=None)
    found = Searcher(engine).search(queries, "fusion_multi_sparse_max", 30, candidates=None)
    assert torch.allclose(found.scores, exact.scores, atol=1e-6)
    assert found.ids == exact.ids


def test_a_passage_that_is_gone_is_said(engine: QdrantEngine) -> None:
    engine.calls(engine.calls.client.delete, "passages", points_selector=[3])
    with pytest.raises(
        EngineError, match=r"no longer holds the passage at position 3\. Run `diffretriever index` again"
    ):
        engine.texts([2, 3])


def test_vectors_that_are_not_finite_are_not_uploaded(location: str) -> None:
    passages = vectors(0, 5, 2)
    passages["repr_hidden"][3, 1, 0] = torch.nan
    with pytest.raises(ValueError, match="the vectors of '3' hold NaN or infinite values"):
        upload(passages, location, "passages")
