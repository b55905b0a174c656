"""The one way in which commands find and load a model, of whichever method, on the device that their process uses."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..files.lines import read_object
from ..progress import no_loading_bars
from ..publishing.hub import find_folder
from ..search.modes import MODES, SPARSE
from .arguments import count, seconds, usable_device_or_auto

if TYPE_CHECKING:
    from ..store.manifest import Settings

RELEASE = "a release: Hub id or folder; with --method, a backbone"
WHERE = 'for example cuda:1; "auto" spreads the model over all (default: the first GPU, else the CPU)'
DTYPES = ("float32", "bfloat16", "float16")
OURS = "diffretriever"
CHOSEN_AT_THE_START = ("method", "adapter", "revision", "model_dtype", "trust_remote_code")  # of a server
BASELINES = ("promptreps", "repllama", "diffembed")  # as in `baselines.METHODS`, whose import takes seconds


def add_model_options(parser: Any, what: str = RELEASE, where: str = WHERE, **more: Any) -> None:
    """Add the options that say which model, and where and how it runs.

    Args:
        parser: a parser, or a group of one.
        what: the help of --model.
        where: the help of --device.
        more: for --model's `add_argument`; without, it is required.
    """
    parser.add_argument("--model", help=what, **(more or {"required": True}))
    add_method_option(parser)
    parser.add_argument("--adapter", help="a LoRA adapter of the method, folder or Hub id, in place of the model's own")
    parser.add_argument("--revision", help="of the release on the Hub")
    parser.add_argument(
        "--model-dtype",
        choices=DTYPES,
        help="to run the model in (default: bfloat16 on a GPU and a CPU with AMX or AVX512_BF16, else float32)",
    )
    parser.add_argument("--device", type=usable_device_or_auto, help=where)
    add_trust_option(parser)


def add_server_options(parser: Any) -> None:
    """Add the options that say which server encodes in the place of a model in this process."""
    parser.add_argument(
        "--server",
        metavar="URL",
        help="a vLLM server of an exported release, which encodes in the place of --model (docs/vllm.md); a key that "
        "it asks for is read from the environment variable VLLM_API_KEY",
    )
    told = "how long to go on asking a server that is away (default: %(default)s)"
    parser.add_argument("--retry-for", type=seconds, default=60.0, metavar="SECONDS", help=told)


def add_method_option(parser: Any) -> None:
    """Add --method."""
    told = f"what reads the model (default: what its folder or adapter says, else {OURS})"
    parser.add_argument("--method", choices=(OURS, *BASELINES), help=told)


def add_mask_options(parser: Any) -> None:
    """Add the options that say how many vectors a text has."""
    parser.add_argument("--num-query-masks", type=int, help="K_q (default: the model's)")
    parser.add_argument("--num-passage-masks", type=int, help="K_p (default: the model's)")


def add_length_options(parser: Any) -> None:
    """Add the options that say where texts are cut."""
    parser.add_argument("--max-length", type=int, help="tokens of prompt and text (default: the release's)")
    for side in ("query", "passage"):
        parser.add_argument(f"--{side}-length", type=int, help=f"tokens of a {side}'s text alone, instead")


def add_batch_option(parser: Any) -> None:
    """Add --tokens-per-batch."""
    told = "tokens that are encoded at once, padding included (default: 1024 on a CPU, else 16384)"
    parser.add_argument("--tokens-per-batch", type=count, help=told)


def lengths_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of `add_length_options` say, for `load_model`."""
    return {name: getattr(options, name) for name in ("max_length", "query_length", "passage_length")}


