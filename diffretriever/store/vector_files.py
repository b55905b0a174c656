"""Vectors that were made elsewhere, in Parquet files, as a store: every row is held against the model's settings."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from ..data.datasets_reader import parquet_batches
from ..data.ids import find_repeated, repeated_hashes
from ..files.durable import publish_folder
from ..files.hashes import hash64
from ..files.removal import refuse_link
from .manifest import Settings
from .store import ShardContents, Store, write_store

COLUMNS = {
    "id": "a string each",
    "dense": "a list of H numbers, or of K such lists",
    "sparse_indices": "a list of token ids",
    "sparse_values": "their weights",
    "text": "a string each, if the store is to keep them",
}
OPTIONAL = {"text"}
LENGTH_ERROR = 0.01  # of a vector that was normalised in bfloat16
SAME = 0.99  # cosine of one text's vectors, made twice
SAME_WEIGHTS = 0.9  # of its sparse vectors, where a weight that rounding moves may fall out of the T largest


class Rows(NamedTuple):
    """n rows of a file, checked.

    Args:
        where: n places, for messages.
        ids: n ids.
        vectors: float32 [n, K, H]; zeros where a row has fewer than K.
        counts: int64 [n], vectors of each row.
        indices: int64 [n, T]; values: float32 [n, T], 0 in unused slots.
        texts: n texts; None where the files have none.
    """

    where: list[str]
    ids: list[str]
    vectors: torch.Tensor
    counts: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor
    texts: list[str] | None


def import_vectors(
    files: Sequence[Path], folder: Path, settings: Settings, shard_size: int, may_have_fewer: bool = False
) -> Store:
    """Write a store from Parquet files; it appears whole or not at all.

    Args:
        files: with the columns COLUMNS; rows in the store's order. Without vectors of the sparse side, as where the
            model has none, the sparse columns are left out.
        folder: of the store; empty, or not there.
        settings: from `describe_model`, of the model that made the vectors.
        shard_size: texts a shard.
        may_have_fewer: whether a text may have fewer than K vectors.

    Returns:
        The store.

    Raises:
        FileExistsError: as `check_output`.
        ImportError: pyarrow is not installed.
        ValueError: a file or row that cannot be this model's; the message names both.
    """
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    hashes = array("q")
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        rows = read_rows(files, settings, may_have_fewer)
        made = Path(scratch) / "store"
        fields = {name: getattr(settings, name) for name in Settings.__dataclass_fields__}
        store = write_store(made, _shards(rows, shard_size, may_have_fewer, hashes), fields)
        if repeated := find_repeated(store.ids(), repeated_hashes(hashes)):
            name, first, second = repeated[0]
            raise ValueError(
                f"the id {name!r:.100} is that of row {first} and of row {second}; each must have its own."
            )
        publish_folder(made, folder)
    return Store.open(folder)


def check_output(folder: Path) -> None:
    """Refuse a place where no store can be made.

    Raises:
        FileExistsError: it holds something, or is a link.
    """
    refuse_link(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: not empty; a store is written into a folder of its own.")


def _shards(rows: Iterable[Rows], size: int, masked: bool, hashes: array[int]) -> Iterator[ShardContents]:
    """Cut rows into shards, and note each id's hash."""
    waiting: list[Rows] = []
    for part in rows:
        hashes.extend(map(hash64, part.ids))
        waiting.append(part)
        while sum(len(each.ids) for each in waiting) >= size:
            whole = _joined(waiting)
            yield _contents(_cut(whole, 0, size), masked)
            waiting = [_cut(whole, size, len(whole.ids))]
    if waiting and (rest := _joined(waiting)).ids:
        yield _contents(rest, masked)


def _joined(parts: list[Rows]) -> Rows:
    return Rows(
        [place for part in parts for place in part.where],
        [text_id for part in parts for text_id in part.ids],
        torch.cat([part.vectors for part in parts]),
        torch.cat([part.counts for part in parts]),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.values for part in parts]),
        None if parts[0].texts is None else [text for part in parts for text in part.texts or ()],
    )


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    cut: list[Any] = [None if part is None else part[start:stop] for part in rows]
    return Rows(*cut)


def _contents(rows: Rows, masked: bool) -> ShardContents:
    exists = torch.arange(rows.vectors.shape[1], device="cpu") < rows.counts[:, None]
    return ShardContents(rows.ids, rows.vectors, rows.indices, rows.values, rows.texts, exists if masked else None)


