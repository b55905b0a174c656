"""A repository on the Hub: its errors say what to do, what may pass is tried again, and no token shows."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ATTEMPTS = 5  # of a call that fails in a way that may pass
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
CHUNK = 1 << 20  # bytes read at a time
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses after which to try again
Result = TypeVar("Result")


class HubError(OSError):
    """The Hub refused, or could not be reached; the message says what to do."""


class Passing(HubError):
    """The Hub failed in a way that may pass: no connection, too many requests, an error of its own.

    Args:
        words: the message.
        wait: how many seconds the Hub asked to wait; None where it did not.
    """

    def __init__(self, words: str, wait: int | None = None) -> None:
        super().__init__(words)
        self.wait = wait


class Conflict(HubError):
    """The repository was changed by someone else in the meantime."""


@dataclass(frozen=True)
class FileHash:
    """A file's size in bytes and the two hashes the Hub may know it by: LFS's SHA-256, git's SHA-1 of the blob."""

    size: int
    sha256: str
    git_sha1: str


def hash_content(content: Path | bytes) -> FileHash:
    """Hash a file or its content; a file is read once, in pieces.

    >>> hash_content(b"hello").git_sha1  # as `git hash-object` prints it
    'b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0'
    """
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
        while piece := stream.read(CHUNK):
            sha256.update(piece)
            git.update(piece)
    return FileHash(size, sha256.hexdigest(), git.hexdigest())


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: its size in bytes, and LFS's SHA-256 or, for a regular file, git's SHA-1 of the blob."""

    size: int
    lfs_sha256: str | None
    git_sha1: str

    def holds(self, content: FileHash) -> bool:
        """Tell whether this is the content."""
        if self.lfs_sha256 is not None:
            return self.lfs_sha256 == content.sha256
        return self.git_sha1 == content.git_sha1


@dataclass(frozen=True)
class Refs:
    """The commits that branches, tags and pull requests ("refs/pr/1") point to."""

    branches: dict[str, str]
    tags: dict[str, str]
    pull_requests: dict[str, str]


class Repository:
    """One model repository on the Hub.

    Args:
        repo_id: ORG/NAME.
        token: an access token with the right to write; it is in no message of this class.
    """

    def __init__(self, repo_id: str, token: str) -> None:
        from huggingface_hub import HfApi

        self.repo_id = repo_id
        self._token = token
        self._api = HfApi(token=token)

    # ---------------------------------------------------------------------------------------------------- reading

    def check_token(self) -> str:
        """Return the token's user, or refuse one that cannot write."""
        who = self._call("asking whose the token is", lambda: self._api.whoami())
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise HubError(
                f"The token of {who.get('name')} may only read. Make one with the right to write in the Hub's settings "
                "(Access Tokens), then run `hf auth login` or set HF_TOKEN."
            )
        return str(who.get("name"))

    def is_private(self) -> bool | None:
        """Return whether the repository is private; None if there is none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def ask() -> bool | None:
            try:
                return bool(self._api.model_info(self.repo_id).private)
            except RepositoryNotFoundError as error:
                if getattr(error.response, "status_code", None) == 401:
                    raise _Unauthorised(str(error)) from None
                return None

        return self._call("looking for the repository", ask)

    def refs(self) -> Refs:
        """Return where branches, tags and pull requests are."""
        found = self._call(
            "listing branches", lambda: self._api.list_repo_refs(self.repo_id, include_pull_requests=True)
        )
        return Refs(
            {ref.name: ref.target_commit for ref in found.branches},
            {ref.name: ref.target_commit for ref in found.tags},
            {ref.ref: ref.target_commit for ref in found.pull_requests or []},
        )

    def tree(self, revision: str) -> dict[str, RemoteFile]:
        """Return the files at a revision, without .gitattributes, which is the Hub's own."""

        from huggingface_hub.hf_api import RepoFile

        def ask() -> dict[str, RemoteFile]:
            entries = self._api.list_repo_tree(self.repo_id, revision=revision, recursive=True)
            return {
                entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
                for entry in entries
                if isinstance(entry, RepoFile) and entry.path != ".gitattributes"
            }

        return self._call(f"listing the files at {revision}", ask)

    # ---------------------------------------------------------------------------------------------------- writing

    def create(self, private: bool) -> None:
        """Make the repository; one that is there already is left alone."""
        self._call("making the repository", lambda: self._api.create_repo(self.repo_id, private=private, exist_ok=True))

    def create_branch(self, branch: str, commit: str) -> None:
        """Make a branch at a commit; one that is there already is left where it is."""
        self._call(
            f"making the branch {branch}",
            lambda: self._api.create_branch(self.repo_id, branch=branch, revision=commit, exist_ok=True),
        )

    def create_tag(self, tag: str, commit: str) -> None:
        """Tag a commit; a tag that is there already is left where it is."""
        self._call(
            f"making the tag {tag}",
            lambda: self._api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True),
        )

    def commit(
        self, operations: list[Any], message: str, revision: str, parent: str | None, create_pr: bool = False
    ) -> tuple[str, str | None]:
        """Make one commit; the caller tries again, since only it can tell whether a lost answer was a yes.

        Args:
            operations: huggingface_hub's CommitOperationAdd and CommitOperationDelete.
            message: the commit's.
            revision: the branch.
            parent: the commit that the branch must still be at; None where the branch has none.
            create_pr: open a pull request instead.

        Returns:
            The commit, and the pull request's revision or None.

        Raises:
            Passing: no answer, or one of trouble that may pass; the commit may be there all the same.
            Conflict: the branch is at another commit.
            HubError: refused.
        """

        def send() -> tuple[str, str | None]:
            done = self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=revision,
                parent_commit=parent,
                create_pr=create_pr,
            )
            return done.oid, done.pr_revision

        return self._call("committing", send, attempts=1)

    # ----------------------------------------------------------------------------------------------------- errors

    def _call(self, doing: str, call: Callable[[], Result], attempts: int = ATTEMPTS) -> Result:
        for attempt in range(1, attempts + 1):
            try:
                return call()
            except (OSError, ValueError, RuntimeError, network_error()) as error:
                said = self._explain(doing, error)
            if not isinstance(said, Passing) or attempt == attempts:
                raise said  # not chained: the cause may hold what must not show
            pause(attempt, said, attempts)
        raise AssertionError("unreachable")

    def _explain(self, doing: str, error: BaseException) -> HubError:
        """Turn any library's error into one that says what to do."""
        origin: BaseException = error
        while isinstance(origin, RuntimeError) and origin.__cause__ is not None:  # of an upload in a thread
            origin = origin.__cause__
        response = getattr(origin, "response", None)
        status = getattr(response, "status_code", None)
        said = redact(_first_words(str(origin)), self._token)
        where = f"{self.repo_id}, {doing}"
        if isinstance(origin, _Unauthorised) or status == 401:
            return HubError(f"{where}: the Hub does not know the token ({said}). Run `hf auth login`, or set HF_TOKEN.")
        if status in _EXPLAINED:
            kind, advice = _EXPLAINED[status]
            return kind(f"{where}: {advice.format(namespace=self.repo_id.split('/')[0])} ({said})")
        if status is not None and is_passing(origin):
            words = f"{where}: the Hub answers with status {status} ({said}). Run the same command again later."
            return Passing(words, _retry_after(response))
        if is_passing(origin):
            return Passing(
                f"{where}: no answer from the Hub ({said or type(origin).__name__}). Run the same command again."
            )
        if "quota" in said.lower() or "storage limit" in said.lower():
            return HubError(
                f"{where}: the storage quota is used up ({said}). Free space, or push to another namespace."
            )
        return HubError(f"{where}: {said}")


