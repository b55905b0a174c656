"""A Qdrant server's faults, played by a small HTTP server on loopback."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from qdrant_client import models

from diffretriever.cli.main import main
from diffretriever.search import EngineAwayError, EngineError, QdrantEngine, Searcher, upload
from diffretriever.search.qdrant.calls import ATTEMPTS, QdrantCalls
from diffretriever.search.qdrant.collection import Point
from diffretriever.search.qdrant.server import json_bytes, point_struct
from diffretriever.search.qdrant.upload import describe
from diffretriever.store.store import ShardContents, Store, write_store

PASSAGES = {"repr_hidden": torch.eye(4)[:, None], "sparse_indices": torch.ones(4, 1, dtype=torch.int64)}
PASSAGES["sparse_values"] = torch.ones(4, 1)
COLLECTION = {"status": "green", "optimizer_status": "ok", "segments_count": 1, "payload_schema": {}}
CONFIG = {
    "params": {},
    "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000},
    "optimizer_config": {"default_segment_number": 0, "flush_interval_sec": 5},
}


class FakeServer:
    """Answers as Qdrant would; `faults` holds what the next requests of a path's ending get instead."""

    def __init__(self) -> None:
        self.version = "1.20.0"
        self.faults: dict[str, list[tuple[int, str]]] = {}
        self.asked: list[str] = []
        self.delay = 0.0
        self.points: list[int] = []
        self.limit = 32 << 20  # bytes of a request
        self.sizes: list[int] = []  # bytes of the requests that brought points
        self.keys: list[str | None] = []  # that came with the requests
        self.more_headers: dict[str, str] = {}  # of the answers
        self.payload: dict[str, Any] = {"text": "there"}  # of a point that is there
        self.vectors: dict[str, Any] = {"multi": {"size": 4, "distance": "Dot"}}
        self.bodies: list[dict[str, Any]] = []  # of the requests for points
        self.metadata: dict[str, Any] = {}  # of the collection, empty while there is none
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                sent = self.rfile.read(length)
                path = self.path.partition("?")[0]
                fake.asked.append(f"{self.command} {path}")
                fake.keys.append(self.headers.get("api-key"))
                time.sleep(fake.delay)
                status, content = fake.answer(self.command, path, sent)
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **fake.more_headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content.encode())

            do_GET = do_POST = do_PUT = answer

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, command: str, path: str, sent: bytes) -> tuple[int, str]:
        """Return status and content."""
        if faults := self.faults.get(f"{command} {path}"):
            return faults.pop(0)
        if len(sent) > self.limit:  # a server's words
            words = f"JSON payload ({len(sent)} bytes) is larger than allowed (limit: {self.limit} bytes)"
            return 413, json.dumps({"status": {"error": words}})
        if path.endswith("/points") and command == "PUT":
            self.sizes.append(len(sent))
        return 200, json.dumps(self.result(command, path, json.loads(sent) if sent else {}))

    def result(self, command: str, path: str, body: dict[str, Any]) -> dict[str, object]:
        if path == "/":
            return {"title": "qdrant", "version": self.version}
        results: dict[str, object] = {
            "GET /collections/p/exists": {"exists": bool(self.metadata)},
            "GET /collections/p": COLLECTION
            | {"config": CONFIG | {"params": {"vectors": self.vectors}, "metadata": {"diffretriever": self.metadata}}},
            "POST /collections/p/points/scroll": {"points": [{"id": 0, "payload": self.payload}]},
            "PUT /collections/p": True,
            "POST /collections/p/points/count": {"count": len(self.points)},
            "PUT /collections/p/points": {"operation_id": 1, "status": "completed"},
        }
        if f"{command} {path}" == "PUT /collections/p/points":
            self.points += [point["id"] for point in body["points"]]
        if f"{command} {path}" == "POST /collections/p/points":
            self.bodies.append(body)
            payloads = [{name: f"{name} {point}" for name in body["with_payload"]} for point in body["ids"]]
            found = zip(body["ids"], payloads, strict=True)
            results[f"{command} {path}"] = [{"id": point, "payload": payload} for point, payload in found]
        return {"result": results[f"{command} {path}"], "status": "ok", "time": 0.0}


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.server.shutdown()
    server.server.server_close()


def make_store(folder: Path, texts: list[str]) -> Store:
    count = len(texts)
    dense, sparse = torch.eye(count, 4)[:, None], torch.ones(count, 1)
    names = [f"p{row}" for row in range(count)]
    return write_store(folder, [ShardContents(names, dense, sparse, sparse, texts)], {})


