"""Records of Parquet files and of Hugging Face datasets, a batch at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files.install import install_hint

BATCH_ROWS = 512
EXTRA = install_hint("retrieval")


def read_parquet(file: Path, known: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where, fields) of each row of a Parquet file; arguments and errors are those of `parquet_batches`."""
    row = 0
    for batch in parquet_batches(file, known):
        for record in batch.to_pylist():
            row += 1
            yield f"{file}, row {row}", record


def parquet_batches(file: Path, known: Collection[str]) -> Iterator[Any]:
    """Yield a Parquet file's rows as pyarrow's record batches, at most BATCH_ROWS at a time.

    Args:
        file: the file.
        known: the columns to read, where the file has them.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: not a Parquet file, or damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{file}: Parquet files need pyarrow; {EXTRA}") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as table:
            columns = [name for name in table.schema_arrow.names if name in known]
            for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                batch.validate(full=True)  # UTF-8 in strings, for one
                yield batch
                row += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}, after row {row}: not a whole Parquet file ({error}).") from error


def parse_source(source: str, kind: str) -> tuple[str, str | None, str]:
    """Split `hf:NAME[:SPLIT]` or `hf:NAME:CONFIG:SPLIT`; without a split, `kind` is the split and the config.

    >>> parse_source("hf:BeIR/scifact", "corpus")
    ('BeIR/scifact', 'corpus', 'corpus')
    >>> parse_source("hf:me/texts:train", "corpus")
    ('me/texts', None, 'train')
    """
    parts = source.removeprefix("hf:").split(":")
    if not all(parts) or len(parts) > 3:
        raise ValueError(f"{source}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.")
    if len(parts) == 1:
        return parts[0], kind, kind
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


def read_dataset(source: str, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where, fields) of each row of a Hugging Face dataset, from its memory-mapped cache.

    Args:
        source: `hf:NAME[:SPLIT]` or `hf:NAME:CONFIG:SPLIT`; NAME is a Hub id or a local folder.
        kind: "corpus" or "queries".

    Raises:
        ImportError: the package datasets is not installed.
        ValueError, FileNotFoundError: no such dataset, config or split.
    """
    name, config, split = parse_source(source, kind)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source}: Hugging Face datasets need the package datasets; {EXTRA}") from error
    if Path(name).is_dir() and (Path(name) / "state.json").is_file():
        table = datasets.load_from_disk(name)
    else:
        try:
            table = datasets.load_dataset(name, config, split=split)
        except (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"{source}: the dataset could not be read ({error}).") from error
    for row, record in enumerate(table, start=1):
        yield f"{source}, row {row}", record
