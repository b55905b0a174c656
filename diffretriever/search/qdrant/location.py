"""Where a Qdrant collection is: a server's address or a folder, told apart without guessing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

PORT = 6333  # Qdrant's own
PROXY_PORTS = {"http": 80, "https": 443}  # where an address has a path, it is a proxy's
KEY_VARIABLE = "QDRANT_API_KEY"
_HOST = r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)"
_ADDRESS = re.compile(
    rf"([a-zA-Z][\w+.-]+:/.*)|(.*@)?{_HOST}:\d+(/.*)?|https?:.*|localhost|\d+(\.\d+){{3}}|[\w.-]+\.qdrant\.io(/.*)?",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Location:
    """A server's address, with its port, or a folder; one of them.

    Args:
        url: without a trailing slash.
        folder: of collections, for Qdrant's engine in this process.
    """

    url: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        return self.url or str(self.folder)

    @classmethod
    def of(cls, given: str) -> Location:
        """Tell what a location is.

        Args:
            given: http://…, https://…, or a folder.

        Raises:
            ValueError: it looks like an address and is none, holds a secret, or keeps nothing.

        >>> print(Location.of("HTTP://localhost"), Location.of("https://host/qdrant/"), Location.of("index/qdrant"))
        http://localhost:6333 https://host:443/qdrant index/qdrant
        """
        given = given.strip()
        if given in ("", ":memory:"):
            raise ValueError(f"{given!r} keeps nothing; give a folder or a Qdrant server's address.")
        if re.match("https?://", given, re.IGNORECASE):
            return cls(url=_address(given))
        if _ADDRESS.fullmatch(given):
            shown = redact_url(given)
            raise ValueError(
                f"{shown}: looks like a server's address; write http://… or https://… before the host, or ./ before "
                "the name of a folder."
            )
        return cls(folder=Path(given))


def check_collection(name: str) -> str:
    """Return a collection's name.

    Raises:
        ValueError: no collection can have it.
    """
    if not re.fullmatch(r'[^<>:"/\\|?*\x00-\x1f]{1,255}', name) or name in (".", ".."):
        raise ValueError(f"no collection can be called {name!r:.80}; leave out slashes, colons and the like.")
    return name


def redact_url(text: str) -> str:
    """Return a text with what may be a password or key in an address as `***`.

    >>> redact_url("https://me:secret@host:6333/?api-key=secret")
    'https://***@host:6333/?***'
    """
    text = re.sub(r"^(\w+://)?.*@", r"\1***@", text, flags=re.DOTALL)
    return re.sub(r"[?#].+", lambda found: f"{found[0][0]}***", text, flags=re.DOTALL)


def _address(given: str) -> str:
    """Return a server's address in one form, or say what is wrong with it, without its secrets."""
    shown = redact_url(given)
    if shown != given:
        raise ValueError(
            f"{shown}: holds a user's name, password or key, which the list of processes shows; give the address "
            f"alone, and the key in the environment variable {KEY_VARIABLE}."
        )
    try:
        parts = urlsplit(given)
        host, port = parts.hostname, parts.port
    except ValueError:  # its words quote what is wrong
        host, port = None, None
    if not host or port == 0 or not re.fullmatch(_HOST, f"[{host}]" if ":" in host else host):
        raise ValueError(f"{shown}: is no address; expected http://HOST:PORT or https://HOST:PORT, PORT a number.")
    host, path = f"[{host}]" if ":" in host else host, parts.path.rstrip("/")
    return f"{parts.scheme}://{host}:{port or (PROXY_PORTS[parts.scheme] if path else PORT)}{path}"
