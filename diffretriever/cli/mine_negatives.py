"""The sub-command `diffretriever mine-negatives`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..search.modes import MODES
from .arguments import add_command, count, count_or_none
from .exit_status import DONE
from .load_model import (
    CHOSEN_AT_THE_START,
    RELEASE,
    add_batch_option,
    add_model_options,
    check_model,
    choose_modes,
    flags_of,
    load_model,
)

if TYPE_CHECKING:
    from ..data.pair_files import PairFiles
    from ..training.hard_negatives import Draws

BM25, DENSE = "bm25", "multi_dense"
OF_A_RELEASE = (*CHOSEN_AT_THE_START, "device", "mode", "store", "tokens_per_batch")  # BM25 would pass them over


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(commands, "mine-negatives", "find hard negatives by BM25 or by a release", run_mine)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="JSONL: pairs, or Tevatron's layout")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write, in the layout of pairs")
    parser.add_argument("--corpus", help="to mine from, in any layout of a corpus (default: the pairs' passages)")
    add_model_options(parser, f'"{BM25}" (default), or {RELEASE}', default=BM25)
    parser.add_argument("--mode", choices=MODES, help=f"a release's scoring mode (default: {DENSE})")
    parser.add_argument("--store", type=Path, help="folder for a release's vectors (default: a temporary one)")
    add_batch_option(parser)
    parser.add_argument("--negatives", type=count, default=15, help="negatives a query (default 15)")
    parser.add_argument("--depth", type=count, default=100, help="draw them from so many best (default 100)")
    parser.add_argument("--skip", type=count_or_none, default=0, help="leave out so many of the best: perhaps answers")
    parser.add_argument("--seed", type=int, default=42)


def run_mine(options: argparse.Namespace) -> int:
    """Run `diffretriever mine-negatives`."""
    from ..data.pair_files import PairFiles
    from ..files.durable import check_place
    from ..training.hard_negatives import Draws

    check_place(options.output)
    draws = Draws(options.negatives, options.depth, options.skip, options.seed)
    if options.model != BM25:
        options.mode = options.mode or DENSE
        choose_modes(check_model(options), [options.mode])  # before the data is read
    elif wrong := flags_of({name: getattr(options, name) for name in OF_A_RELEASE}):
        raise ValueError(f"BM25 has no {', '.join(wrong)}; say which release with --model, or leave that out.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.output.parent, prefix=".mine-") as scratch:  # for compressed pairs
        counts = _mine(PairFiles(options.pairs, Path(scratch)), draws, options)
    print(
        f"{options.output}: {counts['queries']} queries, {counts['negatives']} negatives; "
        f"{counts['queries_without_negatives']} queries have none"
    )
    return DONE


def _mine(files: PairFiles, draws: Draws, options: argparse.Namespace) -> Mapping[str, int]:
    """Write the pairs with negatives; return what is counted of them."""
    from ..evaluation.evaluate import encoded_corpus
    from ..training.hard_negatives import mine_negatives, passages_of, rank_by_bm25, rank_by_release

    files.refuse_ids_of_two_files()
    with nullcontext(options.corpus) if options.corpus else passages_of(files) as corpus:
        if options.model == BM25:
            counts = mine_negatives(files, rank_by_bm25(corpus), options.output, draws)
        else:
            model = load_model(options)
            batch = options.tokens_per_batch
            with encoded_corpus(model, corpus, options.store, progress=True, tokens_per_batch=batch) as store:
                counts = mine_negatives(files, rank_by_release(model, store, options.mode), options.output, draws)
    files.close()
    return counts
