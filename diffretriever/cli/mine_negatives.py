"""The sub-command `diffretriever mine-negatives`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command, count, count_or_none
from .exit_status import DONE
from .load_model import RELEASE, add_model_options, check_release, load_model

BM25 = "bm25"


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(commands, "mine-negatives", "find hard negatives by BM25 or by a release", run_mine)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="JSONL: pairs, or Tevatron's layout")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write, in the layout of pairs")
    parser.add_argument("--corpus", type=Path, help="JSONL of {title, text} to mine from (default: the pairs')")
    add_model_options(parser, f'"{BM25}" (default), or {RELEASE}', default=BM25)
    parser.add_argument("--mode", default="multi_dense", choices=("multi_dense", "single_dense", "sparse_max"))
    parser.add_argument("--negatives", type=count, default=15, help="negatives a query (default 15)")
    parser.add_argument("--depth", type=count, default=100, help="draw them from so many best (default 100)")
    parser.add_argument("--skip", type=count_or_none, default=0, help="leave out so many of the best: perhaps answers")
    parser.add_argument("--seed", type=int, default=42)


def run_mine(options: argparse.Namespace) -> int:
    """Run `diffretriever mine-negatives`."""
    from ..data.pair_files import PairFiles
    from ..training.hard_negatives import Bm25Ranker, Ranker, ReleaseRanker, collect_passages, mine_negatives

    if options.model != BM25:
        check_release(options.model, options.revision)  # before the data is read
    files = PairFiles(options.pairs, options.out.parent)
    passages = collect_passages(files, options.corpus)
    ranker: Ranker
    if options.model == BM25:
        ranker = Bm25Ranker(passages)
    else:
        ranker = ReleaseRanker(load_model(options), passages, options.mode)
    counts = mine_negatives(
        files, passages, ranker, options.out, options.negatives, options.depth, options.skip, options.seed
    )
    files.close()
    print(
        f"{options.out}: {counts['queries']} queries, {counts['negatives']} negatives from {len(passages)} passages; "
        f"{counts['queries_without_negatives']} queries have none"
    )
    return DONE
