"""The sub-commands `diffretriever search`, `index`, `compress` and `export`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .modes import CANDIDATES, MODES, QUANTIZATIONS
from .qdrant_client_calls import EngineError

TRY_AGAIN = 3
STATUSES = "\n\nExit status: 0 done; 2 wrong input or options; 3 the engine is away, full or incomplete (run it again)."


def register(commands: Any) -> None:
    """Adds the sub-commands to the parser's `add_subparsers` object."""
    _search(_add(commands, "search", "find passages for a question", run_search))
    _index(_add(commands, "index", "upload a store to Qdrant; run again to resume", run_index))
    _compress(_add(commands, "compress", "make a store's dense vectors smaller", run_compress))
    _export(_add(commands, "export", "write a store's sparse vectors for Lucene/Anserini", run_export))


def _add(commands: Any, name: str, help_text: str, run: Callable[[argparse.Namespace], int]) -> Any:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda options: _guarded(run, options))
    return parser


def _guarded(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; what another try may mend has an exit status of its own."""
    try:
        return run(options)
    except (EngineError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        print(f"diffretriever {options.command}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\ndiffretriever {options.command}: interrupted; the same command goes on.", file=sys.stderr)
    return TRY_AGAIN


def _search(parser: Any) -> None:
    parser.add_argument("question", nargs="*", help="one or more questions")
    parser.add_argument("--model", help="a release: Hub id or folder; the one that encoded the store")
    parser.add_argument("--revision", help="of the release on the Hub")
    parser.add_argument("--store", type=Path, help="the passages: a folder of `diffretriever encode` or `compress`")
    _engine_options(parser, required=False)
    parser.add_argument("--queries", type=Path, help="a store of queries to search for, instead of questions")
    parser.add_argument("--run-file", type=Path, help="write a TREC run there (with --queries)")
    parser.add_argument("--mode", choices=MODES, default="multi_dense", help="scoring mode (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=10, help="passages a question (default: %(default)s)")
    parser.add_argument(
        "--candidates", type=int, default=CANDIDATES, help="of each side, in the fusion modes (default: %(default)s)"
    )
    parser.add_argument("--fusion-weight", type=float, default=0.5, help="the dense share (default: %(default)s)")
    parser.add_argument("--interactive", action="store_true", help="keep the model loaded; a question a line")
    parser.add_argument("--json", action="store_true", help="print one JSON object a question")
    parser.add_argument(
        "--device", help="for example cuda (default: the model on the first GPU, else the CPU; exact search on the CPU)"
    )
    parser.add_argument("--in-memory", action="store_true", help="copy the vectors to the device's memory first")


def _engine_options(parser: Any, required: bool) -> None:
    parser.add_argument(
        "--qdrant", required=required, help="a Qdrant server's address, or the embedded engine's folder"
    )
    parser.add_argument("--collection", default="passages", help="its name (default: %(default)s)")
    parser.add_argument("--api-key", help="of the Qdrant server")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for an answer (default: %(default)s)")


def _index(parser: Any) -> None:
    parser.add_argument("--store", type=Path, required=True, help="the passages")
    _engine_options(parser, required=True)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the vectors that a server searches on")
    parser.add_argument("--batch-size", type=int, help="passages a request (default: at most 256)")
    parser.add_argument("--no-texts", action="store_true", help="upload vectors and ids alone")


def _compress(parser: Any) -> None:
    parser.add_argument("--store", type=Path, required=True, help="the store to compress")
    parser.add_argument("--output", type=Path, required=True, help="the compressed store's folder")
    parser.add_argument(
        "--dimensions-per-byte", type=int, default=4, help="4: 8 times smaller than float16 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the k-means (default: %(default)s)")


def _export(parser: Any) -> None:
    parser.add_argument("--store", type=Path, required=True, help="passages or queries")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file: id, contents, vector")
    parser.add_argument("--model", help="the release, for the tokens' names; without it they are numbers")
    parser.add_argument("--factor", type=float, default=100.0, help="impact = weight x this (default: %(default)s)")
    parser.add_argument("--no-texts", action="store_true", help="leave the contents empty")


def run_search(options: argparse.Namespace) -> int:
    """Runs `diffretriever search`."""
    from .interactive import search

    return search(options)


def run_index(options: argparse.Namespace) -> int:
    """Runs `diffretriever index`."""
    from .compression import open_store
    from .qdrant_upload import upload

    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}.")
    store = open_store(options.store)
    sent = upload(
        store,
        options.qdrant,
        options.collection,
        texts=not options.no_texts,
        quantization=options.quantization,
        batch_size=options.batch_size,
        api_key=options.api_key,
        timeout=options.timeout,
        show_progress_bar=True,
    )
    print(f"{options.qdrant}: collection {options.collection!r} holds {len(store)} passages, {sent} of them sent now")
    return 0


def run_compress(options: argparse.Namespace) -> int:
    """Runs `diffretriever compress`."""
    from .compression import compress, open_store

    store = open_store(options.store)
    small = compress(store, options.output, options.dimensions_per_byte, options.seed, show_progress_bar=True)
    count, folder_bytes = len(small), sum(file.stat().st_size for file in options.output.iterdir())
    dense = small.manifest.num_masks * small.manifest.hidden_size
    print(
        f"{options.output}: {count} passages, {folder_bytes / count:.0f} bytes a passage in all, "
        f"{dense / options.dimensions_per_byte:.0f} of them dense vectors (float16: {2 * dense})"
    )
    return 0


def run_export(options: argparse.Namespace) -> int:
    """Runs `diffretriever export`."""
    from .compression import open_store
    from .export import impact_lines, vocabulary_of, write_lines

    tokens = None
    if options.model:
        from transformers import PreTrainedTokenizerFast

        tokens = vocabulary_of(PreTrainedTokenizerFast.from_pretrained(options.model))
    lines = impact_lines(open_store(options.store), tokens, options.factor, contents=not options.no_texts)
    print(f"{options.output}: {write_lines(options.output, lines)} texts")
    return 0