def read_rows(files: Sequence[Path], settings: Settings, may_have_fewer: bool = False) -> Iterator[Rows]:
    """Read and check rows, some hundreds at a time; arguments and errors are those of `import_vectors`."""
    wanted = [name for name in COLUMNS if settings.sparse_top_k or not name.startswith("sparse")]
    with_texts: bool | None = None
    total = 0
    for file in files:
        number = 0
        for batch in parquet_batches(file, wanted):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            if missing := [name for name in wanted if name not in columns and name not in OPTIONAL]:
                raise ValueError(f"{file}: lacks the column {missing[0]!r} ({COLUMNS[missing[0]]}).")
            if with_texts not in (None, "text" in columns):
                raise ValueError(f"{file}: some files have the column 'text', others have not; give all or none.")
            with_texts = "text" in columns
            where = [f"{file}, row {number + row}" for row in range(1, len(batch) + 1)]
            number, total = number + len(batch), total + len(batch)
            yield _checked(columns, where, settings, may_have_fewer)
    if not total:
        raise ValueError(f"{', '.join(map(str, files))}: no rows; expected at least one.")


def _checked(columns: dict[str, Any], where: list[str], settings: Settings, may_have_fewer: bool) -> Rows:
    """Return the rows of one batch of columns."""
    for name, column in columns.items():
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(f"{where[row]}: `{name}` is missing.")
    ids = _strings(columns["id"], "id", where)
    if "" in ids:
        raise ValueError(f"{where[ids.index('')]}: `id` is empty.")
    vectors, counts = _dense(columns["dense"], where, settings, may_have_fewer)
    indices, values = _sparse(columns, where, settings)
    texts = _strings(columns["text"], "text", where) if "text" in columns else None
    return Rows(where, ids, vectors, counts, indices, values, texts)


def _strings(column: Any, name: str, where: list[str]) -> list[str]:
    values: list[str] = column.to_pylist()
    if values and not isinstance(values[0], str):
        raise ValueError(f"{where[0]}: `{name}` is {values[0]!r:.80}; expected {COLUMNS[name]}.")
    return values


def _lists(column: Any, name: str, where: list[str]) -> tuple[np.ndarray, Any]:
    """Return the lengths of a column's lists, int64 [n], and their entries one after another."""
    import pyarrow.compute

    if not hasattr(column, "flatten") or not hasattr(column.type, "value_type"):
        raise ValueError(f"{where[0]}: `{name}` is of type {column.type}; expected {COLUMNS[name]}.")
    if column.null_count:
        raise ValueError(f"{where[0]} and the next: `{name}` has a vector that is missing.")
    lengths = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths, column.flatten()


def _numbers(values: Any, name: str, dtype: Any, where: list[str]) -> torch.Tensor:
    import pyarrow

    if not (pyarrow.types.is_integer(values.type) or (dtype is np.float32 and pyarrow.types.is_floating(values.type))):
        raise ValueError(f"{where[0]}: `{name}` holds {values.type}; expected {COLUMNS[name]}.")
    if values.null_count:
        raise ValueError(f"{where[0]} and the next: `{name}` has a number that is missing.")
    return torch.from_numpy(values.to_numpy(zero_copy_only=False).astype(dtype))


