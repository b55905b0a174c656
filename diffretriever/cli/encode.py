"""The sub-command `diffretriever encode`."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from ..store.manifest import STORE_DTYPES
from .arguments import add_command, count
from .exit_status import DONE
from .load_model import (
    add_batch_option,
    add_length_options,
    add_mask_options,
    add_model_options,
    add_server_options,
    lengths_of,
    load_encoder,
    load_model,
)

ATTENTIONS = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
)  # as in `model.bidirectional_layers`, which imports torch
ENGINES = ("processes", "ray")
DESCRIPTION = """Encode a corpus or queries into a store of vectors.

Interrupted in any way, the same command resumes: finished shards are kept, and the result is the same to the byte.
Given the same command, several processes of one machine share the work:
accelerate launch -m diffretriever encode …
On several machines, Ray shares it out: --engine ray."""


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(
        commands, "encode", "encode a corpus or queries into a store of vectors", run_encode, DESCRIPTION
    )
    add_model_options(parser, default=None)
    add_server_options(parser)
    parser.add_argument("--input", required=True, help="BEIR folder, .jsonl, .tsv, .parquet, or hf:NAME[:SPLIT]")
    parser.add_argument("--output", required=True, type=Path, help="the store's folder")
    parser.add_argument("--queries", action="store_true", help="the input is queries, not passages")
    parser.add_argument("--dtype", choices=STORE_DTYPES, default="float16", help="of the stored vectors")
    add_mask_options(parser)
    add_length_options(parser)
    parser.add_argument("--sparse-top-k", type=count, help="sparse weights kept a text (default: the release's)")
    parser.add_argument("--no-content-filter", action="store_true", help="let the whole vocabulary weigh")
    parser.add_argument("--no-texts", action="store_true", help="store no texts")
    parser.add_argument("--shard-size", type=count, help="texts a shard (default: 4096); what a crash can cost")
    add_batch_option(parser)
    told = "have torch.compile write code for the model's layers first: faster where a corpus takes long, on a GPU"
    parser.add_argument("--compile", action="store_true", help=told)
    parser.add_argument("--attn-implementation", choices=ATTENTIONS, help="default: sdpa")
    parser.add_argument(
        "--engine", choices=ENGINES, default=ENGINES[0], help="what shares it out (default: %(default)s)"
    )
    parser.add_argument("--address", help="of the Ray cluster (default: RAY_ADDRESS, one running here, else a new one)")
    parser.add_argument("--actors", type=count, help="processes of Ray's with a model (default: one a GPU, or CPU)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run_encode(options: argparse.Namespace) -> int:
    """Run `diffretriever encode`."""
    options.again = f"Finished shards are kept in {options.output}. Run the same command again to go on."
    _encode(options)
    return DONE


def _encode(options: argparse.Namespace) -> None:
    from ..data.corpus import source_files
    from ..encode.encode_store import encode_store

    settings = {"attn_implementation": options.attn_implementation, **_own_masks(options), **lengths_of(options)}
    settings["compile"] = options.compile
    settings |= {"device": options.device} if options.server else {}  # which is the server's, too
    if not options.input.startswith("hf:"):
        source_files(options.input, "queries" if options.queries else "corpus")  # before a large model is loaded
    given = {
        "is_query": options.queries,
        "dtype": options.dtype,
        "shard_size": options.shard_size,
        "tokens_per_batch": options.tokens_per_batch,
        "sparse_top_k": options.sparse_top_k,
        "content_filter": not options.no_content_filter,
        "keep_texts": not options.no_texts,
        "show_progress_bar": not options.quiet and os.environ.get("LOCAL_RANK", "0") == "0",
    }
    if options.engine == "ray":
        from ..encode.ray_engine import encode_on_ray

        if options.server or not options.model:
            raise ValueError("--engine ray has a model in each of its processes: give --model, and no --server.")
        load = partial(load_model, _for_other_machines(options), **settings)
        given |= {"address": options.address, "actors": options.actors}
        store = encode_on_ray(load, options.input, options.output, options.model, **given)
    elif options.address or options.actors:
        raise ValueError("--address and --actors go with --engine ray.")
    else:
        store = encode_store(load_encoder(options, **settings), options.input, options.output, **given)
    print(f"{options.output}: {len(store)} texts in {len(store.manifest.shards)} shards")


def _for_other_machines(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options of `load_model`, with folders named from the root."""
    names = ("model", "method", "adapter", "revision", "model_dtype", "device", "trust_remote_code")
    found = {name: getattr(options, name) for name in names}
    for name in ("model", "adapter"):
        if found[name] is not None and Path(found[name]).exists():
            found[name] = str(Path(found[name]).absolute())
    return argparse.Namespace(**found)


def _own_masks(options: argparse.Namespace) -> dict[str, int | None]:
    """Return the number of masks of the side that is encoded, as a setting of `from_pretrained`.

    Raises:
        ValueError: the other side's is given alone.
    """
    own, other = "num_passage_masks", "num_query_masks"
    if options.queries:
        own, other = other, own
    if getattr(options, own) is None and getattr(options, other) is not None:
        side = "queries" if options.queries else "passages, as --queries is not given"
        told = f"--{own}, not --{other}".replace("_", "-")
        raise ValueError(f"the input is {side}: say {told}.")
    return {own: getattr(options, own)}
