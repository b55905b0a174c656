"""The sub-command `diffretriever select-budget`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command, count
from .exit_status import DONE
from .load_model import add_model_options, check_release, load_model


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    what = "sweep (K_q, K_p) on training queries by fused score"
    parser = add_command(commands, "select-budget", what, run_budget)
    add_model_options(parser, "a zero-shot release: Hub id or folder")
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="JSONL: pairs, or Tevatron's layout")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write: the grid and the choice")
    parser.add_argument("--queries", type=count, default=500, help="how many to draw (default 500)")
    parser.add_argument("--passages", type=count, default=5000, help="size of the collection (default 5000)")
    parser.add_argument("--budgets", type=count, nargs="+", default=[1, 2, 4, 8, 16], help="values of K_q and K_p")
    parser.add_argument("--seed", type=int, default=42)


def run_budget(options: argparse.Namespace) -> int:
    """Run `diffretriever select-budget`."""
    from ..data.pair_files import PairFiles
    from ..files.durable import write_json
    from ..training.budget import select_budget, table, training_task

    check_release(options.model, options.revision)  # before the data is read
    files = PairFiles(options.pairs, options.out.parent)
    task = training_task(files, options.queries, options.passages, options.seed)
    files.close()
    found = select_budget(load_model(options), task, sorted(set(options.budgets)))
    write_json(options.out, found)
    choice = found["choice"]
    print(f"nDCG@10 of {found['queries']} training queries on {found['passages']} passages")
    print(table(found["grid"]))
    print(f"choice: K_q={choice['num_query_masks']}, K_p={choice['num_passage_masks']} ({choice['fused']:.4f} fused)")
    return DONE
