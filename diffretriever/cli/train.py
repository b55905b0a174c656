"""The sub-command `diffretriever train`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..publishing.hub import find_folder
from .arguments import RESUMED, add_command, add_recipe_option, count, find_recipe
from .exit_status import DONE
from .load_model import add_method_option, add_trust_option, check_model, load_model
from .threads import choose_threads


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    what = "train a LoRA adapter for retrieval on a frozen backbone"
    parser = add_command(commands, "train", what, run_train, again=RESUMED)
    add_recipe_option(parser, "training")
    parser.add_argument("--model", required=True, help="a release without an adapter; with --method, a backbone")
    add_method_option(parser)
    told = "an adapter to go on from, or a release that holds one: folder or Hub id (default: a new adapter)"
    parser.add_argument("--adapter", help=told)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="JSONL: pairs, or Tevatron's layout")
    parser.add_argument("--output", type=Path, required=True, help="output folder; run again to resume")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces one of the recipe's")
    parser.add_argument("--dev", type=Path, help="BEIR-style folder; its dev split is evaluated along the way")
    parser.add_argument("--base", help="the backbone's name to record in adapter_config.json")
    parser.add_argument("--seed", type=int, help="replaces the recipe's")
    parser.add_argument("--threads", type=count, help="CPU threads (default: by the backbone's width; it is said)")
    add_trust_option(parser)
    parser.set_defaults(revision=None, model_dtype=None, device=None)  # the recipe's, and the launcher's


def run_train(options: argparse.Namespace) -> int:
    """Run `diffretriever train`; return 128 + the signal's number where one stopped it."""
    from ..training.adapter_recipe import read_adapter_recipe
    from ..training.lora import read_initial_adapter
    from ..training.train import Interrupted, train_adapter

    changes = {"method": options.method, "seed": options.seed}
    recipe = read_adapter_recipe(find_recipe(options.recipe, "training"), options.set, **changes)
    options.method = recipe.method
    check_model(options)
    try:
        train_adapter(
            recipe,
            options.model,
            partial(_load, options),
            options.pairs,
            options.output,
            options.dev,
            options.base,
            None if options.adapter is None else read_initial_adapter(find_adapter(options.adapter), recipe),
        )
    except Interrupted as stop:
        print(f"diffretriever train: {stop}", file=sys.stderr)
        return 128 + stop.signal
    return DONE


def find_adapter(name: str, files: Sequence[str] = ()) -> Path:
    """Return the folder of an adapter, or of the one within a release; of the Hub's with these files, too."""
    from ..model.adapter_loading import CONFIG_FILE, WEIGHTS_FILE

    files = [CONFIG_FILE, WEIGHTS_FILE, *files]
    folder = find_folder(name, [*files, *(f"adapter/{file}" for file in files)])
    within = folder / "adapter"
    return within if within.is_dir() and not (folder / CONFIG_FILE).is_file() else folder


def _load(options: argparse.Namespace, **settings: Any) -> Any:
    """Load what is trained, without an adapter, and choose its CPU threads, which a GPU leaves idle."""
    model = load_model(argparse.Namespace(**vars(options) | {"adapter": None}), **settings)
    if options.threads or model.device.type == "cpu":
        choose_threads(options.threads, model.config.hidden_size)
    return model
