"""The sub-commands `diffretriever pretrain` and `diffretriever train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    """Adds the sub-commands to the parser's `add_subparsers` object."""
    _pretrain(commands)
    _train(commands)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file; see diffretriever/training/recipes")
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="JSONL files of {query, positive} lines")
    parser.add_argument("--out", type=Path, required=True, help="output folder; run again to resume")
    parser.add_argument("--dev", type=Path, help="BEIR-style folder; its dev split is evaluated along the way")
    parser.add_argument("--seed", type=int, help="replaces the recipe's")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")


def _pretrain(commands: Any) -> None:
    parser = commands.add_parser("pretrain", help="train a small LLaDA-format backbone from random weights")
    _shared(parser)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="JSONL files of {text} lines")
    parser.set_defaults(run=run_pretrain)


def _train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a LoRA adapter for retrieval on a frozen backbone")
    _shared(parser)
    parser.add_argument("--model", required=True, help="a release without an adapter (publish.py build): folder or id")
    parser.add_argument("--base", help="the backbone's name to record in adapter_config.json")
    parser.add_argument("--cache", type=Path, help="folder for mined hard negatives, to share between runs")
    parser.set_defaults(run=run_train)


def run_pretrain(options: argparse.Namespace) -> int:
    """Runs `diffretriever pretrain`."""
    from .pretrain import pretrain
    from .recipe import PretrainRecipe, read_recipe

    recipe = read_recipe(options.recipe, PretrainRecipe, {"seed": options.seed})
    pretrain(recipe, options.pairs, options.texts, options.out, options.dev, options.threads)
    return 0


def run_train(options: argparse.Namespace) -> int:
    """Runs `diffretriever train`."""
    from .adapter import train_adapter
    from .recipe import AdapterRecipe, read_recipe

    recipe = read_recipe(options.recipe, AdapterRecipe, {"seed": options.seed})
    train_adapter(
        recipe, options.model, options.pairs, options.out, options.dev, options.threads, options.cache, options.base
    )
    return 0