def connect(url: str, timeout: float = 5.0) -> QdrantCalls:
    return QdrantCalls(url, timeout=timeout, pause=0.01)


def test_an_upload_by_address(fake: FakeServer) -> None:
    assert upload(PASSAGES, fake.url, "p", batch_size=3) == 4
    assert fake.points == [0, 1, 2, 3]


def test_ids_come_without_texts_and_texts_only_when_asked_for(fake: FakeServer) -> None:
    fake.metadata, fake.points = {"count": 1, "hidden_size": 4, "settings": None}, [0]
    engine = QdrantEngine(fake.url, "p")
    assert engine.ids([2, 0, 2]) == ["id 2", "id 0", "id 2"]
    assert engine.texts([0]) == ["text 0"]
    assert [(body["ids"], body["with_payload"]) for body in fake.bodies] == [([2, 0], ["id"]), ([0], ["text"])]
    engine.ids(range(2500))
    assert [len(body["ids"]) for body in fake.bodies[2:]] == [1000, 1000, 500]


def test_a_server_that_is_away() -> None:
    with pytest.raises(EngineError, match=rf"http://127.0.0.1:9: no answer after {ATTEMPTS} tries .*Is the server run"):
        connect("http://127.0.0.1:9")


def test_a_server_that_is_slow(fake: FakeServer) -> None:
    fake.delay = 1.3
    start = time.monotonic()
    with pytest.raises(EngineError, match=f"no answer after {ATTEMPTS} tries .*timed out"):
        connect(fake.url, timeout=1.0)
    assert time.monotonic() - start < 2 * ATTEMPTS  # bounded


