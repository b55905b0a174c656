"""The sub-command `diffretriever analyze-budget`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command, count
from .exit_status import DONE

DESCRIPTION = """What each query would gain from a budget of its own, by the scores that select-budget keeps (§6.3).

Prints the fixed budget beside three oracles (the best K_q, the best K_p, both, by each query's own judgements), and how
each query's best K_q goes with its length and entropy. The queries of several files are pooled. With --learn, a table
of K_q by length and entropy is learned on other queries and tried on these."""


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    what = "what a budget for each query would gain"
    parser = add_command(commands, "analyze-budget", what, run_analysis, DESCRIPTION)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSON of `diffretriever select-budget`"
    )
    parser.add_argument("--num-query-masks", type=count, help="K_q of all queries (default: the first file's choice)")
    parser.add_argument("--num-passage-masks", type=count, help="K_p (default: the first file's choice)")
    parser.add_argument("--learn", type=Path, metavar="FILE", help="a sweep of training queries to learn a table of")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same figures, to be written")


def run_analysis(options: argparse.Namespace) -> int:
    """Run `diffretriever analyze-budget`."""
    from ..evaluation.budget_analysis import analyze, pool, read_sweep, to_text
    from ..evaluation.budget_table import learn_table, try_table
    from ..files.durable import write_json

    sweep = pool([read_sweep(path) for path in options.input])
    given = options.num_query_masks, options.num_passage_masks
    fixed = given[0] or sweep.choice[0], given[1] or sweep.choice[1]
    found = analyze(sweep, fixed)
    if options.learn:
        training = read_sweep(options.learn)
        pool([sweep, training])  # refuses other budgets
        for mode, row in found["modes"].items():
            row["table"] = try_table(learn_table(training, mode, fixed), sweep, mode, fixed)
    if options.json:
        write_json(options.json, found)
    print(f"fixed: K_q={found['num_query_masks']}, K_p={found['num_passage_masks']}; {to_text(found)}")
    return DONE
