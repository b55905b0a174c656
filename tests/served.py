"""A server as the plugin makes vLLM one, in this process: an exported model, run by transformers, over HTTP."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from diffretriever.serving.text_server import TextServer


class PlainEngine:
    """What vLLM is to the plugin: the states at the masks of some prompts, by transformers' own classes.

    Args:
        folder: of `export_plain`.
    """

    def __init__(self, folder: Path) -> None:
        self.server = TextServer(folder, torch.float32, {"vllm": "in this process"})
        self.model = AutoModel.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")

    def __call__(self, data: Any) -> dict[str, Any]:
        return self.server.answer((ids, self.states(ids)) for ids in self.server.prompts(data))

    def states(self, ids: list[int]) -> torch.Tensor:
        """Return the states at the masks, [K, H]."""
        with torch.no_grad():
            states = self.model(torch.tensor([ids]), attention_mask=torch.zeros(1, 1, len(ids), len(ids)))[0][0]
        return states[torch.tensor(ids) == self.server.mask_id]


Fault = Callable[["Handler", dict[str, Any]], None]  # answers in the server's place


class Handler(BaseHTTPRequestHandler):
    """Answers POST /pooling as vLLM does."""

    server: Any

    def do_POST(self) -> None:
        """Answer, or do what the next fault says."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((dict(self.headers), request))
        data, faults = request.get("data"), self.server.faults
        if faults and "describe" not in data:
            fault = faults.pop(0)
            if fault is not None:
                fault(self, request)
                return
        try:
            self.say(200, {"request_id": "pooling-1", "created_at": 1, "data": self.server.engine(data)})
        except ValueError as error:
            self.say(400, {"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}})

    def say(self, status: int, content: Any, cut: int | None = None) -> None:
        """Send an answer, of which `cut` bytes come."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = True

    def reset(self) -> None:
        """Break the connection off."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Stay silent."""


class Served(ThreadingHTTPServer):
    """The server, and what was asked of it.

    Args:
        engine: returns the `data` of an answer to that of a request.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, engine: Any, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.engine, self.faults, self.asked = engine, [], []  # type: ignore[var-annotated]

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """Pass over clients that went away, and connections that a fault closed."""


@contextmanager
def serving(engine: Any, port: int = 0) -> Iterator[Served]:
    """Serve in a thread."""
    with Served(engine, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
