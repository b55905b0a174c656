"""The sub-command `diffretriever compress`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command
from .exit_status import DONE


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(commands, "compress", "make a store's dense vectors smaller", run_compress)
    parser.add_argument("--store", type=Path, required=True, help="the store to compress")
    parser.add_argument("--output", type=Path, required=True, help="the compressed store's folder")
    parser.add_argument(
        "--dimensions-per-byte", type=int, default=4, help="4: 8 times smaller than float16 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the k-means (default: %(default)s)")


def run_compress(options: argparse.Namespace) -> int:
    """Run `diffretriever compress`."""
    from ..store.compression import compress, open_store

    store = open_store(options.store)
    small = compress(store, options.output, options.dimensions_per_byte, options.seed, show_progress_bar=True)
    count, folder_bytes = len(small), sum(file.stat().st_size for file in options.output.iterdir())
    dense = small.manifest.num_masks * small.manifest.hidden_size
    print(
        f"{options.output}: {count} passages, {folder_bytes / count:.0f} bytes a passage in all, "
        f"{dense / options.dimensions_per_byte:.0f} of them dense vectors (float16: {2 * dense})"
    )
    return DONE
