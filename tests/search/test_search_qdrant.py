"""Qdrant's engine in a folder against exact search, its upload, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fresh
import pytest
import torch
from full_disk import full_disk
from pretend_gpu import GPU, pretended_gpu

from diffretriever.cli.main import main
from diffretriever.search import MODES, EngineAwayError, EngineError, QdrantEngine, Searcher, upload
from diffretriever.search.qdrant import edge as in_a_folder
from diffretriever.search.qdrant import engine as module
from diffretriever.search.qdrant.location import Location
from diffretriever.store.store import ShardContents, Store, write_store

qdrant_edge = pytest.importorskip("qdrant_edge")
WIDTH, TERMS = 12, 6


def vectors(seed: int, texts: int, k: int, missing: bool = False, width: int = WIDTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = {"repr_hidden": torch.nn.functional.normalize(torch.randn(texts, k, width, generator=generator), dim=-1)}
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
def location() -> Iterator[str]:
    """A folder in memory, where there is one: the engine forces much to the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield f"{folder}/qdrant"


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


def test_passages_may_be_on_an_accelerator(location: str) -> None:
    """As `model.encode` returns them there."""
    passages, queries = vectors(2, 9, k=2, missing=True), vectors(3, 4, k=2)
    with pretended_gpu():
        upload({name: tensor.to(GPU) for name, tensor in passages.items()}, location, "some")
    engine = QdrantEngine(location, "some")
    for mode in ("single_dense", "multi_dense"):
        assert Searcher(engine).search(queries, mode, 3).ids == Searcher(passages).search(queries, mode, 3).ids
    engine.close()


def test_passages_without_sparse_vectors_are_refused_as_in_exact_search(location: str) -> None:
    passages, queries = ({**vectors(seed, 9, k=2)} for seed in (2, 3))
    del passages["sparse_indices"], passages["sparse_values"]
    upload(passages, location, "dense")
    engine = QdrantEngine(location, "dense")
    for mode in MODES[2:]:
        for searcher in (Searcher(passages), Searcher(engine)):
            with pytest.raises(ValueError, match="the passages have no sparse vectors"):
                searcher.search(queries, mode, 3)
    assert Searcher(engine).search(queries, "multi_dense", 3).ids == Searcher(passages).search(queries, top_k=3).ids
    engine.close()


