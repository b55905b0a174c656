"""One shard of a store: a safetensors file that holds its own hash and is memory-mapped when read.

The header's metadata holds the SHA-256 of all bytes behind it, and the manifest holds the SHA-256 of the header:
together they vouch for every byte, and one rename makes shard and hash appear at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..files.durable import write_whole
from ..files.hashes import hash_file
from ..files.lines import parse_object
from ..model.tokenization_helpers import without_lone_surrogates

TYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}  # wide types first: each tensor then starts at a multiple of its element's size
DTYPES = {name: dtype for dtype, name in TYPES.items()}
MAX_HEADER = 1 << 20
Layout = Mapping[str, tuple[torch.dtype, Sequence[int | None]]]  # {tensor: its dtype and shape, None for any length}


class DamagedShardError(ValueError):
    """A shard file is missing, cut off or altered."""


def pack_strings(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the UTF-8 bytes of texts one behind the other, uint8, and where each begins, int64 [n + 1].

    >>> pack_strings(["né", ""])[1].tolist()
    [0, 3, 3]
    """
    encoded = [text.encode("utf-8") for text in texts]
    offsets = torch.zeros(len(texts) + 1, dtype=torch.int64, device="cpu")
    offsets[1:] = torch.tensor([len(text) for text in encoded], dtype=torch.int64, device="cpu").cumsum(0)
    joined = b"".join(encoded)
    data = (
        torch.frombuffer(bytearray(joined), dtype=torch.uint8)
        if joined
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    return data, offsets


def unpack_strings(data: torch.Tensor, offsets: torch.Tensor) -> list[str]:
    """Return the texts that `pack_strings` packed.

    Args:
        data: their bytes.
        offsets: all of `pack_strings`' offsets, or those of some consecutive texts.

    Raises:
        ValueError: the offsets lie outside the bytes or fall, or bytes are not UTF-8.
    """
    places = offsets.tolist()
    if places[0] < 0 or places[-1] > len(data) or any(end < start for start, end in pairwise(places)):
        raise ValueError(f"offsets that do not rise from 0 to {len(data)}")
    packed = data[places[0] : places[-1]].numpy().tobytes()
    return [packed[start - places[0] : end - places[0]].decode("utf-8") for start, end in pairwise(places)]


def texts_digest(ids: Sequence[str], texts: Sequence[str]) -> str:
    """Return the SHA-256 over ids and texts, lengths included, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for text_id, text in zip(ids, texts, strict=True):
        for value in (text_id.encode("utf-8"), text.encode("utf-8")):
            digest.update(len(value).to_bytes(8, "little"))
            digest.update(value)
    return digest.hexdigest()


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as a safetensors file, whole or not at all.

    Args:
        path: the file.
        tensors: on the CPU, of a type in TYPES.
        metadata: strings for the header; `sha256` is added.

    Raises:
        OSError: it could not be written, the disk is full for one.
    """
    order = sorted(tensors, key=lambda name: (list(TYPES).index(tensors[name].dtype), name))
    views = [_bytes_of(tensors[name]) for name in order]
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    header: dict[str, Any] = {"__metadata__": {**metadata, "sha256": digest.hexdigest()}}
    start = 0
    for name, view in zip(order, views, strict=True):
        end = start + len(view)
        tensor = tensors[name]
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    packed = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    packed += b" " * (-len(packed) % 8)
    write_whole(path, [len(packed).to_bytes(8, "little") + packed, *(view for view in views if len(view))])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


Place = tuple[torch.dtype, tuple[int, ...], int, int]  # dtype, shape, first byte, byte after the last


def _end_of_data(places: Mapping[str, Place], begin: int) -> int:
    """Return where the tensors end that lie one behind the other, or raise ValueError for a header that says else.

    Args:
        places: of the tensors, counted from `begin`.
        begin: where they begin in the file.
    """
    end = 0
    for name, (dtype, shape, start, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
            raise ValueError(f"tensor {name!r} has a shape or place of something else than whole numbers")
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} does not fit its place")
        if (begin + start) % dtype.itemsize:
            raise ValueError(f"tensor {name!r} does not begin at a multiple of {dtype.itemsize} bytes")
        end = stop
    return begin + end


class ShardFile:
    """An open shard file: its header is read, its tensors are mapped and read when used.

    Args:
        path: the file.

    Attributes:
        metadata: the header's strings.
        header_sha256: hash of the header, 64 hexadecimal digits.

    Raises:
        DamagedShardError: no such file, or its header or size is not a shard's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DamagedShardError(f"{path}: the shard is no file.")
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                packed = stream.read(min(length, MAX_HEADER))
            self.size = path.stat().st_size
        except FileNotFoundError as error:
            raise DamagedShardError(f"{path}: the shard is missing.") from error
        self._start = 8 + length
        self.header_sha256 = hashlib.sha256(packed).hexdigest()
        try:
            header = parse_object(packed, str(path))
            self.metadata: dict[str, str] = header.pop("__metadata__")
            if not all(isinstance(value, str) for value in self.metadata.values()):
                raise ValueError("__metadata__ holds something else than strings")
            self._places: dict[str, Place] = {
                name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            }
            expected = _end_of_data(self._places, self._start)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedShardError(f"{path}: the shard's header is damaged ({error!r:.120}).") from error
        if self.size != expected:
            raise DamagedShardError(f"{path}: the shard has {self.size} bytes; its header says {expected}.")
        self._mapped: torch.Tensor | None = None
        self._held: dict[str, torch.Tensor] = {}

    def holding(self, names: Iterable[str]) -> ShardFile:
        """Return the same file with the tensors of these names, where it has them, in memory."""
        other = copy(self)
        other._held = {name: self.tensor(name).clone() for name in names if name in self}
        return other

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor that is read from the file only where it is used.

        Raises:
            DamagedShardError: the shard has no such tensor.
            OSError: the file cannot be mapped.
        """
        if name not in self._places:
            raise DamagedShardError(f"{self.path}: the shard has no tensor {name!r}.")
        if name in self._held:
            return self._held[name]
        if self._mapped is None:
            try:  # private: a change in memory would never reach the file
                self._mapped = torch.from_file(
                    str(self.path), shared=False, size=self.size, dtype=torch.uint8, device="cpu"
                )
            except RuntimeError as error:
                raise OSError(f"{self.path}: the file cannot be mapped ({error}).{self._advice(str(error))}") from error
        dtype, shape, start, end = self._places[name]
        return self._mapped[self._start + start : self._start + end].view(dtype).view(shape)

    def _advice(self, reason: str) -> str:
        """Return what to do where torch says for this reason that the file cannot be mapped."""
        if without_lone_surrogates(str(self.path)) != str(self.path):
            return " Its name is not valid UTF-8: rename the folder."
        if f"({errno.ENOMEM})" in reason:
            return (
                " Linux lets a process map 65,530 files unless vm.max_map_count is raised: raise it, or make the store "
                "with a larger --shard-size."
            )
        changed = f"({errno.ENOENT})" in reason or "is smaller than" in reason
        return " It was removed or changed after the store was opened: open the store anew." if changed else ""

    def check(self, expected: Layout) -> None:
        """Compare the header with what the tensors should be.

        Raises:
            DamagedShardError: a tensor is missing, unknown or another; names it.
        """
        for name in sorted(expected.keys() ^ self._places.keys()):
            words = "has no tensor" if name in expected else "has an unknown tensor"
            raise DamagedShardError(f"{self.path}: the shard {words} {name!r:.80}.")
        for name, (dtype, shape) in expected.items():
            found_dtype, found, _, _ = self._places[name]
            sizes = zip(found, shape, strict=False)
            if found_dtype != dtype or len(found) != len(shape) or any(b not in (a, None) for a, b in sizes):
                wanted = ["any" if size is None else size for size in shape]
                raise DamagedShardError(
                    f"{self.path}: tensor {name!r} is {TYPES[found_dtype]} {list(found)}; expected {TYPES[dtype]} "
                    f"[{', '.join(map(str, wanted))}]."
                )

    def strings(self, name: str, start: int = 0, stop: int | None = None) -> list[str]:
        """Return packed texts start … stop - 1, all of them by default.

        Args:
            name: "ids" or "texts".

        Raises:
            DamagedShardError: they are not packed as `pack_strings` does it.
        """
        offsets = self.tensor(f"{name}_offsets")[start : None if stop is None else stop + 1]
        try:
            return unpack_strings(self.tensor(f"{name}_bytes"), offsets)
        except ValueError as error:
            raise DamagedShardError(f"{self.path}: `{name}` is damaged ({error}).") from error

    def verify(self) -> None:
        """Read every byte and compare with the hash in the header.

        Raises:
            DamagedShardError: a byte has changed.
        """
        if hash_file(self.path, self._start) != self.metadata.get("sha256"):
            raise DamagedShardError(f"{self.path}: the shard's bytes do not match its hash; a bit has flipped on disk.")