class _Unauthorised(OSError):
    """A 401 that huggingface_hub calls a missing repository."""


_EXPLAINED: dict[int, tuple[type[HubError], str]] = {
    402: (HubError, "the storage quota is used up. Free space, or push to another namespace."),
    403: (
        HubError,
        "the token has no right to write here, or the quota is used up. Take one with the right to write to "
        "{namespace} (Access Tokens in the Hub's settings), or another --repo-id.",
    ),
    404: (HubError, "it is not there, or the token may not see it. Check --repo-id and --revision."),
    409: (Conflict, "something else is changing it. Run the same command again."),
    412: (Conflict, "it was changed by someone else in the meantime; nothing was committed. Look, and run again."),
    413: (HubError, "too large for the Hub in one piece."),
}


def network_error() -> type[Exception]:
    """Return the base of all errors of the HTTP library that huggingface_hub uses: requests, httpx or httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = [
        base for base in HfHubHTTPError.__mro__ if base.__module__.split(".")[0] in ("requests", "httpx", "httpx2")
    ]
    found: type[Exception] = bases[-1]
    return found


def is_passing(error: BaseException) -> bool:
    """Return whether a call to the Hub failed in a way that may pass: no connection, or one of `PASSING`."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in PASSING
    refused = isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled))
    return isinstance(error, (network_error(), ConnectionError)) and not refused