def test_a_second_upload_sends_nothing(location: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    assert upload(store, location, "passages") == 30
    assert upload(store, location, "passages") == 0


def test_an_interrupted_upload_is_refused_then_completed(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, add = make_store(tmp_path / "store"), in_a_folder.EdgeCollection.add
    sent = []

    def dies(self: in_a_folder.EdgeCollection, points: Sequence[Any]) -> None:
        sent.append(len(points))
        if len(sent) == 3:
            raise KeyboardInterrupt
        add(self, points)

    with monkeypatch.context() as patch:
        patch.setattr(in_a_folder.EdgeCollection, "add", dies)
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


def remove_points(location: str, collection: str, *numbers: int) -> None:
    """Take points out of a collection without our code."""
    shard = qdrant_edge.EdgeShard.load(str(Path(location) / collection / "engine"))
    shard.update(qdrant_edge.UpdateOperation.delete_points(list(numbers)))
    shard.flush()
    shard.close()


def test_holes_are_found_and_filled(location: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    upload(store, location, "passages")
    remove_points(location, "passages", 3, 17)
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


def test_a_collection_that_is_not_there(engine: QdrantEngine, location: str) -> None:
    with pytest.raises(
        ValueError, match=r"no collection 'mine'; there is passages\. Make it with `diffretriever index`"
    ):
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


INDEXES: list[dict[str, Any]] = [{"hnsw": True}, {"quantization": "scalar"}, {"quantization": "scalar", "hnsw": True}]


@pytest.mark.parametrize("options", INDEXES, ids=str)
def test_chosen_indexes_find_nearly_all_and_score_exactly(
    location: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(in_a_folder, "SCANNED", 10)  # kilobytes: the graph is asked, though these are a hundred
    asked: list[bool] = []

    def noted(**fields: Any) -> Any:
        asked.append(fields["params"].exact)
        return request(**fields)

    request = qdrant_edge.QueryRequest
    monkeypatch.setattr(qdrant_edge, "QueryRequest", noted)
    passages, queries = vectors(2, 400, k=2, width=32), vectors(3, 20, k=2, width=32)
    exact = Searcher(passages).search(queries, "multi_dense", 400)
    scores = [{hit.id: hit.score for hit in hits} for hits in exact]
    upload(passages, location, "some", **options)
    params = {"as it was made": None, "no looking around": qdrant_edge.SearchParams(hnsw_ef=1)}
    shared = {}
    for name, given in params.items():
        with contextlib.closing(QdrantEngine(location, "some", search_params=given)) as engine:
            found = Searcher(engine).search(queries, "multi_dense", 10)
        shared[name] = sum(len({*mine[:10]} & {*theirs}) for mine, theirs in zip(exact.ids, found.ids, strict=True))
        if given is None:
            for row, hits in enumerate(found):
                assert [hit.score for hit in hits] == pytest.approx([scores[row][hit.id] for hit in hits], abs=1e-5)
    assert shared["as it was made"] >= 0.9 * 200
    assert (shared["no looking around"] < 0.9 * 200) == options.get("hnsw", False)  # there is a graph, and it is asked
    assert not any(asked)
    with contextlib.closing(
        QdrantEngine(location, "some", search_params=qdrant_edge.SearchParams(exact=True))
    ) as engine:
        assert Searcher(engine).search(queries, "multi_dense", 10).ids == [ids[:10] for ids in exact.ids]


def test_a_graph_is_built_where_it_was_chosen_alone(location: str) -> None:
    passages = vectors(2, 40, k=2)
    upload(passages, location, "plain")
    upload(passages, location, "graph", hnsw=True)
    for name, indexed in (("plain", 0), ("graph", 40)):
        shard = qdrant_edge.EdgeShard.load(str(Path(location) / name / "engine"))
        assert shard.info().indexed_vectors_count >= indexed
        assert any(Path(location).glob(f"{name}/engine/segments/*/vector_index-multi/graph.bin")) == bool(indexed)
        shard.close()


def test_options_of_a_folder(location: str) -> None:
    with pytest.raises(ValueError, match="'octal' is not known; it is one of scalar, binary"):
        upload(vectors(0, 5, 2), location, "octal", quantization="octal")
    with pytest.raises(ValueError, match="shard_number: for Qdrant servers; a folder has no such option"):
        upload(vectors(0, 5, 2), location, "sharded", shard_number=3)
    assert not Path(location).exists()


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
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "letter.txt").touch()
    for call in (lambda: upload(vectors(0, 5, 2), str(theirs), "passages"), lambda: QdrantEngine(str(theirs), "x")):
        with pytest.raises(ValueError, match=r"theirs: holds 'letter.txt', which is no collection of ours"):
            call()
    assert [file.name for file in theirs.iterdir()] == ["letter.txt"]


def test_an_engine_of_somebody_else_is_refused(tmp_path: Path) -> None:
    config = qdrant_edge.EdgeConfig(vectors=qdrant_edge.EdgeVectorParams(4, qdrant_edge.Distance.Dot))
    for folder in (tmp_path / "theirs", tmp_path / "their" / "passages"):
        folder.mkdir(parents=True)
        qdrant_edge.EdgeShard.create(str(folder), config).close()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="which is no collection of ours; choose another folder"):
            upload(vectors(0, 5, 2), str(tmp_path / folder.relative_to(tmp_path).parts[0]), "passages")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_qdrant_clients_local_mode_is_told_what_to_do(location: str) -> None:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=location)
    client.create_collection("passages", models.VectorParams(size=4, distance=models.Distance.DOT))
    client.close()
    words = "qdrant-client's local mode, which is no longer read. Run `diffretriever index` with the store and another"
    for call in (lambda: upload(vectors(0, 5, 2), location, "passages"), lambda: QdrantEngine(location, "passages")):
        with pytest.raises(ValueError, match=words):
            call()


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
        for name in ("plain", "scalar"):
            remove_points(location, name, 3)
    missing = 0 if finished else 1
    with pytest.raises(ValueError, match=r"'plain' was made with another quantization: None, not 'scalar'"):
        upload(store, location, "plain", quantization="scalar")
    with pytest.raises(ValueError, match=r"'plain' was made with another hnsw: False, not True"):
        upload(store, location, "plain", hnsw=True)
    with pytest.raises(ValueError, match=r"'plain' was made with texts. Go on without --no-texts"):
        upload(store, location, "plain", texts=False)
    with pytest.raises(ValueError, match=r"'scalar' was made with another quantization: 'scalar', not 'binary'"):
        upload(store, location, "scalar", quantization="binary", texts=False)
    with pytest.raises(ValueError, match=r"'scalar' was made without texts. Go on with --no-texts"):
        upload(store, location, "scalar", quantization="scalar")
    assert upload(store, location, "plain") == missing
    assert upload(store, location, "scalar", texts=False) == missing


RECORD = (
    '{"passages": {"count": 5, "hidden_size": 12, "sparse": true}, "options": {"texts": false, "quantization": null}}'
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "diffretriever.json: not valid JSON"),
        ("[]", "diffretriever.json: "),
        ("{}", "diffretriever.json: expected keys and values"),
        ('{"passages": {"count": "5", "hidden_size": 12}}', "count must be of type int"),
        (RECORD.replace("5,", "0,"), "`count` is 0"),
        (RECORD.partition(', "options"')[0] + "}", "options: expected keys and values"),
        (RECORD.replace("null", "5"), "quantization"),
    ],
)
def test_a_damaged_record(location: str, content: str, words: str) -> None:
    upload(vectors(0, 5, 2), location, "passages")
    (Path(location) / "passages" / "diffretriever.json").write_text(content)
    for call in (lambda: upload(vectors(0, 5, 2), location, "passages"), lambda: search(location)):
        with pytest.raises(ValueError, match=words):
            call()


