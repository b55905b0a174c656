"""The sub-commands around training: `mine-negatives`, `select-budget`, `evaluate-mean-pooling`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    """Adds the sub-commands to the parser's `add_subparsers` object."""
    _mine(commands)
    _budget(commands)
    _mean(commands)


def _count(text: str, least: int = 1) -> int:
    """An argument that is a whole number of at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def _skipped(text: str) -> int:
    """An argument that is a whole number, 0 included."""
    return _count(text, least=0)


def _mine(commands: Any) -> None:
    parser = commands.add_parser("mine-negatives", help="find hard negatives by BM25 or by a release")
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="JSONL: pairs, or Tevatron's layout")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write, in the layout of pairs")
    parser.add_argument("--corpus", type=Path, help="JSONL of {title, text} to mine from (default: the pairs')")
    parser.add_argument("--model", default="bm25", help='"bm25" (default), or a release: folder or Hub id')
    parser.add_argument("--mode", default="multi_dense", choices=("multi_dense", "single_dense", "sparse_max"))
    parser.add_argument("--negatives", type=_count, default=15, help="negatives a query (default 15)")
    parser.add_argument("--depth", type=_count, default=100, help="draw them from so many best (default 100)")
    parser.add_argument("--skip", type=_skipped, default=0, help="leave out the best so many: perhaps unmarked answers")
    parser.add_argument("--seed", type=int, default=42)
    parser.set_defaults(run=run_mine)


def _budget(commands: Any) -> None:
    parser = commands.add_parser("select-budget", help="sweep (K_q, K_p) on training queries by fused score")
    parser.add_argument("--model", required=True, help="a zero-shot release: folder or Hub id")
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="JSONL: pairs, or Tevatron's layout")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write: the grid and the choice")
    parser.add_argument("--queries", type=_count, default=500, help="how many to draw (default 500)")
    parser.add_argument("--passages", type=_count, default=5000, help="size of the collection (default 5000)")
    parser.add_argument("--budgets", type=_count, nargs="+", default=[1, 2, 4, 8, 16], help="values of K_q and K_p")
    parser.add_argument("--seed", type=int, default=42)
    parser.set_defaults(run=run_budget)


def _mean(commands: Any) -> None:
    parser = commands.add_parser("evaluate-mean-pooling", help="nDCG@10 of the mean-pooled baseline (DiffEmbed)")
    parser.add_argument("--model", required=True, help="the zero-shot release that it was trained from")
    parser.add_argument("--adapter", help="output of `train` with pooling: mean; without it, zero-shot")
    parser.add_argument("--data", type=Path, required=True, help="BEIR-style folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--passages", type=_count, help="only so many passages, the judged ones among them")
    parser.add_argument("--max-length", type=_count, help="as in training (default: what the adapter records)")
    parser.add_argument("--json", type=Path, help="write the figure to this file, too")
    parser.add_argument("--run", dest="run_file", type=Path, help="write the ranking as a TREC run file")
    parser.set_defaults(run=run_mean)


def run_mine(options: argparse.Namespace) -> int:
    """Runs `diffretriever mine-negatives`."""
    from .hard_negatives import collect_passages, load_ranker, mine_negatives
    from .pair_files import PairFiles

    files = PairFiles(options.pairs, options.out.parent)
    passages = collect_passages(files, options.corpus)
    ranker = load_ranker(options.model, passages, options.mode)
    counts = mine_negatives(
        files, passages, ranker, options.out, options.negatives, options.depth, options.skip, options.seed
    )
    files.close()
    print(
        f"{options.out}: {counts['queries']} queries, {counts['negatives']} negatives from {len(passages)} passages; "
        f"{counts['queries_without_negatives']} queries have none"
    )
    return 0


def run_budget(options: argparse.Namespace) -> int:
    """Runs `diffretriever select-budget`."""
    from .adapter_output import write_json
    from .budget import select_budget, table

    budgets = sorted(set(options.budgets))
    found = select_budget(
        options.model, options.pairs, options.queries, options.passages, options.seed, budgets, options.out.parent
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, found)
    choice = found["choice"]
    print(f"nDCG@10 of {found['queries']} training queries on {found['passages']} passages")
    print(table(found["grid"]))
    print(f"choice: K_q={choice['num_query_masks']}, K_p={choice['num_passage_masks']} ({choice['fused']:.4f} fused)")
    return 0


def run_mean(options: argparse.Namespace) -> int:
    """Runs `diffretriever evaluate-mean-pooling`."""
    from .mean_evaluation import evaluate_mean_pooling

    figures = evaluate_mean_pooling(
        options.model, options.adapter, options.data, options.split, options.passages, options.max_length,
        options.run_file,
    )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"dense nDCG@10 {figures['ndcg@10']:.4f} ({figures['queries']} queries, {figures['passages']} passages)")
    return 0
