"""The sub-command `diffretriever import-vectors`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command, count, count_or_none
from .exit_status import DONE
from .load_model import RELEASE, add_length_options, add_mask_options, add_model_options, lengths_of, load_model

DTYPES = ("float16", "bfloat16", "float32", "int8")
DESCRIPTION = """\
Make a store of vectors that another engine has encoded (vLLM, Spark, Ray), from Parquet files with the columns id,
dense, sparse_indices, sparse_values and, if wanted, text. Each row is checked; where there are texts, the model
encodes the first again, and other vectors than its own are refused."""


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(commands, "import-vectors", "make a store of vectors from elsewhere", run_import, DESCRIPTION)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="Parquet files, or folders of them")
    parser.add_argument("--output", type=Path, required=True, help="the store's folder")
    add_model_options(parser, f"{RELEASE}; the one that made the vectors")
    add_mask_options(parser)
    add_length_options(parser)
    parser.add_argument("--queries", action="store_true", help="they are queries', not passages'")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the store (default: %(default)s)")
    parser.add_argument("--shard-size", type=count, default=4096, help="texts a shard (default: %(default)s)")
    parser.add_argument("--compare", type=count_or_none, default=8, help="texts to encode again (default: %(default)s)")


def run_import(options: argparse.Namespace) -> int:
    """Run `diffretriever import-vectors`."""
    files = _files(options.input)
    from ..store.identity import describe_model
    from ..store.vector_files import check_output, compare_with_model, import_vectors

    check_output(options.output)  # before a large model is loaded
    masks = {name: getattr(options, name) for name in ("num_query_masks", "num_passage_masks")}
    model = load_model(options, **masks, **lengths_of(options))
    settings = describe_model(model, options.queries, options.dtype, {"content_filter": True})
    fewer = getattr(model.config, "method", None) == "promptreps" or "query_budget_table" in settings.options
    compared = compare_with_model(files, model, settings, options.compare, fewer)
    store = import_vectors(files, options.output, settings, options.shard_size, fewer)
    what = "queries" if options.queries else "passages"
    why = "no texts" if options.compare else "as asked"
    told = f"the first {compared} are what the model gives" if compared else f"not compared with the model ({why})"
    print(f"{options.output}: {len(store)} {what}; {told}")
    return DONE


def _files(given: list[Path]) -> list[Path]:
    """Return the files, those of a folder by name.

    Raises:
        FileNotFoundError: one is not there, or a folder has none.
    """
    found: list[Path] = []
    for place in given:
        files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
        if not files or not files[0].is_file():
            what = "no Parquet file (*.parquet) in it" if place.is_dir() else "no such file"
            raise FileNotFoundError(f"{place}: {what}.")
        found += files
    return found
