"""The sub-command `diffretriever select-budget`."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_command, add_fusion_option, count
from .exit_status import DONE
from .load_model import add_model_options, check_model, choose_modes, load_model

if TYPE_CHECKING:
    from ..evaluation.small_task import SmallTask


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    what = "sweep (K_q, K_p) on training queries by fused score"
    parser = add_command(commands, "select-budget", what, run_budget)
    add_model_options(parser, "a zero-shot release: Hub id or folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", type=Path, nargs="+", help="training pairs, JSONL: pairs, or Tevatron's layout")
    source.add_argument("--data", type=Path, help="a benchmark instead, in BEIR's or MS MARCO's layout")
    parser.add_argument("--split", default="test", help="of --data (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON to write: the grid, each query's scores, the choice"
    )
    parser.add_argument("--num-queries", type=count, help="how many of the pairs' to draw (default 500)")
    parser.add_argument("--num-passages", type=count, help="size of the collection (default: 5000; all of --data)")
    parser.add_argument("--budgets", type=count, nargs="+", default=[1, 2, 4, 8, 16], help="values of K_q and K_p")
    parser.add_argument("--seed", type=int, default=42)
    add_fusion_option(parser)


def run_budget(options: argparse.Namespace) -> int:
    """Run `diffretriever select-budget`."""
    from ..evaluation.small_task import NAMES
    from ..files.durable import check_place, write_json
    from ..training.budget import select_budget, table

    check_place(options.output)
    choose_modes(check_model(options), list(NAMES.values()))  # before the data is read
    task = replace(_task(options), fusion=options.fusion)
    found = select_budget(load_model(options), task, sorted(set(options.budgets)))
    write_json(options.output, found)
    choice = found["choice"]
    print(f"nDCG@10 of {found['queries']} queries on {found['passages']} passages")
    print(table(found["grid"]))
    print(f"choice: K_q={choice['num_query_masks']}, K_p={choice['num_passage_masks']} ({choice['fused']:.4f} fused)")
    return DONE


def _task(options: argparse.Namespace) -> SmallTask:
    """Read what the budgets are tried on.

    Raises:
        ValueError: --num-queries with a benchmark, whose split is the choice of its queries.
    """
    from ..data.pair_files import PairFiles
    from ..evaluation.small_task import read_small_task
    from ..training.budget import training_task

    if options.data:
        if options.num_queries:
            raise ValueError("--num-queries draws from --pairs; of a benchmark (--data), the whole split is asked.")
        return read_small_task(options.data, options.split, options.num_passages)
    with tempfile.TemporaryDirectory(prefix="diffretriever-") as scratch:  # where compressed pairs are unpacked
        files = PairFiles(options.pairs, Path(scratch))
        task = training_task(files, options.num_queries or 500, options.num_passages or 5000, options.seed)
        files.close()
    return task
