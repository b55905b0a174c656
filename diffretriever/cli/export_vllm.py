"""The sub-command `diffretriever export-vllm`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command, usable_device_or_auto
from .exit_status import DONE
from .load_model import DTYPES, add_length_options, add_mask_options, add_trust_option, lengths_of, load_model

DESCRIPTION = """\
Write a release as a plain Llama or Qwen2 model: the adapter merged into the weights, the tokenizer, and a README.md
that says how vLLM serves its dense vectors without any code of ours."""


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(commands, "export-vllm", "write a release for vLLM to serve", run_export, DESCRIPTION)
    parser.add_argument("model", metavar="RELEASE", help="Hub id or folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--adapter", help="a LoRA adapter, folder or Hub id, in place of the release's own")
    parser.add_argument("--revision", help="of the release on the Hub")
    told = "of the written weights (default: %(default)s, as they are stored)"
    parser.add_argument("--dtype", dest="model_dtype", choices=("auto", *DTYPES), default="auto", help=told)
    parser.add_argument(
        "--device", type=usable_device_or_auto, help="where the adapter is merged (default: as `encode`)"
    )
    add_trust_option(parser)
    add_mask_options(parser)
    add_length_options(parser)


def run_export(options: argparse.Namespace) -> int:
    """Run `diffretriever export-vllm`."""
    from ..serving.plain_model import README, export_plain, start_command

    if options.output.is_dir() and any(options.output.iterdir()):  # before a large model is loaded
        raise FileExistsError(f"{options.output} is there and not empty; choose another folder.")
    masks = {name: getattr(options, name) for name in ("num_query_masks", "num_passage_masks")}
    model = load_model(options, **masks, **lengths_of(options))
    facts = export_plain(model, options.output)
    print(
        f"{options.output}: {facts['dtype']} weights; {README} there says how to ask a server of them. Start one with"
    )
    print(start_command(options.output, facts))
    return DONE
