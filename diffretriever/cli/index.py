"""The sub-command `diffretriever index`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..search.modes import QUANTIZATIONS
from .arguments import RESUMED, add_command, add_qdrant_options, collection_of, count
from .exit_status import DONE


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(commands, "index", "upload a store to Qdrant; run again to resume", run_index, again=RESUMED)
    parser.add_argument("--store", type=Path, required=True, help="the passages")
    add_qdrant_options(parser, required=True)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the vectors that are searched first")
    parser.add_argument("--hnsw", action="store_true", help="in a folder: build a graph, for approximate dense search")
    parser.add_argument("--batch-size", type=count, help="passages a request at the most (default: 256)")
    parser.add_argument("--no-texts", action="store_true", help="upload vectors and ids alone")


def run_index(options: argparse.Namespace) -> int:
    """Run `diffretriever index`."""
    from ..search.qdrant.upload import upload
    from ..store.compression import open_store

    store = open_store(options.store)
    collection, timeout = collection_of(options)
    sent = upload(
        store,
        options.qdrant,
        collection,
        texts=not options.no_texts,
        quantization=options.quantization,
        hnsw=options.hnsw,
        batch_size=options.batch_size,
        timeout=timeout,
        show_progress_bar=True,
    )
    print(f"{options.qdrant}: collection {collection!r} holds {len(store)} passages, {sent} of them sent now")
    return DONE
