"""The sub-command `diffretriever evaluate-mean-pooling`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command, count
from .exit_status import DONE
from .load_model import add_model_options, check_release, load_model


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    what = "nDCG@10 of the mean-pooled baseline (DiffEmbed)"
    parser = add_command(commands, "evaluate-mean-pooling", what, run_mean)
    add_model_options(parser, "the zero-shot release that it was trained from: Hub id or folder")
    parser.add_argument("--data", type=Path, required=True, help="BEIR-style folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--passages", type=count, help="only so many passages, the judged ones among them")
    parser.add_argument("--max-length", type=count, help="as in training (default: what the adapter records)")
    parser.add_argument("--json", type=Path, help="write the figure to this file, too")
    parser.add_argument("--run", dest="run_file", type=Path, help="write the ranking as a TREC run file")


def run_mean(options: argparse.Namespace) -> int:
    """Run `diffretriever evaluate-mean-pooling`."""
    from ..evaluation.small_task import read_small_task
    from ..files.durable import write_json
    from ..training.mean_evaluation import evaluate_mean_pooling, recorded_lengths

    lengths = recorded_lengths(Path(options.adapter)) if options.adapter else {}
    if options.max_length:
        lengths = {"max_length": options.max_length}
    check_release(options.model, options.revision)  # before the data is read
    task = read_small_task(options.data, options.split, options.passages)
    model = load_model(options, **lengths)
    figures = evaluate_mean_pooling(model, task, options.run_file)
    if options.json:
        write_json(options.json, figures)
    print(f"dense nDCG@10 {figures['ndcg@10']:.4f} ({figures['queries']} queries, {figures['passages']} passages)")
    return DONE
