"""What a collection of passages is, whether a Qdrant server holds it or a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...files.fields import fill
from ...store.manifest import Settings, check_numbers
from ..engine import Ranking

VECTOR_NAMES = {"single_dense": "dense", "multi_dense": "multi", "sparse_max": "sparse"}
# A vector in plain numbers: [H], [K][H], or {term: weight}.
Numbers = Sequence[float] | Sequence[Sequence[float]] | Mapping[int, float]


@dataclass(frozen=True)
class CollectionRecord:
    """What a collection records about its passages, to refuse others later.

    Args:
        count: how many there are once the upload is complete.
        hidden_size: H.
        sparse: whether they have sparse vectors.
        texts_sha256: hash of their ids and texts; None for vectors that came without a store.
        settings: what they were encoded with; None for vectors that came without a store.
        vectors_sha256: hash of all that the store holds, vectors first; None as well in a collection of an earlier
            version.

    Raises:
        ValueError: there are no passages.
    """

    count: int
    hidden_size: int
    sparse: bool = False
    texts_sha256: str | None = None
    settings: Settings | None = None
    vectors_sha256: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self, {"count": 1, "hidden_size": 1})

    @property
    def half(self) -> bool:
        """Whether the store has float16 vectors, so that the collection needs no others."""
        return self.settings is not None and self.settings.dtype == "float16"


@dataclass(frozen=True)
class Point:
    """A passage as Qdrant keeps it.

    Args:
        number: its position in the store.
        payload: its own id and, if kept, its text.
        vectors: by the names in `VECTOR_NAMES`; a passage without vectors has none.
    """

    number: int
    payload: dict[str, str]
    vectors: dict[str, Numbers] = field(default_factory=dict)


class Collection(Protocol):
    """A collection by name; made by `create`, filled by `add`."""

    place: str  # for messages, without secrets
    name: str

    def exists(self) -> bool:
        """Return whether there is one of this name."""

    def record(self) -> CollectionRecord:
        """Return what was recorded; ValueError: no such collection, or one that `upload` did not make."""

    def create(self, record: CollectionRecord, options: Mapping[str, Any]) -> None:
        """Make it, with the options of `upload`."""

    def refuse_other_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError where it was made without options that are now wanted: they would do nothing."""

    def add(self, points: Sequence[Point]) -> None:
        """Put points in."""

    def complete(self) -> None:
        """Build what is built once all points are there."""

    def count(self) -> int:
        """Return how many points are there."""

    def present(self, numbers: Sequence[int]) -> set[int]:
        """Return which of these points are there."""

    def payload(self, name: str, numbers: Sequence[int]) -> dict[int, Any]:
        """Return one field of the payload of each point that is there, None where it is absent."""

    def search(
        self, queries: Sequence[Numbers], kind: str, limit: int, among: Sequence[int] | None = None
    ) -> list[Ranking]:
        """Return the best points of each query and their scores, max_sim as a sum; `among`: of these, exactly."""

    def close(self) -> None:
        """Let go of the connection or the folder."""


def count_numbers(vector: Numbers) -> int:
    """Return how many numbers a vector holds, of a sparse one the terms, too."""
    if isinstance(vector, Mapping):
        return 2 * len(vector)
    return sum(len(row) if isinstance(row, Sequence) else 1 for row in vector)


def read_record(content: Any, where: str) -> CollectionRecord:
    """Return the record in what a collection keeps about itself; ValueError: it is none."""
    return fill(CollectionRecord, content, where, others=True)


def made_otherwise(place: str, name: str, texts: bool) -> str:
    """Say that a collection was made with texts, or without, and is now to go on otherwise."""
    state, option = ("without", "with --no-texts") if texts else ("with", "without --no-texts")
    return (
        f"{place}: collection {name!r} was made {state} texts. Go on {option}, choose another collection name, or "
        "delete that collection."
    )


def not_put_there(place: str, name: str, number: object) -> str:
    """Say that a collection answers with a point of somebody else's."""
    return (
        f"{place}: collection {name!r} answers with a point {number!r:.80}, which `diffretriever index` did not put "
        "there. Index again under another name."
    )
