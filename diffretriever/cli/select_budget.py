"""The sub-command `diffretriever select-budget`."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import no_loading_bars
from .arguments import add_command, add_fusion_option, count
from .exit_status import DONE
from .load_model import OURS, add_model_options, check_model, choose_modes, load_model

if TYPE_CHECKING:
    from ..evaluation.small_task import SmallTask

DESCRIPTION = """Sweep (K_q, K_p) on training queries by fused score (paper §4.4).

With --adaptive, K_q alone is swept, at the K_p of the release, which may be trained. A table of K_q by a query's length
and entropy (§6.3) is learned on the training queries, without those of --data, and shown on these beside the fixed K_q.
It is written into the release's config.json whether it beats that or not; the passages' vectors do not depend on it."""


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    what = "sweep (K_q, K_p) on training queries by fused score"
    parser = add_command(commands, "select-budget", what, run_budget, DESCRIPTION)
    add_model_options(parser, "a zero-shot release: Hub id or folder; with --adaptive, any release's folder")
    parser.add_argument("--pairs", type=Path, nargs="+", help="training pairs, JSONL: pairs, or Tevatron's layout")
    parser.add_argument("--data", type=Path, help="a benchmark instead, in BEIR's or MS MARCO's layout")
    parser.add_argument("--split", help='of --data (default: test; "dev" with --adaptive)')
    parser.add_argument(
        "--adaptive",
        action="store_true",
        help="learn K_q by each query's length and entropy on --pairs, show on --data whether it beats the fixed one, "
        "and write it into the release's folder",
    )
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
    method = check_model(options)
    choose_modes(method, list(NAMES.values()))  # before the data is read
    if options.adaptive:
        return _run_adaptive(options, method)
    if (options.pairs is None) == (options.data is None):
        raise ValueError("say what to try the budgets on: --pairs FILES or --data FOLDER, one of them.")
    if options.split and not options.data:
        raise ValueError("--split is of a benchmark (--data); --pairs are taken as they are.")
    if options.data and options.num_queries:
        raise ValueError("--num-queries draws from --pairs; of a benchmark (--data), the whole split is asked.")
    task = _training_task(options) if options.pairs else _benchmark_task(options, "test")
    model = load_model(options)
    found = select_budget(model, _fused_as(model, task, options), sorted(set(options.budgets)))
    write_json(options.output, found)
    choice = found["choice"]
    print(f"nDCG@10 of {found['queries']} queries on {found['passages']} passages")
    print(table(found["grid"]))
    print(f"choice: K_q={choice['num_query_masks']}, K_p={choice['num_passage_masks']} ({choice['fused']:.4f} fused)")
    return DONE


def _run_adaptive(options: argparse.Namespace, method: str) -> int:
    """Learn a table of K_q, show it, and write it into the release."""
    from ..evaluation.budget_table import table_text
    from ..files.durable import write_json
    from ..publishing.adaptive import check_writable, write_table
    from ..training.adaptive_budget import learn_budgets, to_text
    from ..training.budget import table

    if method != OURS or options.adapter or options.revision:
        raise ValueError(
            "--adaptive writes into a DiffRetriever release as it is; leave --method, --adapter and --revision out."
        )
    if options.pairs is None or options.data is None:
        raise ValueError("--adaptive learns on --pairs FILES and shows on --data FOLDER; give both.")
    folder = check_writable(options.model)
    training, dev = _training_task(options), _benchmark_task(options, "dev")
    model = load_model(options)
    model.config.query_budget_table = None  # of an earlier run
    training, dev = (_fused_as(model, task, options) for task in (training, dev))
    found = learn_budgets(model, training, dev, sorted(set(options.budgets)))
    write_json(options.output, found)
    print(f"learned on {found['queries']} training queries, {found['passages']} passages; {found['metric']}:")
    print(table(found["grid"]))
    print(table_text(found["table"]))
    print(to_text(found))
    del model
    with no_loading_bars():  # of the release's copy
        write_table(folder, found["table"], "cpu" if options.device in (None, "auto") else options.device)
    print(
        f"{folder / 'config.json'}: `query_budget_table` is written; a K_q given when the release is loaded "
        "(num_query_masks, --num-query-masks) stands in for it, and the passages' stores stay as they are."
    )
    return DONE


def _fused_as(model: Any, task: SmallTask, options: argparse.Namespace) -> SmallTask:
    """Return the task with the model's own weight of its fusion."""
    from ..model.scoring import fusion_weight_of

    return replace(task, fusion=options.fusion, fusion_weight=fusion_weight_of(model.config, None))


def _training_task(options: argparse.Namespace) -> SmallTask:
    """Draw queries from the training pairs."""
    from ..data.pair_files import PairFiles
    from ..training.budget import training_task

    with tempfile.TemporaryDirectory(prefix="diffretriever-") as scratch:  # where compressed pairs are unpacked
        files = PairFiles(options.pairs, Path(scratch))
        task = training_task(files, options.num_queries or 500, options.num_passages or 5000, options.seed)
        files.close()
    return task


def _benchmark_task(options: argparse.Namespace, split: str) -> SmallTask:
    """Read a benchmark's split, by default this one."""
    from ..evaluation.small_task import read_small_task

    return read_small_task(options.data, options.split or split, options.num_passages)