def add_trust_option(parser: Any) -> None:
    """Add --trust-remote-code; without it, the installed code alone runs."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that a release brings, where it is another"
    )


def load_model(options: argparse.Namespace, compile: bool = False, **settings: Any) -> Any:
    """Load a command's model.

    Args:
        options: with the options of `add_model_options`. Without --device, the model goes to this process's GPU
            (accelerate and torchrun number their processes), else to the CPU. Without --trust-remote-code, a release
            that brings other code than the installed is refused.
        compile: have torch.compile write code for its layers, for many texts.
        settings: more for `from_pretrained`, budgets and lengths under DiffRetriever's names; those that are None were
            not given.

    Returns:
        A DiffRetriever or a baseline, in eval mode.

    Raises:
        FileNotFoundError, ValueError: as `check_model`, or as the model's `from_pretrained` and `optimize_for`.
        Passing: the Hub does not answer.
    """
    method = check_model(options)
    if compile and method != OURS:
        raise ValueError(f"--compile is for DiffRetriever's releases; leave it out for {method}.")
    import torch

    device = options.device or "cpu"
    if options.device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    given = {"revision": options.revision, "dtype": options.model_dtype, **settings}
    given["adapter_name_or_path"] = options.adapter
    given = {name: value for name, value in given.items() if value is not None} | {"device_map": device}
    if method in BASELINES:
        from ..baselines import load_baseline
        from ..baselines.configuration import own_names

        with no_loading_bars():
            return load_baseline(options.model, method, **own_names(method, given))
    from transformers import AutoModel

    with no_loading_bars():
        model = AutoModel.from_pretrained(options.model, trust_remote_code=options.trust_remote_code, **given)
    if compile:
        model.optimize_for("throughput")
    return model


def ready_for_questions(model: Any) -> Any:
    """Return a model whose single texts are one launch each, where that can be: a DiffRetriever, whole on one GPU."""
    if hasattr(model, "optimize_for") and model.device.type == "cuda":
        with suppress(ValueError):  # spread over several, or quantised
            model.optimize_for("latency", compiled=False)  # which is ready in a second
    return model


def load_encoder(options: argparse.Namespace, **settings: Any) -> Any:
    """Load a command's model, or find the one that --server runs.

    Args:
        options: with the options of `add_model_options` and `add_server_options`.
        settings: as for `load_model`.

    Returns:
        A DiffRetriever, a baseline or a ServedModel.

    Raises:
        ValueError: neither or both are given, or an option that belongs to the other.
        EngineError, EngineAwayError: as `ServedModel`.
    """
    if options.server is None:
        if options.model is None:
            raise ValueError("say who encodes: --model RELEASE, or --server URL.")
        return load_model(options, **settings)
    given = {name: getattr(options, name) for name in ("model", *CHOSEN_AT_THE_START)} | settings
    if wrong := flags_of(given):
        raise ValueError(f"--server runs a model as it was exported and started; leave out {', '.join(wrong)}.")
    from ..serving.client import TextClient
    from ..serving.served_model import ServedModel

    return ServedModel(TextClient(options.server, options.retry_for))


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """Return the options that were given, as they are typed.

    >>> flags_of({"model_dtype": "float32", "adapter": None, "trust_remote_code": False, "fusion_weight": 0.0})
    ['--model-dtype', '--fusion-weight']
    """
    return [f"--{name.replace('_', '-')}" for name, value in values.items() if value is not None and value is not False]


def check_model(options: argparse.Namespace) -> str:
    """Refuse what is no model of the method that is asked for, before anything of it is loaded or run.

    Args:
        options: with --model, --adapter and --revision, and --method where the command has that; else it is ours.

    Returns:
        The method.

    Raises:
        FileNotFoundError: no such folder, nor on the Hub.
        ValueError: a model or adapter of another method, or neither; the message says what to do.
        Passing: the Hub does not answer.
    """
    from ..baselines.configuration import CONFIG_FILE, read_config

    asked, places = getattr(options, "method", OURS), [(options.model, options.revision), (options.adapter, None)]
    for place, revision in places:
        if place is None:
            continue
        file = find_folder(place, ["config.json", "adapter_config.json", CONFIG_FILE], revision) / CONFIG_FILE
        if file.is_file():
            said = read_config(file.parent).method
            if asked not in (None, said):
                raise ValueError(f"{file} is of method {said!r}, not {asked!r}.")
            asked = said
    if asked in (None, OURS):
        check_release(options.model, options.revision, has_method="method" in options)
    return asked or OURS


def check_encoder(model: Any, settings: Settings, place: str) -> None:
    """Refuse a model that is to encode queries and did not encode the passages.

    Args:
        model: what was loaded.
        settings: what the passages were encoded with.
        place: where they are, for messages.

    Raises:
        ValueError: it is another; the message says in what.
    """
    from ..store.identity import check_searchable, describe_model

    check_searchable(settings, describe_model(model, is_query=True, dtype=settings.dtype), place)


def choose_modes(method: str, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the scoring modes to use: those asked for, or all that the method has.

    Raises:
        ValueError: one is asked for that it has not.
    """
    from ..baselines.configuration import SPARSE_METHODS

    own = MODES if method in (OURS, *SPARSE_METHODS) else tuple(mode for mode in MODES if mode not in SPARSE)
    for mode in asked or ():
        if mode in MODES and mode not in own:
            raise ValueError(f"{method} has no sparse vectors for mode {mode!r}; its modes are {' and '.join(own)}.")
    return tuple(dict.fromkeys(asked or own))


def check_release(release: str, revision: str | None = None, has_method: bool = False) -> None:
    """Refuse what is no release, before anything of it is loaded or run.

    Args:
        release: a folder or Hub id.
        revision: of the latter.
        has_method: whether the command takes --method, which reads backbones.

    Raises:
        FileNotFoundError: no such folder, nor on the Hub.
        ValueError: a backbone, an adapter or another model; the message says how to make a release of it.
        Passing: the Hub does not answer.
    """
    from ..model.adapter_loading import CONFIG_FILE
    from ..model.backbone_loading import NAME_PATTERNS
    from ..model.checked_files import check_fields

    folder = find_folder(release, ["config.json", CONFIG_FILE], revision)
    if not (folder / "config.json").is_file():
        if (folder / CONFIG_FILE).is_file():
            advice = _build_command(f"BACKBONE --adapter {shlex.quote(release)}")
            raise ValueError(f"{release} is an adapter, not a release; {advice}")
        raise ValueError(f"{release} is no release, as it holds no config.json; {_build_command('BACKBONE')}")
    fields = read_object(folder / "config.json")
    found = fields.get("model_type")
    if str(found).lower() in NAME_PATTERNS:
        other = f" Or read it by another method: --method {', '.join(BASELINES)}." if has_method else ""
        raise ValueError(f"{release} is a backbone, not a release; {_build_command(shlex.quote(release))}{other}")
    if found != "diffretriever":
        raise ValueError(f'{release} is no release: its config.json has model_type {found!r}, not "diffretriever".')
    # transformers takes this apart before any code of ours sees the file
    check_fields(f"{folder / 'config.json'}: ", fields, {"auto_map": ("object", ("text",), None)})


def _build_command(base: str) -> str:
    return f"build one with `publish.py build --base {base} --output DIR` (or `diffretriever publish build`)."