def search(location: str) -> None:
    """Ask the collection one question."""
    with contextlib.closing(QdrantEngine(location, "passages")) as engine:
        Searcher(engine).search(vectors(1, 1, 1), "multi_dense")


@pytest.mark.parametrize("name", ["edge_config.json", "status.dat"])
def test_damaged_files_of_the_engine(location: str, name: str) -> None:
    """The first is an error of the engine's, the second makes it panic."""
    upload(vectors(0, 5, 2), location, "passages")
    damaged = next((Path(location) / "passages" / "engine").rglob(name))
    damaged.write_bytes(damaged.read_bytes()[:1])
    with pytest.raises(
        ValueError, match=r"passages: the engine's files are damaged or somebody else's .* remove this folder"
    ):
        QdrantEngine(location, "passages")


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (
            "failed to open WAL passages/wal: Permission denied (os error 13)",
            PermissionError,
            "the engine must be able to write in its folder, to search, too",
        ),
        (
            "Service runtime error: Not enough space available for optimization, needed: 18.46 GiB, available: 17 GiB",
            EngineAwayError,
            r"needed: 18\.46 GiB, available: 17 GiB\)\. Make room and run the same command again",
        ),
    ],
)
def test_what_the_engine_cannot_do_here(
    location: str, monkeypatch: pytest.MonkeyPatch, words: str, error: type[Exception], told: str
) -> None:
    upload(vectors(0, 5, 2), location, "passages")

    class Refused:
        @staticmethod
        def load(path: str) -> None:
            raise Exception(words)

    monkeypatch.setattr(qdrant_edge, "EdgeShard", Refused)
    with pytest.raises(error, match=told):
        QdrantEngine(location, "passages")


@pytest.mark.parametrize("room", [16, 9_000, 2_000_000])
def test_a_full_disk(location: str, tmp_path: Path, room: int, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_disk_that_is_nearly_full_is_said_before_it_ends_the_process(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=200 << 20))
    with pytest.raises(EngineAwayError, match=r"less than 256 MiB are free on this disk\. Make room and run the same"):
        upload(vectors(0, 5, 2), location, "passages")
    monkeypatch.undo()
    assert upload(vectors(0, 5, 2), location, "passages") == 5


