"""The sub-command `diffretriever pretrain`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import RESUMED, add_command, add_recipe_option, count, find_recipe
from .exit_status import DONE
from .threads import choose_threads


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    what = "train a small backbone in LLaDA's or Dream's format from scratch"
    parser = add_command(commands, "pretrain", what, run_pretrain, again=RESUMED)
    add_recipe_option(parser, "pretraining")
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="JSONL files of {query, positive} lines")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="JSONL files of {text} lines")
    parser.add_argument("--output", type=Path, required=True, help="output folder; run again to resume")
    parser.add_argument("--dev", type=Path, help="BEIR-style folder; its dev split is evaluated along the way")
    parser.add_argument("--seed", type=int, help="replaces the recipe's")
    parser.add_argument("--threads", type=count, help="CPU threads (default: by the backbone's width; it is said)")


def run_pretrain(options: argparse.Namespace) -> int:
    """Run `diffretriever pretrain`."""
    from ..pretraining.pretrain import pretrain
    from ..pretraining.recipe import read_pretrain_recipe

    recipe = read_pretrain_recipe(find_recipe(options.recipe, "pretraining"), seed=options.seed)
    choose_threads(options.threads, recipe.shape.d_model)
    pretrain(recipe, options.pairs, options.texts, options.output, options.dev)
    return DONE
