"""A Qdrant server's faults, played by a small HTTP server on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from diffretriever.search import EngineError, QdrantEngine, upload
from diffretriever.search.qdrant.calls import ATTEMPTS, QdrantCalls

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
        self.bodies: list[dict[str, Any]] = []  # of the requests for points
        self.metadata: dict[str, Any] = {}  # of the collection, empty while there is none
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                path = self.path.partition("?")[0]
                fake.asked.append(f"{self.command} {path}")
                time.sleep(fake.delay)
                faults = fake.faults.get(f"{self.command} {path}", [])
                status, content = faults.pop(0) if faults else (200, json.dumps(fake.result(self.command, path, body)))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(content.encode())

            do_GET = do_POST = do_PUT = answer

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def result(self, command: str, path: str, body: dict[str, Any]) -> dict[str, object]:
        if path == "/":
            return {"title": "qdrant", "version": self.version}
        results: dict[str, object] = {
            "GET /collections/p/exists": {"exists": bool(self.metadata)},
            "GET /collections/p": COLLECTION | {"config": CONFIG | {"metadata": {"diffretriever": self.metadata}}},
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


def connect(url: str, timeout: float = 5.0) -> QdrantCalls:
    return QdrantCalls(url, timeout=timeout, pause=0.01)


def test_an_upload_by_address(fake: FakeServer) -> None:
    assert upload(PASSAGES, fake.url, "p", batch_size=3) == 4
    assert fake.points == [0, 1, 2, 3]


def test_ids_come_without_texts_and_texts_only_when_asked_for(fake: FakeServer) -> None:
    fake.metadata = {"count": 0, "hidden_size": 4, "settings": None}
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
def test_a_passing_fault_is_tried_again(fake: FakeServer, status: int) -> None:
    fake.faults["PUT /collections/p/points"] = [(status, '{"status":{"error":"busy"}}')] * (ATTEMPTS - 1)
    assert upload(PASSAGES, fake.url, "p") == 4
    assert fake.asked.count("PUT /collections/p/points") == ATTEMPTS


def test_a_lasting_fault_ends(fake: FakeServer) -> None:
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