def test_what_is_uploaded_leaves_the_engines_log(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would else be as long as the collection is large, until the upload ends; flushing empties it."""
    create, flushed = qdrant_edge.EdgeShard.create, []

    class Shard:
        def __init__(self, *arguments: Any) -> None:
            self.shard = create(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.shard, name)

        def flush(self) -> None:
            self.shard.flush()
            flushed.append(self.shard.count(qdrant_edge.CountRequest(exact=True)))

    monkeypatch.setattr(qdrant_edge, "EdgeShard", SimpleNamespace(create=Shard))
    monkeypatch.setattr(in_a_folder, "LOGGED", 9 * WIDTH * 3)  # numbers of some 9 passages
    upload(vectors(0, 20, 2), location, "passages", batch_size=5)
    assert flushed == [10, 20, 20]


def upload_slowly(location: str, begun: Any) -> None:
    """Upload without end in another process."""
    add = in_a_folder.EdgeCollection.add

    def slowly(self: in_a_folder.EdgeCollection, points: Sequence[Any]) -> None:
        add(self, points)
        if points[0].number >= 8:
            begun.set()
            time.sleep(60)

    in_a_folder.EdgeCollection.add = slowly  # type: ignore[method-assign]
    upload(vectors(0, 40, 2), location, "passages", batch_size=4)


@pytest.mark.slow
@pytest.mark.once
def test_a_killed_upload_goes_on(location: str) -> None:
    begun = fresh.CONTEXT.Event()
    child = fresh.CONTEXT.Process(target=upload_slowly, args=(location, begun))
    child.start()
    assert begun.wait(60)
    with pytest.raises(EngineAwayError, match="the folder is in use by another process"):
        upload(vectors(0, 40, 2), location, "passages")
    child.kill()
    child.join()
    assert upload(vectors(0, 40, 2), location, "passages") == 28
    engine = QdrantEngine(location, "passages")
    queries = vectors(5, 3, k=1)
    assert Searcher(engine).search(queries, "multi_dense", 40).ids == (
        Searcher(vectors(0, 40, 2)).search(queries, "multi_dense", 40).ids
    )
    engine.close()


@pytest.mark.parametrize(
    "left", [[".unfinished-diffretriever.json-1"], ["diffretriever.json", "engine/wal/open-1"], []]
)
def test_a_collection_that_was_hardly_begun_is_made_anew(location: str, left: list[str]) -> None:
    (Path(location) / "passages").mkdir(parents=True)
    for name in left:
        file = Path(location) / "passages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{")
    assert upload(vectors(0, 5, 2), location, "passages") == 5


def test_requests_are_of_bounded_size(engine: QdrantEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES_PER_REQUEST", 7)
    monkeypatch.setattr(in_a_folder, "QUERIES_AT_ONCE", 2)
    sizes: dict[str, list[int]] = {"QueryBatchRequest": [], "HasIdCondition": []}

    def note(name: str, made: Any, parts: Any) -> Any:
        sizes[name].append(len(parts))
        return made(parts)

    for name in sizes:
        monkeypatch.setattr(qdrant_edge, name, partial(note, name, getattr(qdrant_edge, name)))
    queries = vectors(1, 9, k=4)
    exact = Searcher(Store.open(tmp_path / "store")).search(queries, "fusion_multi_sparse_max", 6, candidates=20)
    found = Searcher(engine).search(queries, "fusion_multi_sparse_max", 6, candidates=20)
    assert max(sizes["QueryBatchRequest"]) == 2  # queries
    assert max(sizes["HasIdCondition"]) == 7  # passages whose scores are asked for
    assert torch.allclose(found.scores, exact.scores, atol=1e-6)
    assert found.ids == exact.ids


def test_a_passage_that_is_gone_is_said(engine: QdrantEngine, location: str) -> None:
    engine.close()
    remove_points(location, "passages", 3)
    with pytest.raises(
        EngineError, match=r"no longer holds the passage at position 3\. Run `diffretriever index` again"
    ):
        engine.texts([2, 3])


def test_vectors_that_are_not_finite_are_not_uploaded(location: str) -> None:
    passages = vectors(0, 5, 2)
    passages["repr_hidden"][3, 1, 0] = torch.nan
    with pytest.raises(ValueError, match="the vectors of '3' hold NaN or infinite values"):
        upload(passages, location, "passages")


def test_other_vectors_of_the_same_texts_are_refused(location: str, tmp_path: Path) -> None:
    """Compressed, imported anew or encoded again: half of each would be in the collection."""
    store, other = make_store(tmp_path / "store"), make_store(tmp_path / "other", seed=1)
    assert upload(store, location, "passages") == 30
    assert upload(store, location, "passages") == 0
    with pytest.raises(ValueError, match=r"was made from other passages or another model:\n  other `vectors`"):
        upload(other, location, "passages")