def _first_words(text: str) -> str:
    """Return an error's text on one line, without the addresses and request numbers of huggingface_hub's."""
    for noise in (r"\(Request ID: [^)]*\)", r"(for url|Cannot access content at|For more information check):? \S+"):
        text = re.sub(noise, "", text)
    return " ".join(text.split())[:600]


def _retry_after(response: Any) -> int | None:
    value = getattr(response, "headers", {}).get("Retry-After", "")
    return int(value) if value.isdigit() else None


def pause(attempt: int, error: Passing, attempts: int = ATTEMPTS) -> None:
    """Wait before the next attempt: as long as the Hub asked, else twice as long as the last time."""
    seconds = min(error.wait or FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
    print(f"{error} Trying again in {seconds:g} s ({attempt} of {attempts - 1}).", file=sys.stderr)
    time.sleep(seconds)


# ------------------------------------------------------------------------------------------------- what it holds


def is_hub_id(name: str | None) -> bool:
    """Tell whether a model's name is a Hub id, not a folder's: relative ones start with a dot, or hold no slash."""
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def find_folder(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """Return the folder that a name stands for: one here, or the Hub's files in its cache.

    Args:
        name: a folder or a Hub id.
        patterns: which files to fetch.
        revision: commit, tag or branch on the Hub.

    Raises:
        FileNotFoundError: neither here nor on the Hub.
        Passing: the Hub does not answer.
    """
    from ..model.backbone_loading import resolve_folder

    if not (name and Path(name).expanduser().is_dir()) and not is_hub_id(name):
        raise FileNotFoundError(f"{name}: no such folder, and no Hub id (ORG/NAME); give one of them.")
    try:
        return resolve_folder(name, None, revision, {}, patterns)
    except OSError as error:
        if any(map(is_passing, _causes(error))):
            raise Passing(f"{name}: no such folder, and no answer from the Hub. Run the same command again.") from error
        raise FileNotFoundError(f"{name}: no such folder. {error}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


# ------------------------------------------------------------------------------------------------------- the token


def find_token() -> str:
    """Return the access token of this machine.

    Raises:
        HubError: there is none.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise HubError(
            "There is no access token. Make one with the right to write in the Hub's settings (Access Tokens), then "
            "run `hf auth login` or set HF_TOKEN."
        )
    return token


def redact(text: str, token: str) -> str:
    """Take a token out of a text.

    >>> redact("Bearer hf_abc is wrong", "hf_abc")
    'Bearer [token] is wrong'
    """
    return text.replace(token, "[token]")


class _Redacted(io.TextIOBase):
    """A text stream that never passes a token on."""

    def __init__(self, stream: Any, token: str) -> None:
        self._stream, self._token = stream, token

    def write(self, text: str) -> int:
        self._stream.write(redact(text, self._token))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return bool(self._stream.isatty())


class _RedactedRecords(logging.Filter):
    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage(), self._token), ()
        return True


@contextlib.contextmanager
def hidden(token: str) -> Iterator[None]:
    """Keep a token out of all that is printed or logged: servers may send it back, libraries may log it."""
    from huggingface_hub.utils import logging as hub_logging

    handlers = [*hub_logging.get_logger("huggingface_hub").handlers, *logging.getLogger().handlers]
    filtered = _RedactedRecords(token)
    for handler in handlers:
        handler.addFilter(filtered)
    try:
        with (
            contextlib.redirect_stdout(_Redacted(sys.stdout, token)),
            contextlib.redirect_stderr(_Redacted(sys.stderr, token)),
        ):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(filtered)
