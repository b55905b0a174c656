"""A store of encoded texts: memory-mapped shards and a manifest."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..files.inside import check_inside
from ..model.scoring import Memory, PreparedQueries, similarities
from .manifest import MANIFEST_FILE, Manifest, Settings, ShardEntry
from .plan import SHARD_NAME, describe_unfinished
from .segments import Rows, Stored
from .shard_file import DamagedShardError, Layout, ShardFile, pack_strings, texts_digest, write_shard


@dataclass
class ShardContents:
    """What goes into one shard, n texts.

    Args:
        ids: n ids.
        repr_hidden: float [n, K, H].
        sparse_indices: integer [n, T].
        sparse_values: float [n, T]; unused slots are 0.
        texts: n texts, or None to store none.
        repr_mask: bool [n, K], which vectors exist; None where all do.
    """

    ids: Sequence[str]
    repr_hidden: torch.Tensor
    sparse_indices: torch.Tensor
    sparse_values: torch.Tensor
    texts: Sequence[str] | None = None
    repr_mask: torch.Tensor | None = None

    def put(self, rows: torch.Tensor, encoded: Mapping[str, Any]) -> None:
        """Fill in what a model returned for some of the texts.

        Args:
            rows: int64 [b], their numbers.
            encoded: an output of `encode`, of a model that gives all its texts a mask or none.
        """
        if "repr_mask" in encoded and self.repr_mask is None:
            self.repr_mask = torch.zeros(self.repr_hidden.shape[:2], dtype=torch.bool, device="cpu")
        for name in ("repr_hidden", "repr_mask", "sparse_indices", "sparse_values"):
            if name in encoded:
                held: torch.Tensor = getattr(self, name)
                held[rows] = encoded[name].cpu().to(held.dtype)


class Shard:
    """n texts of a store, a `Segment` for search; nothing is read from the disk until it is used.

    Args:
        file: the shard.
        offset: position of its first text in the store.
        length: n.
        vocab_size: V, above all token ids; 0 where it is not known.
    """

    def __init__(self, file: ShardFile, offset: int, length: int, vocab_size: int) -> None:
        self.file = file
        self.offset = offset
        self.length = length
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return self.length

    @cached_property
    def ids(self) -> list[str]:
        """The ids of its texts."""
        return self.file.strings("ids")

    @property
    def repr_hidden(self) -> torch.Tensor:
        """[n, K, H] in the stored dtype; int8 is to be multiplied by `repr_scale`."""
        return self.file.tensor("repr_hidden")

    @property
    def repr_scale(self) -> torch.Tensor | None:
        """float32 [n, K] for int8, else None."""
        return self.file.tensor("repr_scale") if "repr_scale" in self.file else None

    @property
    def sparse_indices(self) -> torch.Tensor:
        """int32 [n, T], token ids by falling value."""
        return self.file.tensor("sparse_indices")

    @property
    def sparse_values(self) -> torch.Tensor:
        """float16 (float32 in a float32 store) [n, T]; unused slots are 0."""
        return self.file.tensor("sparse_values")

    @cached_property
    def sparse(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `Segment.sparse`; a store whose sparse vectors have no slots has none.

        Raises:
            DamagedShardError: a token id outside the vocabulary, or a weight that is negative, NaN or infinite.
        """
        if not self.sparse_indices.shape[1]:
            return None
        last = min(self._vocab_size or 2**31, 2**31) - 1  # of int32
        for name, most in (("sparse_indices", last), ("sparse_values", torch.finfo(self.sparse_values.dtype).max)):
            tensor = self.file.tensor(name)
            wrong = ~((tensor >= 0) & (tensor <= most))  # NaN is neither
            if bool(wrong.any()):
                row, slot = wrong.nonzero()[0].tolist()
                raise DamagedShardError(
                    f"{self.file.path}: `{name}` of {self.ids[row]!r:.80} holds {tensor[row, slot].item()}; expected "
                    f"numbers from 0 to {most:g}. Encode the store again."
                )
        return self.sparse_indices, self.sparse_values

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """Return the vectors of texts start … stop - 1 of this shard, float32 [stop - start, K, H]."""
        return self._vectors(slice(start, stop))

    def block(self, start: int, stop: int) -> torch.Tensor:
        """See `Segment.block`."""
        return self.repr_hidden[start:stop] if self.repr_scale is None else self.dense(start, stop)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Segment.rows`."""
        return self._vectors(rows)

    def _vectors(self, rows: Rows) -> torch.Tensor:
        """Return the vectors of some rows, float32 [n, K, H]."""
        vectors = self.repr_hidden[rows].float()
        return vectors if self.repr_scale is None else vectors.mul_(self.repr_scale[rows][..., None])

    def stored(self, rows: Rows) -> Stored:
        """See `Segment.stored`."""
        return self.repr_hidden[rows], None if self.repr_scale is None else self.repr_scale[rows]

    def similarities(self, rows: Rows, queries: PreparedQueries, memory: Memory) -> torch.Tensor:
        """See `Segment.similarities`."""
        found = similarities(self.repr_hidden[rows].flatten(0, 1), queries, memory)
        return found if self.repr_scale is None else found.mul_(self.repr_scale[rows].flatten())

    def in_memory(self) -> Shard:
        """See `Segment.in_memory`."""
        held = copy(self)
        held.file = self.file.holding(("repr_hidden", "repr_scale", "repr_mask", "codes"))
        return held

    def mask(self, start: int, stop: int) -> torch.Tensor | None:
        """See `Segment.mask`."""
        return self.file.tensor("repr_mask")[start:stop] != 0 if "repr_mask" in self.file else None

    def text_id(self, row: int) -> str:
        """See `Segment.text_id`."""
        return self.ids[row]

    def text(self, row: int) -> str | None:
        """See `Segment.text`."""
        return self.file.strings("texts", row, row + 1)[0] if "texts_offsets" in self.file else None


class Store:
    """A finished store; open it with `Store.open`.

    Attributes:
        folder: where it is.
        manifest: what it is.
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: list[Shard]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = shards
        self._offsets = [shard.offset for shard in shards]

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Store:
        """Open a store for reading.

        Args:
            folder: what `diffretriever encode` or `write_store` wrote.
            verify: also read every byte and compare with the hashes; without it sizes and headers are compared.

        Raises:
            FileNotFoundError: no store there.
            ValueError: the store is unfinished or being written, a shard is missing or damaged.
        """
        folder = Path(folder)
        if not (folder / MANIFEST_FILE).is_file():
            _refuse_unfinished(folder)
        manifest = Manifest.read(folder)
        shards = []
        for entry in manifest.shards:
            dense = dense_layout(manifest, entry.count)
            file = check_tensors(check_entry(folder, entry), manifest, entry.count, dense)
            shards.append(Shard(file, entry.first, entry.count, manifest.vocab_size))
        if verify:
            refuse_damaged(folder, manifest.shards)
        return cls(folder, manifest, shards)

    def __len__(self) -> int:
        return self.manifest.count

    def shards(self) -> Iterator[Shard]:
        """Yield the shards in order."""
        yield from self._shards

    def ids(self) -> list[str]:
        """Return all ids in order."""
        return [text_id for shard in self._shards for text_id in shard.ids]

    def text(self, position: int) -> str:
        """Return one text.

        Args:
            position: 0 … len(store) - 1.

        Raises:
            IndexError: no such position.
            ValueError: the store was made without texts.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"{self.folder}: position {position}; the store has {len(self)} texts, from 0.")
        shard = self._shards[bisect_right(self._offsets, position) - 1]
        text = shard.text(position - shard.offset)
        if text is None:
            raise ValueError(f"{self.folder}: the store holds no texts; it was made with --no-texts.")
        return text


def check_entry(folder: Path, entry: ShardEntry) -> ShardFile:
    """Return an open shard that is as the manifest says, without reading its data.

    Raises:
        DamagedShardError: missing, cut off or altered.
    """
    check_inside(folder, folder / entry.file)
    file = ShardFile(folder / entry.file)
    if file.size != entry.size or file.header_sha256 != entry.header_sha256:
        raise DamagedShardError(
            f"{file.path}: the shard is not the one that the manifest names (header hash {file.header_sha256[:12]}, "
            f"expected {entry.header_sha256[:12]}); its `diffretriever encode` command, run again, mends the store; "
            "what another command made must be made anew."
        )
    return file


def check_tensors(file: ShardFile, settings: Settings, count: int, dense: Layout) -> ShardFile:
    """Refuse a shard whose tensors are not those of a store with these settings.

    Args:
        file: the shard.
        settings: of the store.
        count: texts in the shard.
        dense: what holds their dense vectors.

    Returns:
        The shard.

    Raises:
        DamagedShardError: names the tensor.
    """
    slots, weights = (count, settings.sparse_top_k), torch.float32 if settings.dtype == "float32" else torch.float16
    expected = {**dense, "sparse_indices": (torch.int32, slots), "sparse_values": (weights, slots)}
    if "repr_mask" in file:
        expected["repr_mask"] = (torch.uint8, (count, settings.num_masks))
    for name in ("ids", "texts"):
        if name == "ids" or f"{name}_bytes" in file or f"{name}_offsets" in file:
            expected |= {f"{name}_bytes": (torch.uint8, (None,)), f"{name}_offsets": (torch.int64, (count + 1,))}
    file.check(expected)
    return file


def dense_layout(settings: Settings, count: int) -> Layout:
    """Return how a shard of a store with these settings holds the dense vectors of `count` texts."""
    vectors = getattr(torch, settings.dtype), (count, settings.num_masks, settings.hidden_size)
    scale = {"repr_scale": (torch.float32, vectors[1][:2])} if settings.dtype == "int8" else {}
    return {"repr_hidden": vectors, **scale}


def damaged_shards(folder: Path, shards: Mapping[str, ShardEntry | None]) -> dict[str, DamagedShardError]:
    """Read shards whole, as many at once as there are processor cores, and find the damaged ones.

    Args:
        folder: of the store.
        shards: {file name: the manifest's entry}; None where there is no manifest yet, and the file vouches for itself.

    Returns:
        {file name: what is wrong with it}, in the order of `shards`; {} where every byte is as it was written.
    """

    def find_damage(name: str) -> DamagedShardError | None:
        entry = shards[name]
        try:
            (ShardFile(folder / name) if entry is None else check_entry(folder, entry)).verify()
        except DamagedShardError as error:
            return error
        return None

    with ThreadPoolExecutor(os.cpu_count()) as workers:  # hashing lets other threads run
        found = zip(shards, workers.map(find_damage, shards), strict=True)
        return {name: error for name, error in found if error is not None}


def refuse_damaged(folder: Path, entries: Iterable[ShardEntry]) -> None:
    """Read all shards of a finished store whole.

    Raises:
        DamagedShardError: a shard is not what the manifest says; the first one is named.
    """
    for error in damaged_shards(folder, {entry.file: entry for entry in entries}).values():
        raise error


def _refuse_unfinished(folder: Path) -> None:
    """Say what is there instead of a finished store."""
    if reason := describe_unfinished(folder):
        raise ValueError(reason)
    missing = f"no store here ({MANIFEST_FILE} is missing)" if folder.is_dir() else "no such folder"
    raise FileNotFoundError(f"{folder}: {missing}; make a store with `diffretriever encode`.")


def shard_tensors(contents: ShardContents, dtype: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard file.

    Args:
        contents: what to store.
        dtype: one of STORE_DTYPES. int8 keeps each vector's largest value as 127, with a float32 scale beside it.

    Raises:
        ValueError: sizes that do not go together, or values that the dtype cannot hold.
    """
    vectors = contents.repr_hidden.float()
    count = len(contents.ids)
    sizes = {"repr_hidden": len(vectors), "sparse_indices": len(contents.sparse_indices)}
    sizes |= {"sparse_values": len(contents.sparse_values)}
    sizes |= {} if contents.texts is None else {"texts": len(contents.texts)}
    sizes |= {} if contents.repr_mask is None else {"repr_mask": len(contents.repr_mask)}
    for name, size in sizes.items():
        if size != count:
            raise ValueError(f"a shard has {count} ids, but {name} has {size} rows.")
    tensors: dict[str, torch.Tensor] = {}
    if dtype == "int8":
        scale = vectors.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny) / 127.0  # [n, K]
        tensors["repr_scale"] = scale
        tensors["repr_hidden"] = (vectors / scale[..., None]).round().clamp(-127, 127).to(torch.int8)
    else:
        tensors["repr_hidden"] = vectors.to(getattr(torch, dtype))
    value_dtype = torch.float32 if dtype == "float32" else torch.float16
    if contents.repr_mask is not None:
        tensors["repr_mask"] = contents.repr_mask.to(torch.uint8)
    tensors["sparse_indices"] = contents.sparse_indices.to(torch.int32)
    tensors["sparse_values"] = contents.sparse_values.to(value_dtype)
    for name in ("repr_scale" if dtype == "int8" else "repr_hidden", "sparse_values"):
        finite = _finite_rows(tensors[name])
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            held = tensors[name].dtype
            raise ValueError(
                f"{name} of {contents.ids[row]!r} is NaN, infinite or too large for {held}; try --dtype bfloat16 or "
                "float32, or look at the model."
            )
    tensors["ids_bytes"], tensors["ids_offsets"] = pack_strings(contents.ids)
    if contents.texts is not None:
        tensors["texts_bytes"], tensors["texts_offsets"] = pack_strings(contents.texts)
    return tensors


def _finite_rows(values: torch.Tensor) -> torch.Tensor:
    """Return which rows [n, …] hold finite numbers alone, bool [n]: their extremes tell it, NaN being both.

    It takes a tenth of the time of `isfinite` on all of them, which was most of the writing of wide vectors.
    """
    rows = values.flatten(1)
    if not rows.shape[1]:
        return torch.ones(len(rows), dtype=torch.bool, device="cpu")
    return torch.isfinite(rows.amax(dim=1)) & torch.isfinite(rows.amin(dim=1))


def write_store(folder: str | Path, shards: Iterable[ShardContents], manifest_fields: Mapping[str, Any]) -> Store:
    """Write a store from vectors that are already there.

    Args:
        folder: a folder that is empty or not there yet.
        shards: the shards in order; each is written before the next is asked for.
        manifest_fields: fields of `Settings`; those left out are derived from the first shard or neutral.

    Returns:
        The store, open.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: no text at all, or a shard unlike the first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty; a store is written into a folder of its own.")
    entries: list[ShardEntry] = []
    settings: Settings | None = None
    first = 0
    for number, contents in enumerate(shards):
        shape = (*contents.repr_hidden.shape[1:], contents.sparse_indices.shape[1])
        if settings is None:
            settings = settings_like(manifest_fields, shape)
        if shape != (settings.num_masks, settings.hidden_size, settings.sparse_top_k):
            raise ValueError(f"shard {number} has K, H and T of {shape}, unlike the settings.")
        file = folder / SHARD_NAME.format(number)
        texts = contents.texts if contents.texts is not None else [""] * len(contents.ids)
        metadata = {"first": str(first), "count": str(len(contents.ids))}
        metadata["texts_sha256"] = texts_digest(contents.ids, texts)
        write_shard(file, shard_tensors(contents, settings.dtype), metadata)
        entries.append(entry_of(ShardFile(file)))
        first += len(contents.ids)
    if settings is None:
        raise ValueError(f"{folder}: no shards were given; a store holds at least one text.")
    Manifest.of(settings, entries).write(folder)
    return Store.open(folder)


def entry_of(file: ShardFile) -> ShardEntry:
    """Return the manifest's entry for a shard file.

    Raises:
        DamagedShardError: the header lacks what the entry needs.
    """
    try:
        first, count = int(file.metadata["first"]), int(file.metadata["count"])
        texts = file.metadata["texts_sha256"]
    except (KeyError, ValueError) as error:
        raise DamagedShardError(f"{file.path}: the shard's header is damaged ({error!r}).") from error
    return ShardEntry(file.path.name, first, count, file.size, file.header_sha256, texts)


def settings_like(given: Mapping[str, Any], shape: tuple[int, ...]) -> Settings:
    """Return settings with K, H and T of `shape`, and neutral values for what is not given.

    Raises:
        ValueError: a field that settings do not have, or an unknown dtype.
    """
    unknown = set(given) - {entry.name for entry in fields(Settings)}
    if unknown:
        raise ValueError(f"manifest_fields holds {sorted(unknown)}, which no manifest has.")
    neutral: dict[str, Any] = {"model": "", "revision": None, "weights_sha256": "", "adapter_sha256": None}
    neutral |= {"side": "passage", "num_masks": shape[0], "hidden_size": shape[1], "sparse_top_k": shape[2]}
    neutral |= {"vocab_size": 0, "dtype": "float16", "prompts": {}, "max_length": 0}
    return Settings(**{**neutral, **given})
