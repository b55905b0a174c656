"""The sub-command `diffretriever evaluate-mean-pooling`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import count


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = commands.add_parser("evaluate-mean-pooling", help="nDCG@10 of the mean-pooled baseline (DiffEmbed)")
    parser.add_argument("--model", required=True, help="the zero-shot release that it was trained from")
    parser.add_argument("--adapter", help="output of `train` with pooling: mean; without it, zero-shot")
    parser.add_argument("--data", type=Path, required=True, help="BEIR-style folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--passages", type=count, help="only so many passages, the judged ones among them")
    parser.add_argument("--max-length", type=count, help="as in training (default: what the adapter records)")
    parser.add_argument("--json", type=Path, help="write the figure to this file, too")
    parser.add_argument("--run", dest="run_file", type=Path, help="write the ranking as a TREC run file")
    parser.set_defaults(run=run_mean)


def run_mean(options: argparse.Namespace) -> int:
    """Runs `diffretriever evaluate-mean-pooling`."""
    from ..files.durable import write_json
    from ..training.mean_evaluation import evaluate_mean_pooling

    figures = evaluate_mean_pooling(
        options.model, options.adapter, options.data, options.split, options.passages, options.max_length,
        options.run_file,
    )  # fmt: skip
    if options.json:
        write_json(options.json, figures)
    print(f"dense nDCG@10 {figures['ndcg@10']:.4f} ({figures['queries']} queries, {figures['passages']} passages)")
    return 0
