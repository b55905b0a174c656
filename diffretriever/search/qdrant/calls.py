"""Calls to Qdrant with bounded retries, and errors that say what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

ATTEMPTS = 4
PASSING = (408, 429, 500, 502, 503, 504)  # status codes worth another try
FULL = 507
OLDEST = (1, 16)  # the first server that keeps a collection's metadata
INSTALL = 'this needs qdrant-client: pip install "diffretriever[retrieval]"'


class EngineError(RuntimeError):
    """The search engine is away, full, or answers with an error; nothing that it holds is lost."""


def is_server(location: str) -> bool:
    """Return whether a location is a server's address; else it is a folder for the embedded engine.

    >>> is_server("http://localhost:6333"), is_server("index/qdrant"), is_server(":memory:")
    (True, False, False)
    """
    return location.startswith(("http://", "https://"))


class QdrantCalls:
    """A connection to a Qdrant server, or to its embedded engine.

    Args:
        location: a server's or cluster's address (http://…, https://…), a folder, or ":memory:".
        api_key: for a server that asks for one.
        timeout: seconds to wait for an answer.
        pause: seconds before the second try; it doubles with each further one.

    Raises:
        ImportError: qdrant-client is not installed.
        EngineError: the server is away or too old, or the folder is in use by another process.
    """

    def __init__(self, location: str, api_key: str | None = None, timeout: float = 60.0, pause: float = 0.5) -> None:
        try:
            from qdrant_client import QdrantClient
        except ImportError as error:
            raise ImportError(INSTALL) from error
        self.location = location
        self.is_server = is_server(location)
        self._pause = pause
        if self.is_server:
            # a float would be cut to whole seconds for the server and refused by its client's types
            self.client = QdrantClient(
                url=location, api_key=api_key, timeout=max(1, round(timeout)), check_compatibility=False
            )
            self._check_version()
        elif location == ":memory:":
            self.client = QdrantClient(location=location)
        else:
            try:
                self.client = QdrantClient(path=location)
            except RuntimeError as error:  # the only type that it has for a folder that is locked
                raise EngineError(
                    f"{location}: the embedded engine's folder is in use by another process ({error}); wait for it, "
                    "or run a Qdrant server and give its address."
                ) from error

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def __call__(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a method of the client; what may pass is tried again, a few times.

        Raises:
            EngineError: no answer, or an error.
        """
        from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                return method(*arguments, **options)
            except ResourceExhaustedResponse as error:
                reason = f"too many requests: {error.message}"
            except ResponseHandlingException as error:  # no connection, or no answer in time
                reason = str(error.source) or type(error.source).__name__
            except UnexpectedResponse as error:
                reason = self._reason(error)
                if error.status_code not in PASSING:
                    raise EngineError(f"{self.location}: the server refused the request: {reason}") from error
            if attempt + 1 < ATTEMPTS:
                time.sleep(self._pause * 2**attempt)
        raise EngineError(
            f"{self.location}: no answer after {ATTEMPTS} tries ({reason}). Is the server running and reachable? "
            "What was uploaded is kept; run the same command again to go on."
        )

    def _reason(self, error: Any) -> str:
        """Return the server's words; a full disk ends the tries at once."""
        content = error.content.decode("utf-8", errors="replace")[:300]
        if error.status_code == FULL or "no space left" in content.lower():
            raise EngineError(
                f"{self.location}: the server has no room left ({content or error.status_code}). Make room there and "
                "run the same command again; what was uploaded is kept."
            ) from error
        return f"{error.status_code} {content}"

    def _check_version(self) -> None:
        version = str(self(self.client.info).version)
        numbers = version.split(".")
        if len(numbers) < 2 or not all(number.isdigit() for number in numbers[:2]):
            raise EngineError(f"{self.location}: this is no Qdrant server; its version reads {version!r}.")
        found = (int(numbers[0]), int(numbers[1]))
        if found < OLDEST or found[0] != OLDEST[0]:
            raise EngineError(
                f"{self.location}: the server is Qdrant {version}; this needs {OLDEST[0]}.{OLDEST[1]} or a later "
                f"{OLDEST[0]}.x."
            )
