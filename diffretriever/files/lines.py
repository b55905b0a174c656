"""Numbered lines of text files, plain or compressed, one at a time."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from .install import install_hint

COMPRESSIONS = (".gz", ".xz", ".zst")
CHUNK = 1 << 17  # bytes
PACKED = 1 << 10  # bytes of a .zst file unpacked at once: at the most 256 blocks of 128 KiB, 32 MiB
MAX_LINE = 1 << 28  # bytes of a line or of a JSON file: 256 MiB
MAX_DEPTH = 100  # levels of a JSON file: what walks through it later may call itself for each
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def open_bytes(path: str | Path) -> BinaryIO:
    """Open a file for reading, decompressed by its suffix (.gz, .xz, .zst).

    Args:
        path: the file.

    Returns:
        A binary stream of its plain content.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a .zst file without the package zstandard.
    """
    path = Path(path)
    if not path.is_file():
        what = "no file, but a folder, a pipe or a device" if path.exists() else "no such file"
        raise FileNotFoundError(f"{path}: {what}.")
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.suffix == ".zst":
        return _open_zstandard(path)
    return path.open("rb")


def _open_zstandard(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"{path}: .zst files need zstandard; {install_hint('retrieval')}") from error
    return io.BufferedReader(_ZstandardStream(path, zstandard.ZstdDecompressor()), CHUNK)


class _ZstandardStream(io.RawIOBase):
    """The plain content of a .zst file of one or more frames; zstandard's own reader takes a cut-off file for whole."""

    def __init__(self, path: Path, decompressor: Any) -> None:
        self._file = path.open("rb")
        self._decompressor = decompressor
        self._frame: Any = None  # the frame being read
        self._packed = b""  # read, and not yet unpacked
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._file.read(PACKED)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._plain = memoryview(self._frame.decompress(packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 text file with their numbers, from 1, without their line ends.

    Only a line feed ends a line: other characters that Python takes for line ends may stand in texts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not UTF-8 or longer than 256 MiB, or a compressed file that is damaged or cut off.
    """
    for number, raw in read_raw_lines(path):
        yield number, decode_line(raw, number, f"{path}, line {number}")


def read_raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file as they are, line ends included, with their numbers, from 1.

    Raises:
        As `read_lines`, save that a line need not be UTF-8.
    """
    number = 0
    with open_bytes(path) as stream:
        lines = iter(lambda: stream.readline(MAX_LINE + 1), b"")
        while (raw := _next_part(lines, f"{path}, after line {number}")) is not None:
            number += 1
            if len(raw) > MAX_LINE:
                raise ValueError(
                    f"{path}, line {number}: longer than {MAX_LINE:,} bytes; expected one record a line. Are the line "
                    "ends missing?"
                )
            yield number, raw


def read_blocks(path: str | Path) -> Iterator[bytes]:
    """Yield the plain content of a file, block by block.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a compressed file that is damaged or cut off.
    """
    with open_bytes(path) as stream:
        blocks = iter(lambda: stream.read(CHUNK), b"")
        while (block := _next_part(blocks, str(path))) is not None:
            yield block


def decode_line(raw: bytes, number: int, where: str) -> str:
    """Return the text of a line without its end, and the first without a byte order mark.

    Args:
        raw: from `read_raw_lines`.
        number: the line's, from 1.
        where: names file and line.

    Raises:
        ValueError: it is not UTF-8.
    """
    raw = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
    try:
        return raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not valid UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x}); convert the "
            "file to UTF-8."
        ) from error


def _next_part(parts: Iterator[bytes], where: str) -> bytes | None:
    try:
        return next(parts, None)
    except _damage() as error:
        raise ValueError(f"{where}: the compressed file is damaged or cut off ({error}).") from error


def _damage() -> tuple[type[Exception], ...]:
    """Return what reading a damaged compressed file raises."""
    module = sys.modules.get("zstandard")  # imported only where a .zst file is open
    errors: list[type[Exception]] = [EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile]
    return (*errors, module.ZstdError) if module is not None else tuple(errors)


def read_objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSONL file with their line numbers; blank lines are passed over.

    Raises:
        ValueError: a line that is no JSON object; the message names file and line.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        yield number, parse_object(line, f"{path}, line {number}")


def read_object(path: str | Path, largest: int = MAX_LINE) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no JSON object in UTF-8, larger than that, or nested more than 100 levels deep.
    """
    with Path(path).open("rb") as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path}: larger than {largest:,} bytes, which no such file is.")
    record = parse_object(content, str(path))
    level: list[Any] = [record]
    for _ in range(MAX_DEPTH):
        lists = (list(value.values()) if isinstance(value, dict) else value for value in level)
        level = [value for values in lists for value in values if isinstance(value, (dict, list))]
    if level:
        raise ValueError(f"{path}: not valid JSON (nested too deeply, more than {MAX_DEPTH} levels).")
    return record


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that a line or file holds.

    Raises:
        ValueError: it holds none; the message begins with `where`, which names file and line.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: not valid JSON ({error.msg}, {line}column {error.colno}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid JSON (byte {error.start + 1} is not UTF-8).") from error
    except ValueError as error:  # Python's limit on whole numbers
        raise ValueError(f"{where}: not valid JSON (a number of more than 4,300 digits).") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON (nested too deeply).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}.")
    return record
