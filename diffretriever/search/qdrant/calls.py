"""Calls to Qdrant with bounded retries, and errors that say what to do."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files.install import install_hint
from ...files.lines import read_object
from ...files.removal import remove_file
from .location import KEY_VARIABLE, Location

ATTEMPTS = 4
PASSING = (408, 429, 500, 502, 503, 504)  # status codes worth another try
UNAUTHORISED, TOO_LARGE, FULL = (401, 403), 413, 507
OLDEST = (1, 16)  # the first server that keeps a collection's metadata
INSTALL = f"this needs qdrant-client: {install_hint('retrieval')}"
FIRST_META = b'{"collections": {}, "aliases": {}}'  # what the embedded engine writes into a new folder's meta.json
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError, sqlite3.DatabaseError)


class EngineError(RuntimeError):
    """The search engine refused what was asked for; the same call will be refused again."""


class EngineAwayError(EngineError):
    """The search engine is away, full or in use; nothing that it holds is lost, and the same call may do later."""


class RequestTooLargeError(EngineError):
    """A request is larger than the server, or a proxy before it, takes."""


class QdrantCalls:
    """A connection to a Qdrant server, or to its embedded engine.

    Args:
        location: a server's or cluster's address (http://…, https://…), or a folder.
        api_key: for a server that asks for one; None takes the environment variable QDRANT_API_KEY.
        timeout: seconds to wait for an answer.
        pause: seconds before the second try; it doubles with each further one.
        make: make the embedded engine's folder where it is not there.

    Raises:
        ImportError: qdrant-client is not installed.
        ValueError: the location is none, the key or the timeout cannot be, or the folder holds something else.
        FileNotFoundError: no such folder, and none is to be made.
        EngineError: the server is too old or no Qdrant server.
        EngineAwayError: the server is away, or the folder is in use by another process.
    """

    def __init__(
        self, location: str, api_key: str | None = None, timeout: float = 60.0, pause: float = 0.5, make: bool = False
    ) -> None:
        try:
            from qdrant_client import QdrantClient
        except ImportError as error:
            raise ImportError(INSTALL) from error
        where = Location.of(location)
        if not 0 < timeout < math.inf:
            raise ValueError(f"the timeout must be a positive number of seconds, got {timeout}.")
        self.location = str(where)  # without secrets: it is in messages
        self.is_server = where.url is not None
        self._pause, self._key = pause, None
        if where.folder is not None:
            self.client = _open_folder(where.folder, make)
            return
        self._key = _checked_key(api_key)
        # a float would be cut to whole seconds for the server and refused by its client's types
        seconds = max(1, round(timeout))
        self.client = QdrantClient(url=where.url, api_key=self._key, timeout=seconds, check_compatibility=False)
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
            except sqlite3.Error as error:
                raise _folder_error(self.location, error) from error
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


def _open_folder(folder: Path, make: bool) -> Any:
    """Open the embedded engine's folder, and no other."""
    from qdrant_client import QdrantClient

    meta = folder / "meta.json"
    others = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in others if name not in (".lock", meta.name)]
    if meta.is_file() and not others and FIRST_META.startswith(content := meta.read_bytes()) and content != FIRST_META:
        remove_file(meta)  # of a new folder, when the disk was full
    if not meta.is_file():
        if others:
            raise ValueError(f"{folder}: holds {others[0]!r}, but no Qdrant collections; choose a folder of its own.")
        if not make:
            raise FileNotFoundError(f"{folder}: no Qdrant collections here; make one with `diffretriever index`.")
    try:
        if meta.is_file():
            read_object(meta)
        return QdrantClient(path=str(folder))
    except RuntimeError as error:  # the only type that it has for a folder that is locked
        raise EngineAwayError(
            f"{folder}: the embedded engine's folder is in use by another process ({error}); wait for it, or run a "
            "Qdrant server and give its address."
        ) from error
    except DAMAGED as error:
        raise _folder_error(folder, error) from error


def _folder_error(folder: str | Path, error: Exception) -> Exception:
    """Return what to say of an embedded engine that cannot read or write its folder."""
    words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if isinstance(error, sqlite3.OperationalError):
        return EngineAwayError(
            f"{folder}: the embedded engine cannot write here ({words}). Make room and run the same command again; "
            "what was uploaded is kept."
        )
    return ValueError(
        f"{folder}: the embedded engine's files are damaged or somebody else's ({words}); remove the folder and run "
        "`diffretriever index` again."
    )
