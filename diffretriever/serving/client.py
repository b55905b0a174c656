"""Requests to a server of an exported release: tried again while it is away, refused where another try cannot help."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from ..search.qdrant.calls import PASSING, TOO_LARGE, UNAUTHORISED, EngineAwayError, EngineError

KEY_VARIABLE = "VLLM_API_KEY"  # where vLLM itself looks for the key that it asks for
RETRY_FOR = 60.0  # seconds
TIMEOUT = 300.0  # seconds for one answer: the requests of others may be before it
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds
NOT_THERE = 404
BROKEN_OFF = (urllib.error.URLError, http.client.HTTPException, OSError)


class TextClient:
    """Asks a server that speaks the protocol of `text_server.TextServer` at /pooling.

    Args:
        address: http://… or https://…, of the server.
        retry_for: seconds to go on asking a server that does not answer.
        pause: seconds before the second try; it doubles with each further one.

    Raises:
        ValueError: no such address, or a key that no header can hold.
    """

    def __init__(self, address: str, retry_for: float = RETRY_FOR, pause: float = FIRST_PAUSE) -> None:
        parts = urllib.parse.urlsplit(address)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or parts.username
        ):
            told = f"; a key belongs into {KEY_VARIABLE}" if parts.username else ""
            raise ValueError(
                "--server: expected an address such as http://localhost:8000, got "
                f"{parts.hostname or address!r:.200}{told}."
            )
        self.address = address.rstrip("/")
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not re.fullmatch(r"[\x21-\x7e]*", self._key):
            raise ValueError(f"the key ({KEY_VARIABLE}) holds blanks or characters that are not ASCII; copy it again.")
        self._retry_for, self._pause = retry_for, pause

    def ask(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request, by the protocol.

        Raises:
            ValueError: the request is wrong, in the server's words.
            EngineError: it is no such server, or it refuses for a reason that stays.
            EngineAwayError: it did not answer for `retry_for` seconds.
        """
        end, pause = time.monotonic() + self._retry_for, self._pause
        while True:
            try:
                return self._checked(self._post(data), data)
            except EngineAwayError as error:
                if time.monotonic() + pause > end:
                    raise EngineAwayError(
                        f"{self.address}: no answer for {self._retry_for:g} seconds ({error}). Is the server running "
                        "and reachable?"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _post(self, data: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        body = json.dumps({"data": data}).encode()
        request = urllib.request.Request(f"{self.address}/pooling", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise self._refusal(error.code, error) from error
        except BROKEN_OFF as error:
            raise EngineAwayError(self._told(error)) from error

    def _refusal(self, status: int, error: urllib.error.HTTPError) -> Exception:
        """Return what a status other than 200 means."""
        try:
            content = error.read().decode("utf-8", errors="replace")
        except BROKEN_OFF:
            content = ""
        words = self._told(_message(content) or error.reason)
        if status in PASSING:
            return EngineAwayError(f"{status} {words}")
        if status == http.client.BAD_REQUEST and content:
            return ValueError(f"{self.address}: {words}")
        hint = ""
        if status in UNAUTHORISED:
            hint = f" Is {KEY_VARIABLE} set, and right?"
        elif status == TOO_LARGE:
            hint = " `diffretriever encode` sends less at once with a smaller --tokens-per-batch."
        elif status == NOT_THERE:
            hint = " Is this vLLM, started on a folder of `diffretriever export-vllm` with this package installed?"
        return EngineError(f"{self.address}: the server refused the request: {status} {words}.{hint}")

    def _checked(self, content: bytes, data: dict[str, Any]) -> dict[str, Any]:
        """Return an answer by the protocol; one that was cut is none."""
        try:
            whole = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise EngineAwayError(f"the answer was cut or is no JSON: {self._told(error)}") from error
        found = whole.get("data") if isinstance(whole, dict) else None
        if not isinstance(found, dict) or not isinstance(found.get("model"), str):
            raise EngineError(f"{self.address}: this is no server of an exported release; see docs/vllm.md.")
        vectors = found.get("vectors")
        if "texts" in data and (not isinstance(vectors, list) or len(vectors) != len(data["texts"])):
            count = len(vectors) if isinstance(vectors, list) else 0
            raise EngineAwayError(f"{count} vectors came for {len(data['texts'])} texts")
        return found

    def _told(self, words: object) -> str:
        """Return what somebody else said, on one line and without the key, which they may send back."""
        said = " ".join(str(words).split()) or type(words).__name__
        return (said.replace(self._key, "[key]") if self._key else said)[:500]


def _message(content: str) -> str:
    """Return the message in an error's JSON as vLLM has it, else the text."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return content