@pytest.mark.parametrize("status", [500, 503])
def test_a_passing_fault_is_tried_again(fake: FakeServer, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    fake.faults["PUT /collections/p/points"] = [(status, '{"status":{"error":"busy"}}')] * (ATTEMPTS - 1)
    assert upload(PASSAGES, fake.url, "p") == 4
    assert fake.asked.count("PUT /collections/p/points") == ATTEMPTS


def test_a_lasting_fault_ends(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    fake.faults["PUT /collections/p/points"] = [(503, "overloaded")] * 99
    with pytest.raises(
        EngineError, match=rf"no answer after {ATTEMPTS} tries \(503 overloaded\).*run the same command"
    ):
        upload(PASSAGES, fake.url, "p")
    assert fake.asked.count("PUT /collections/p/points") == ATTEMPTS


@pytest.mark.parametrize(("status", "words"), [(507, "Insufficient storage"), (500, "No space left on device: WAL")])
def test_a_full_server_is_named_at_once(fake: FakeServer, status: int, words: str) -> None:
    fake.faults["PUT /collections/p/points"] = [(status, words)] * 99
    with pytest.raises(EngineError, match=f"the server has no room left .*{words}.*what was uploaded is kept"):
        upload(PASSAGES, fake.url, "p")
    assert fake.asked.count("PUT /collections/p/points") == 1


def test_a_refused_request_is_not_repeated(fake: FakeServer) -> None:
    fake.faults["GET /collections/p/exists"] = [(403, "forbidden: api key")] * 99
    with pytest.raises(EngineError, match="the server refused the request: 403 forbidden: api key"):
        QdrantEngine(fake.url, "p")
    assert fake.asked.count("GET /collections/p/exists") == 1


@pytest.mark.parametrize("version", ["1.9.2", "2.0.0"])
def test_a_server_of_another_version(fake: FakeServer, version: str) -> None:
    fake.version = version
    with pytest.raises(EngineError, match=rf"the server is Qdrant {version}; this needs 1\.16 or a later 1\.x"):
        connect(fake.url)


def test_another_kind_of_server(fake: FakeServer) -> None:
    fake.version = "something else"
    with pytest.raises(EngineError, match="this is no Qdrant server"):
        connect(fake.url)


def test_requests_are_cut_by_their_bytes_texts_included(fake: FakeServer, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", ["x" * (6 << 20)] * 6)  # in one request more than a server takes
    assert upload(store, fake.url, "p") == 6
    assert fake.points == list(range(6))
    assert max(fake.sizes) <= 16 << 20
    assert len(fake.sizes) == 3


@pytest.mark.parametrize("text", ["plain", '"quoted"\n\\\x01\x7f', "日本 🎈 é", "\u2028" * 500])
def test_a_point_is_never_longer_than_was_reckoned(fake: FakeServer, text: str) -> None:
    named: dict[str, Any] = {"dense": [-1.2345678e-33] * 40, "multi": [[-1.2345678901234567e-300] * 5] * 7}
    sparse = dict.fromkeys(range(4294967287, 4294967296), 1.1754944e-38)
    point = Point(2**32 - 1, {"id": text, "text": text}, {**named, "sparse": sparse})
    calls = connect(fake.url)
    calls(calls.client.upsert, "p", points=[point_struct(point)])
    assert fake.sizes[-1] <= json_bytes(point) < 2 * fake.sizes[-1] + 1000


def test_a_proxy_that_takes_less_gets_less(fake: FakeServer, tmp_path: Path) -> None:
    fake.limit = 20_000
    store = make_store(tmp_path / "s", ["x" * 5000] * 16)
    assert upload(store, fake.url, "p") == 16
    assert sorted(fake.points) == list(range(16))
    assert max(fake.sizes) <= fake.limit
    assert len(fake.asked) < 40  # what was learnt is kept


def test_a_passage_that_no_request_can_hold_is_named(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.limit = 20_000
    make_store(tmp_path / "s", ["short", "x" * 30_000, "short"])
    arguments = ["index", "--store", str(tmp_path / "s"), "--qdrant", fake.url, "--collection", "p"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "passage 'p1' alone is a request of 0.0 MiB, more than the server takes" in said
    assert "larger than allowed (limit: 20000 bytes)" in said
    assert "Upload without texts (--no-texts)" in said
    fake.points.clear()
    assert main([*arguments, "--no-texts"]) == 0


REFUSED = [(403, "forbidden"), (400, "bad request"), (404, "not here"), (301, "moved")]
AWAY = [(503, "overloaded"), (507, "full"), (500, "No space left on device"), (429, "slow down")]


@pytest.mark.parametrize(
    ("answer", "status"), [*((answer, 2) for answer in REFUSED), *((answer, 3) for answer in AWAY)]
)
def test_the_exit_status_says_whether_another_try_can_help(
    fake: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: tuple[int, str],
    status: int,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    fake.faults["PUT /collections/p/points"] = [(answer[0], json.dumps({"status": {"error": answer[1]}}))] * 99
    fake.more_headers = {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}  # a date, as proxies send it
    make_store(tmp_path / "s", ["text"])
    assert main(["index", "--store", str(tmp_path / "s"), "--qdrant", fake.url, "--collection", "p"]) == status
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert answer[1] in said or "Retry-After" in said
    assert ("same command again" in said) == (status == 3)


@pytest.mark.parametrize("answer", ["<html>welcome</html>", "", "\xff", "[" * 100_000, "[]", "5", '{"title": 5}'])
def test_an_answer_of_something_else_is_no_qdrant_server(fake: FakeServer, answer: str) -> None:
    fake.faults["GET /"] = [(200, answer)]
    with pytest.raises(EngineError, match="this is no Qdrant server") as raised:
        connect(fake.url)
    assert not isinstance(raised.value, EngineAwayError)
    assert len(str(raised.value)) < 500
    assert fake.asked == ["GET /"]


KEY = "k3y-of-mine"


def test_the_key_comes_from_the_environment_and_shows_nowhere(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s", ["text"])
    monkeypatch.setenv("QDRANT_API_KEY", f" {KEY}\n")
    arguments = ["index", "--store", str(tmp_path / "s"), "--qdrant", fake.url, "--collection", "p"]
    fake.faults["PUT /collections/p/points"] = [(403, f"the api-key {KEY} may not write")]
    assert main(arguments) == 2
    assert main(arguments) == 0
    said = "".join(capsys.readouterr())
    assert "the api-key [key] may not write. Is QDRANT_API_KEY set, and right?" in said
    assert KEY not in said
    assert set(fake.keys) == {KEY}
    for wrong in (f"{KEY}\nX-Other: 1", f"{KEY} é"):
        monkeypatch.setenv("QDRANT_API_KEY", wrong)
        assert main(arguments) == 2
        said = "".join(capsys.readouterr())
        assert "the API key (QDRANT_API_KEY) holds blanks or characters that are not ASCII" in said
        assert KEY not in said


@pytest.mark.parametrize("words", [["--api-key", KEY], [f"--api-key={KEY}"], ["--api", KEY]])
@pytest.mark.parametrize("command", [["index", "--store", "s"], ["search", "question"]])
def test_a_key_on_the_command_line_is_refused(
    capsys: pytest.CaptureFixture[str], command: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--qdrant", "http://127.0.0.1:9", *words])
    said = capsys.readouterr().err
    assert "--api-key: the list of processes shows it; set the environment variable QDRANT_API_KEY" in said
    assert KEY not in said


@pytest.mark.parametrize(
    "address",
    [
        f"https://me:{KEY}@host:6333",
        f"https://me:a/{KEY}@host",
        f"https://{KEY}@host",
        f"https://host/?api-key={KEY}",
        f"https://host#{KEY}",
        f"me:{KEY}@host:6333",
        f"http:/me:{KEY}@host",
        f"http://me:{KEY}@:x",
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    make_store(tmp_path / "s", ["text"])
    assert main(["index", "--store", str(tmp_path / "s"), "--qdrant", address]) == 2
    said = "".join(capsys.readouterr())
    assert KEY not in said
    assert "***" in said


def test_options_that_a_servers_collection_was_made_without_are_refused(fake: FakeServer, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", ["text"])
    upload(store, fake.url, "p")
    fake.metadata = json.loads(json.dumps(dataclasses.asdict(describe(store, list(store.shards())))))
    with pytest.raises(ValueError, match=r"'p' was made with another quantization_config: None, not {'scalar': {"):
        upload(store, fake.url, "p", quantization="scalar")
    with pytest.raises(ValueError, match="'p' was made with another shard_number: 1, not 3"):
        upload(store, fake.url, "p", shard_number=3)
    with pytest.raises(ValueError, match=r"'p' was made with another hnsw_config: {.*'m': 16.*}, not {'m': 32}"):
        upload(store, fake.url, "p", hnsw_config=models.HnswConfigDiff(m=32))
    fake.vectors["multi"]["quantization_config"] = {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}}
    upload(store, fake.url, "p", quantization="scalar", hnsw_config=models.HnswConfigDiff(m=16))
    with pytest.raises(ValueError, match="another quantization_config"):
        upload(store, fake.url, "p", quantization="binary")
    with pytest.raises(ValueError, match=r"'p' was made with texts\. Go on without --no-texts"):
        upload(store, fake.url, "p", texts=False)
    fake.payload = {}
    with pytest.raises(ValueError, match=r"'p' was made without texts\. Go on with --no-texts"):
        upload(store, fake.url, "p")


@pytest.mark.parametrize("path", ["GET /collections/p/exists", "POST /collections/p/points/count"])
def test_an_answer_without_a_result_is_no_qdrant_server(fake: FakeServer, path: str) -> None:
    fake.metadata = {"count": 5, "hidden_size": 4}
    fake.faults[path] = [(200, '{"status": "ok", "time": 0.0}')]
    with pytest.raises(EngineError, match="this is no Qdrant server, or its answer was cut"):
        QdrantEngine(fake.url, "p")


@pytest.mark.parametrize("point", [5, "11111111-1111-1111-1111-111111111111"])
def test_points_that_were_not_uploaded_are_not_taken_for_passages(fake: FakeServer, point: object) -> None:
    fake.metadata, fake.points = {"count": 2, "hidden_size": 4}, [0, 1]
    engine = QdrantEngine(fake.url, "p")
    found = {"result": [{"points": [{"id": point, "version": 0, "score": 0.5}]}], "status": "ok", "time": 0.0}
    fake.faults["POST /collections/p/points/query/batch"] = [(200, json.dumps(found))]
    with pytest.raises(EngineError, match=f"answers with a point '?{point}'?, which `diffretriever index` did not put"):
        Searcher(engine).search(PASSAGES, "multi_dense", 1)


def test_what_a_collection_says_of_itself_is_checked(fake: FakeServer) -> None:
    for metadata, words in (
        ({"count": "5", "hidden_size": 4}, "metadata: count must be of type int"),
        ({"count": 5}, "metadata: lacks `hidden_size`"),
        ({"count": 5, "hidden_size": 4, "settings": {"model": "m"}}, "metadata: settings: lacks `revision`"),
        ({"count": 0, "hidden_size": 4}, "metadata: `count` is 0; expected a whole number of at least 1"),
    ):
        fake.metadata = metadata
        with pytest.raises(ValueError, match=f"collection 'p': {words}"):
            QdrantEngine(fake.url, "p")
    fake.metadata = {"count": 5, "hidden_size": 4}
    with pytest.raises(EngineError, match="holds 0 of 5 passages"):
        QdrantEngine(fake.url, "p")
