"""A page to search with, on this machine alone: read-only, without scripts, from Python's own server."""

from __future__ import annotations

import socketserver
import sys
import threading
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from .exit_status import EXPECTED

if TYPE_CHECKING:
    import torch

    from ..search.explain import Explainer, Explanation

LOOPBACK = "127.0.0.1"
# A browser that keeps to this runs no script and fetches nothing, whatever stood in the page.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Cell:
    """A similarity, where it lies between the least and the greatest (0 to 1), and whether its row has no greater."""

    value: float
    share: float
    best: bool


def heat_map(similarity: torch.Tensor) -> list[list[Cell]]:
    """Return the cells of similarities [K_q, K_p].

    >>> import torch
    >>> heat_map(torch.tensor([[0.25, 0.75]]))
    [[Cell(value=0.25, share=0.0, best=False), Cell(value=0.75, share=1.0, best=True)]]
    """
    rows = similarity.tolist()
    values = [value for row in rows for value in row]
    low, spread = min(values, default=0.0), (max(values, default=0.0) - min(values, default=0.0)) or 1.0
    return [[Cell(value, (value - low) / spread, value == max(row)) for value in row] for row in rows]


@cache
def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.jinja")


def render_page(about: str, weight: float, found: Explanation | None) -> str:
    """Return the page as HTML; every text in it is escaped.

    Args:
        about: what is searched, and with which model.
        weight: the dense scores' share of the fused one.
        found: for a question; None where none was asked.
    """
    page: str = _template().render(about=about, weight=weight, found=found, heat_map=heat_map)
    return page


class PageServer(socketserver.ThreadingTCPServer):
    """Answers at 127.0.0.1; a browser's idle connections have threads of their own, questions wait for each other.

    Args:
        explainer: what is searched.
        about: what it is, for the page.
        port: 0 takes a free one.
        top_k: passages a question.
        weight: the dense scores' share where a question does not say it.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, explainer: Explainer, about: str, port: int, top_k: int, weight: float) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.explainer, self.about, self.top_k, self.weight = explainer, about, top_k, weight
        self.asking = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a browser that did not wait for its answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 10  # seconds for a request

    def do_GET(self) -> None:
        """Answer with the page."""
        hosts = [f"{name}:{self.server.port}" for name in (LOOPBACK, "localhost")]
        # not the name of a site elsewhere, which a browser was led to take for us
        if self.headers.get("Host") not in hosts:
            self.send_error(HTTPStatus.FORBIDDEN, explain=f"ask http://{hosts[0]}")
            return
        address = urlsplit(self.path)
        if address.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        fields = parse_qs(address.query)
        question, weight = fields.get("q", [""])[0].strip(), _share(fields.get("dense", [""])[0], self.server.weight)
        try:
            with self.server.asking:
                found = self.server.explainer.explain(question, self.server.top_k, weight) if question else None
        except EXPECTED as error:  # a damaged store
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
            return
        self._send(render_page(self.server.about, weight, found))

    def _send(self, page: str) -> None:
        body = page.encode("utf-8", "replace")
        self.send_response(HTTPStatus.OK)
        for name, value in {**HEADERS, "Content-Type": "text/html; charset=utf-8", "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep questions out of the terminal."""


def _share(text: str, usual: float) -> float:
    """Return the number from 0 to 1 that a field holds, else the usual one."""
    try:
        found = float(text)
    except ValueError:
        return usual
    return found if 0.0 <= found <= 1.0 else usual


def serve(explainer: Explainer, about: str, port: int, top_k: int, weight: float) -> None:
    """Serve the page until Ctrl-C; see `PageServer`.

    Raises:
        ValueError: the port is another program's, or none that this user may take.
    """
    try:
        server = PageServer(explainer, about, port, top_k, weight)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port}: {LOOPBACK} cannot be listened to there ({error}); give another.") from error
    with server:
        print(f"http://{LOOPBACK}:{server.port} shows {about}; Ctrl-C ends.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