def _dense(
    column: Any, where: list[str], settings: Settings, may_have_fewer: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors [n, K, H] and how many each row has."""
    counts, inner = _lists(column, "dense", where)
    most, width = settings.num_masks, settings.hidden_size
    if hasattr(inner.type, "value_type"):
        widths, inner = _lists(inner, "dense", where)
    else:
        counts, widths = np.ones_like(counts), counts
    least = 1 if may_have_fewer else most
    for row in np.flatnonzero((counts < least) | (counts > most))[:1]:
        wanted = f"at most {most}" if may_have_fewer else str(most)
        raise ValueError(f"{where[row]}: `dense` has {counts[row]} vectors; this model's {settings.side} has {wanted}.")
    owners = np.repeat(np.arange(len(counts)), counts)
    for place in np.flatnonzero(widths != width)[:1]:
        raise ValueError(f"{where[owners[place]]}: a vector has {widths[place]} numbers; this model's have {width}.")
    flat = _numbers(inner, "dense", np.float32, where).view(-1, width)
    lengths = flat.norm(dim=-1)
    normalised = settings.options.get("normalize", True)
    wrong = ~torch.isfinite(lengths) | ((lengths - 1).abs() > LENGTH_ERROR if normalised else lengths.isnan())
    for place in wrong.nonzero().flatten()[:1].tolist():
        wanted = "1, as this model's vectors have" if normalised else "finite"
        raise ValueError(f"{where[owners[place]]}: a vector's length is {float(lengths[place]):g}; expected {wanted}.")
    vectors = torch.zeros(len(counts), most, width, dtype=torch.float32, device="cpu")
    slots = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    vectors[torch.from_numpy(owners), torch.from_numpy(slots)] = flat
    return vectors, torch.from_numpy(counts)


def _sparse(columns: dict[str, Any], where: list[str], settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sparse vectors: indices and values [n, T], in files' order."""
    top_k = settings.sparse_top_k
    shape = len(where), top_k
    indices, values = (
        torch.zeros(shape, dtype=torch.int64, device="cpu"),
        torch.zeros(shape, dtype=torch.float32, device="cpu"),
    )
    if not top_k:
        return indices, values
    counts, inner = _lists(columns["sparse_indices"], "sparse_indices", where)
    weights, weighed = _lists(columns["sparse_values"], "sparse_values", where)
    for row in np.flatnonzero(counts != weights)[:1]:
        raise ValueError(f"{where[row]}: {counts[row]} `sparse_indices`, but {weights[row]} `sparse_values`.")
    for row in np.flatnonzero(counts > top_k)[:1]:
        raise ValueError(f"{where[row]}: {counts[row]} sparse weights; this model keeps {top_k}.")
    flat = _numbers(inner, "sparse_indices", np.int64, where), _numbers(weighed, "sparse_values", np.float32, where)
    owners = np.repeat(np.arange(len(counts)), counts)
    wrong = (flat[0] < 0) | (flat[0] >= settings.vocab_size) | ~(torch.isfinite(flat[1]) & (flat[1] > 0))
    for place in wrong.nonzero().flatten()[:1].tolist():
        raise ValueError(
            f"{where[owners[place]]}: token {int(flat[0][place])} weighs {float(flat[1][place]):g}; expected a token "
            f"below {settings.vocab_size} and a weight that is positive and finite."
        )
    slots = torch.from_numpy(np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts))
    indices[torch.from_numpy(owners), slots], values[torch.from_numpy(owners), slots] = flat
    return indices, values


def compare_with_model(files: Sequence[Path], model: Any, settings: Settings, count: int, may_have_fewer: bool) -> int:
    """Encode the first texts with the model and hold its vectors against the files'.

    Args:
        files: as for `import_vectors`.
        model: from `AutoModel.from_pretrained`.
        settings: of the model.
        count: how many texts.
        may_have_fewer: as for `import_vectors`.

    Returns:
        How many texts were compared: 0 where the files have none.

    Raises:
        ValueError: another model's vectors; the message names the row.
    """
    rows = next(read_rows(files, settings, may_have_fewer), None)
    if rows is None or rows.texts is None or not count:
        return 0
    texts = rows.texts[:count]
    found = model.encode_texts(texts, is_query=settings.side == "query", compute_sparse=settings.sparse_top_k > 0)
    own = found.repr_hidden.float().cpu()  # [n, K, H]
    exists = torch.arange(own.shape[1], device="cpu") < rows.counts[: len(texts), None]
    cosines = F.cosine_similarity(own, rows.vectors[: len(texts)], dim=-1).masked_fill(~exists, 1.0).amin(dim=1)
    for row in (cosines < SAME).nonzero().flatten()[:1].tolist():
        raise ValueError(
            f"{rows.where[row]}: its vectors are not those that this model has for its text (cosine "
            f"{float(cosines[row]):.3f}); was it another release, side, prompt or length?"
        )
    if settings.sparse_top_k:
        _compare_sparse(rows, found.sparse_indices, found.sparse_values)
    return len(texts)


def _compare_sparse(rows: Rows, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Raise ValueError where a row's sparse vector is not the model's own, of `indices` and `values` [n, T]."""
    for row in range(len(indices)):
        ours, theirs = (
            {term: weight for term, weight in zip(terms[row].tolist(), weights[row].tolist(), strict=True) if weight}
            for terms, weights in ((indices, values), (rows.indices, rows.values))
        )
        if theirs:  # files may keep fewer weights than the model does
            ours = dict(sorted(ours.items(), key=lambda pair: -pair[1])[: len(theirs)])
        product = sum(weight * theirs.get(term, 0.0) for term, weight in ours.items())
        lengths = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        if product < SAME_WEIGHTS * lengths or bool(ours) != bool(theirs):
            raise ValueError(
                f"{rows.where[row]}: its sparse weights are not those that this model has for its text (cosine "
                f"{product / lengths if lengths else 0.0:.3f}); are they of another tokenizer, or not of its words?"
            )
