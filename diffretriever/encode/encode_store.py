"""From a corpus to a store of vectors that no crash can spoil (see `encode_store`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files.claims import living_owners
from ..files.durable import TEMPORARY
from ..model.batching import check_count
from ..store.differences import tell_apart
from ..store.identity import describe_model, differences_of_store
from ..store.manifest import MANIFEST_FILE, STORE_DTYPES, Settings
from ..store.plan import CLAIMS_FOLDER, PLAN_FILE, Plan, survey_texts
from ..store.store import Store
from .encoding_run import EncodingRun
from .job import EncodingJob, read_texts

SHARD_SIZE = 4096  # texts


def tell_user(message: str) -> None:
    """Print a message on stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def encode_store(
    model: Any,
    source: str | Path,
    folder: str | Path,
    is_query: bool = False,
    dtype: str = "float16",
    shard_size: int | None = None,
    tokens_per_batch: int | None = None,
    sparse_top_k: int | None = None,
    content_filter: bool = True,
    keep_texts: bool = True,
    show_progress_bar: bool = False,
    tell: Callable[[str], None] = tell_user,
) -> Store:
    """Encode a corpus or queries into a store; begin, resume, help or check, as the folder needs.

    Several processes of one machine may share a folder: each claims shards until none is left, and all return when the
    store is finished. One that dies costs the shards that it had claimed. Memory is that of about three shards.

    Args:
        model: from `AutoModel.from_pretrained`.
        source: what `read_corpus` or `read_queries` reads.
        folder: of the store; made if it is not there.
        is_query: the side; True reads queries.
        dtype: of the stored vectors: "float16", "bfloat16", "float32" or "int8".
        shard_size: texts a shard; None is the store's own, or 4,096.
        tokens_per_batch: at most so many tokens a batch, padding included; None is the store's own, or 16,384 on an
            accelerator and 1,024 on a CPU. Another than the store's changes its vectors by rounding alone.
        sparse_top_k: T, weights kept a text; None is the config's.
        content_filter: False lets the whole vocabulary into the sparse vectors.
        keep_texts: store the texts beside the vectors.
        show_progress_bar: draw one, in texts.
        tell: takes messages for the user.

    Returns:
        The finished store.

    Raises:
        FileNotFoundError, ValueError: the input is wrong, the corpus has changed, or the folder holds a store with
            other settings; the message names the difference.
        OSError: the disk is full or fails. What is written stays; the same call resumes.
    """
    options: dict[str, Any] = {"content_filter": content_filter, "keep_texts": keep_texts, "sparse_top_k": sparse_top_k}
    options |= {"shard_size": shard_size, "tokens_per_batch": tokens_per_batch}
    check_options(dtype, options)
    folder = Path(folder)
    check_folder(folder)
    plan, surveyed = Plan.read(folder), False
    fill_in(options, plan, model)
    settings = describe_model(model, is_query, dtype, options)
    if plan is None:
        plan, surveyed = _begin(folder, settings, source, is_query)
    check_same(folder, plan.settings, settings)
    job = EncodingJob(model, source, folder, plan, options["tokens_per_batch"], surveyed, tell)
    return EncodingRun(job, show_progress_bar).finish()


def fill_in(options: dict[str, Any], plan: Plan | None, model: Any) -> None:
    """Set the sizes that the caller left open to the store's own, else to defaults."""
    if plan is None and options["sparse_top_k"] and not model.config.sparse_top_k:
        what = type(model).__name__
        raise ValueError(f"sparse_top_k is {options['sparse_top_k']}, but {what} has no sparse vectors; leave it out.")
    # 1,024 and 16,384 are what `encode_texts` takes
    defaults = {"shard_size": SHARD_SIZE, "tokens_per_batch": 1024 if model.device.type == "cpu" else 16384}
    for name, default in defaults.items():
        if options[name] is None:
            options[name] = plan.settings.options[name] if plan else default


def check_options(dtype: str, options: dict[str, Any]) -> None:
    """Refuse a dtype that no store has and sizes that are no numbers."""
    if dtype not in STORE_DTYPES:
        raise ValueError(f"dtype {dtype!r}: a store's is one of {', '.join(STORE_DTYPES)}.")
    for name in ("shard_size", "tokens_per_batch", "sparse_top_k"):
        if options[name] is not None:
            options[name] = check_count(name, options[name])


def check_folder(folder: Path) -> None:
    """Make the folder; refuse one that holds something other than a store."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; the store needs a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    # claims alone are those of a run on Ray that has not written its plan yet, or was killed before
    names = [file.name for file in folder.iterdir() if file.name != CLAIMS_FOLDER]
    others = [name for name in names if not name.startswith(TEMPORARY)]
    known = (PLAN_FILE, MANIFEST_FILE)  # in this order, and asked last: another process may be beginning or ending here
    if others and not any((folder / name).exists() for name in known):
        raise ValueError(
            f"{folder}: holds {sorted(others)[0]!r} but no store; choose a folder that is empty or not there."
        )


def _begin(folder: Path, settings: Settings, source: str | Path, is_query: bool) -> tuple[Plan, bool]:
    """Read the texts once and write a plan; return the plan that then is there, and whether it is of these texts."""
    shard_size = settings.options["shard_size"]
    survey = survey_texts(partial(read_texts, source, is_query), shard_size, str(source))
    Plan(settings, survey, shard_size).write(folder)
    plan = Plan.read(folder)  # another process may have been first
    assert plan is not None
    return plan, plan.survey == survey


def check_same(folder: Path, there: Settings, ours: Settings) -> None:
    """Refuse to go on with a store that was made with other settings; the message names each difference."""
    differences = differences_of_store(there, ours)
    if not differences:
        return
    owners = living_owners(folder / CLAIMS_FOLDER)
    locked = f" It is being written (locked) by {', '.join(owners)}." if owners else ""
    raise ValueError(
        f"{folder}: the store there was {tell_apart(there, ours, differences)}.{locked} Give the model and options "
        "it was made with, or another folder."
    )
