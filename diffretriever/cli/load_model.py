"""The one way in which commands find and load a model, on the device that their process should use."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..files.lines import read_object
from ..publishing.hub import find_folder

RELEASE = "a release: Hub id or folder"
WHERE = 'for example cuda:1; "auto" spreads the model over all (default: the first GPU, else the CPU)'
DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(parser: Any, what: str = RELEASE, where: str = WHERE, **more: Any) -> None:
    """Add the options that say which model, and where and how it runs.

    Args:
        parser: a parser, or a group of one.
        what: the help of --model.
        where: the help of --device.
        more: for --model's `add_argument`; without, it is required.
    """
    parser.add_argument("--model", help=what, **(more or {"required": True}))
    parser.add_argument("--revision", help="of the release on the Hub")
    parser.add_argument(
        "--model-dtype", choices=DTYPES, help="to run the model in (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    parser.add_argument("--device", help=where)


def load_model(options: argparse.Namespace, **settings: Any) -> Any:
    """Load a command's model through `AutoModel`.

    Args:
        options: with the options of `add_model_options`. Without --device, the model goes to this process's GPU
            (accelerate and torchrun number their processes), else to the CPU.
        settings: more for `from_pretrained`; those that are None were not given.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError, ValueError: no such model, no release, or as the model's `from_pretrained`.
        Passing: the Hub does not answer.
    """
    check_release(options.model, options.revision)
    import torch
    from transformers import AutoModel

    device = options.device or "cpu"
    if options.device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    given = {"revision": options.revision, "dtype": options.model_dtype, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    return AutoModel.from_pretrained(options.model, trust_remote_code=True, device_map=device, **given)


def check_release(release: str, revision: str | None = None) -> None:
    """Refuse what is no release, before anything of it is loaded or run.

    Args:
        release: a folder or Hub id.
        revision: of the latter.

    Raises:
        FileNotFoundError: no such folder, nor on the Hub.
        ValueError: a backbone, an adapter or another model; the message says how to make a release of it.
        Passing: the Hub does not answer.
    """
    from ..model.adapter_loading import CONFIG_FILE
    from ..model.backbone_loading import NAME_PATTERNS

    folder = find_folder(release, ["config.json", CONFIG_FILE], revision)
    if not (folder / "config.json").is_file():
        if (folder / CONFIG_FILE).is_file():
            advice = _build_command(f"BACKBONE --adapter {release}")
            raise ValueError(f"{release} is an adapter, not a release; {advice}")
        raise ValueError(f"{release} is no release, as it holds no config.json; {_build_command('BACKBONE')}")
    found = read_object(folder / "config.json").get("model_type")
    if str(found).lower() in NAME_PATTERNS:
        raise ValueError(f"{release} is a backbone, not a release; {_build_command(release)}")
    if found != "diffretriever":
        raise ValueError(f'{release} is no release: its config.json has model_type {found!r}, not "diffretriever".')


def _build_command(base: str) -> str:
    return f"build one with `publish.py build --base {base} --out DIR` (or `diffretriever publish build`)."
