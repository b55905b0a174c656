"""Calls to a Qdrant server with bounded retries, and errors that say what to do."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from typing import Any

from ...files.install import install_hint
from .location import KEY_VARIABLE

ATTEMPTS = 4
PASSING = (408, 429, 500, 502, 503, 504)  # status codes worth another try
UNAUTHORISED, TOO_LARGE, FULL = (401, 403), 413, 507
OLDEST = (1, 16)  # the first server that keeps a collection's metadata
INSTALL = f"a Qdrant server needs qdrant-client: {install_hint('retrieval')}"


class EngineError(RuntimeError):
    """The search engine refused what was asked for; the same call will be refused again."""


class EngineAwayError(EngineError):
    """The search engine is away, full or in use; nothing that it holds is lost, and the same call may do later."""


class RequestTooLargeError(EngineError):
    """A request is larger than the server, or a proxy before it, takes."""


class QdrantCalls:
    """A connection to a Qdrant server.

    Args:
        url: its address, as `Location` has it.
        api_key: for a server that asks for one; None takes the environment variable QDRANT_API_KEY.
        timeout: seconds to wait for an answer.
        pause: seconds before the second try; it doubles with each further one.

    Raises:
        ImportError: qdrant-client is not installed.
        ValueError: the key cannot be.
        EngineError: the server is too old or no Qdrant server.
        EngineAwayError: the server is away.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 60.0, pause: float = 0.5) -> None:
        try:
            from qdrant_client import QdrantClient
        except ImportError as error:
            raise ImportError(INSTALL) from error
        self.location = url  # without secrets: it is in messages
        self._pause, self._key = pause, _checked_key(api_key)
        # a float would be cut to whole seconds for the server and refused by its client's types
        seconds = max(1, round(timeout))
        self.client = QdrantClient(url=url, api_key=self._key, timeout=seconds, check_compatibility=False)
        self._check_version()

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def __call__(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a method of the client; what may pass is tried again, a few times.

        Raises:
            EngineError: an error that stays.
            EngineAwayError: no answer, or no room.
        """
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                return method(*arguments, **options)
            except QdrantException as error:
                reason = f"too many requests: {self._told(error)}"
            except ResponseHandlingException as error:  # no connection, or no answer in time
                reason = self._connection_reason(error)
            except UnexpectedResponse as error:
                reason = self._reason(error)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, AssertionError) as error:
                words = self._told(error)  # the client asserts that an answer holds what was asked for
                raise EngineError(
                    f"{self.location}: this is no Qdrant server, or its answer was cut ({words})."
                ) from error
            if attempt + 1 < ATTEMPTS:
                time.sleep(self._pause * 2**attempt)
        raise EngineAwayError(
            f"{self.location}: no answer after {ATTEMPTS} tries ({reason}). Is the server running and reachable? "
            "What was uploaded is kept; run the same command again to go on."
        )

    def _connection_reason(self, error: Any) -> str:
        """Return why there was no answer; raise where there was one that Qdrant does not give."""
        import httpx

        reason = self._told(error.source)
        lasting = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
        if not isinstance(error.source, httpx.TransportError) or isinstance(error.source, lasting):
            raise EngineError(
                f"{self.location}: this is no Qdrant server, or its answer was cut ({reason})."
            ) from error
        return reason

    def _reason(self, error: Any) -> str:
        """Return the server's words where another try may help; raise where none does."""
        content = self._told(error.content.decode("utf-8", errors="replace"))
        words = f"{error.status_code} {content}"
        if error.status_code == FULL or "no space left" in content.lower():
            raise EngineAwayError(
                f"{self.location}: the server has no room left ({content or error.status_code}). Make room there and "
                "run the same command again; what was uploaded is kept."
            ) from error
        if error.status_code == TOO_LARGE or "larger than allowed" in content.lower():
            raise RequestTooLargeError(f"{self.location}: the request is too large for the server: {words}") from error
        if error.status_code not in PASSING:
            key = f". Is {KEY_VARIABLE} set, and right?" if error.status_code in UNAUTHORISED else ""
            raise EngineError(f"{self.location}: the server refused the request: {words}{key}") from error
        return words

    def _told(self, words: object) -> str:
        """Return what somebody else said, on one line and without the key, which they may send back."""
        said = " ".join(str(words).split())
        if not said and isinstance(words, Exception):
            said = type(words).__name__
        return (said.replace(self._key, "[key]") if self._key else said)[:300]

    def _check_version(self) -> None:
        version = str(self(self.client.info).version)
        numbers = version.split(".")
        if len(numbers) < 2 or not all(number.isdigit() for number in numbers[:2]):
            raise EngineError(f"{self.location}: this is no Qdrant server; its version reads {version!r:.80}.")
        found = (int(numbers[0]), int(numbers[1]))
        if found < OLDEST or found[0] != OLDEST[0]:
            raise EngineError(
                f"{self.location}: the server is Qdrant {version:.80}; this needs {OLDEST[0]}.{OLDEST[1]} or a later "
                f"{OLDEST[0]}.x."
            )


def _checked_key(given: str | None) -> str | None:
    """Return the key to send, or refuse one that no header can hold, without showing it."""
    key = (given if given is not None else os.environ.get(KEY_VARIABLE, "")).strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ValueError(f"the API key ({KEY_VARIABLE}) holds blanks or characters that are not ASCII; copy it again.")
    return key or None
