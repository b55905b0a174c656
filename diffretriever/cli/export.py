"""The sub-command `diffretriever export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command
from .exit_status import DONE
from .load_model import add_method_option, check_model


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(commands, "export", "write a store's sparse vectors for Lucene/Anserini", run_export)
    parser.add_argument("--store", type=Path, required=True, help="passages or queries")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file: id, contents, vector")
    parser.add_argument("--model", help="the release, for the tokens' names; without it they are numbers")
    add_method_option(parser)
    parser.set_defaults(adapter=None, revision=None)
    parser.add_argument("--factor", type=float, default=100.0, help="impact = weight x this (default: %(default)s)")
    parser.add_argument("--no-texts", action="store_true", help="leave the contents empty")


def run_export(options: argparse.Namespace) -> int:
    """Run `diffretriever export`."""
    from ..search.export import impact_lines, vocabulary_of, write_lines
    from ..store.compression import open_store

    if options.model:
        check_model(options)
    store, tokens = open_store(options.store), None
    if options.model:
        from transformers import PreTrainedTokenizerFast

        tokens = vocabulary_of(PreTrainedTokenizerFast.from_pretrained(options.model), store.manifest)
    lines = impact_lines(store, tokens, options.factor, contents=not options.no_texts)
    print(f"{options.output}: {write_lines(options.output, lines)} texts")
    return DONE
