"""The sub-command `diffretriever select-budget`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import count


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = commands.add_parser("select-budget", help="sweep (K_q, K_p) on training queries by fused score")
    parser.add_argument("--model", required=True, help="a zero-shot release: folder or Hub id")
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="JSONL: pairs, or Tevatron's layout")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write: the grid and the choice")
    parser.add_argument("--queries", type=count, default=500, help="how many to draw (default 500)")
    parser.add_argument("--passages", type=count, default=5000, help="size of the collection (default 5000)")
    parser.add_argument("--budgets", type=count, nargs="+", default=[1, 2, 4, 8, 16], help="values of K_q and K_p")
    parser.add_argument("--seed", type=int, default=42)
    parser.set_defaults(run=run_budget)


def run_budget(options: argparse.Namespace) -> int:
    """Runs `diffretriever select-budget`."""
    from ..files.durable import write_json
    from ..training.budget import select_budget, table

    budgets = sorted(set(options.budgets))
    found = select_budget(
        options.model, options.pairs, options.queries, options.passages, options.seed, budgets, options.out.parent
    )
    write_json(options.out, found)
    choice = found["choice"]
    print(f"nDCG@10 of {found['queries']} training queries on {found['passages']} passages")
    print(table(found["grid"]))
    print(f"choice: K_q={choice['num_query_masks']}, K_p={choice['num_passage_masks']} ({choice['fused']:.4f} fused)")
    return 0
