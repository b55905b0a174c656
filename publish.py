"""Build releases: folders that `AutoModel.from_pretrained(..., trust_remote_code=True)` loads, here or on the Hub.

python publish.py build --base ID_OR_DIR [--adapter ID_OR_DIR] --out DIR [--name NAME]
python publish.py build RELEASE_NAME --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backbone_loading as backbones
from adapter_loading import CONFIG_FILE, RETRIEVER_FILE, WEIGHTS_FILE, Adapter
from bidirectional_layers import linear_shapes, parameter_shapes
from configuration_diffretriever import DiffRetrieverConfig, paper_prompt
from tokenization_helpers import RetrievalTokenizer, read_retriever_config

SOURCE = Path(__file__).resolve().parent
CODE_FILES = (
    "adapter_loading.py",
    "backbone_loading.py",
    "batching.py",
    "bidirectional_layers.py",
    "configuration_diffretriever.py",
    "modeling_diffretriever.py",
    "scoring.py",
    "sparse_head.py",
    "tokenization_helpers.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_diffretriever.DiffRetrieverConfig",
    "AutoModel": "modeling_diffretriever.DiffRetriever",
}
SETTINGS_FILES = ["*.json", "*.jinja", "merges.txt"]  # of a backbone on the Hub, its weights are not needed to build


@dataclass(frozen=True)
class Release:
    """A release that this repository knows.

    Args:
        base: the backbone's Hub id, or a folder of this source tree.
        adapter: where its adapter is: a Hub id, or a folder of this source tree.
        num_query_masks, num_passage_masks: K_q and K_p.
        max_length: tokens of prompt and text.
    """

    base: str
    adapter: str
    num_query_masks: int
    num_passage_masks: int
    max_length: int = 156


LLADA, DREAM = "GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B"
RELEASES = {
    "diffretriever-llada-8b-single": Release(LLADA, "ielabgroup/diffretriever-llada-8b-single", 1, 1),
    "diffretriever-llada-8b-multi-q4-p4": Release(LLADA, "ielabgroup/diffretriever-llada-8b-multi-q4-p4", 4, 4),
    "diffretriever-dream-7b-single": Release(DREAM, "ielabgroup/diffretriever-dream-7b-single", 1, 1),
    "diffretriever-dream-7b-multi-q4-p16": Release(DREAM, "ielabgroup/diffretriever-dream-7b-multi-q4-p16", 4, 16),
    "diffretriever-llada-tiny-single": Release(
        "checkpoints/llada-tiny", "checkpoints/diffretriever-llada-tiny-single/adapter", 1, 1, 152
    ),
    "diffretriever-llada-tiny-multi-q4-p4": Release(
        "checkpoints/llada-tiny", "checkpoints/diffretriever-llada-tiny-multi-q4-p4/adapter", 4, 4, 152
    ),
}


def build(
    base: str,
    out: Path,
    adapter: str | None = None,
    name: str | None = None,
    link_code: bool = False,
    force: bool = False,
    **settings: Any,
) -> DiffRetrieverConfig:
    """Build a release folder; it appears whole or not at all.

    Args:
        base: the backbone, a Hub id or folder in LLaDA's or Dream's own format.
        out: the folder to make.
        adapter: a training run's output folder or Hub id; None builds the zero-shot model.
        name: the release's name; None takes the folder's.
        link_code: link to this source tree's code instead of copying it, for releases kept inside the tree.
        force: replace a folder that is there already.
        settings: config fields (num_query_masks, num_passage_masks, max_length); with an adapter they must agree with
            what its retriever_config.json recorded.

    Returns:
        The config that was written.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: with the file, key or argument that is wrong.
    """
    base_path = Path(base).expanduser()
    local = base_path.is_dir()
    name = name or out.name
    for what, value in (("--name", name), ("--out", out.name)):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", value):
            raise ValueError(
                f"{what}: {value!r} may hold only letters, digits, - and _ (a dot breaks transformers 4.54)."
            )
    if out.exists() and not force:
        raise FileExistsError(f"--out: {out} is there already; choose another folder, or pass --force to replace it.")
    if out.exists():
        _check_replaceable(out, base_path)
    base_folder = backbones.resolve_folder(base, None, None, {}, SETTINGS_FILES)
    adapter_folder = None
    if adapter is not None:
        adapter_folder = backbones.resolve_folder(adapter, None, None, {}, ["*.json", "*.safetensors", "*.jinja"])
    config, tokenizer = _configure(base_folder, adapter_folder, settings)
    config.base_model_name_or_path = _path_from(base_folder, out) if local else base
    config.base_model_revision = None if local else base_folder.name  # the Hub cache names snapshots by commit
    config.release_name, config.auto_map, config.architectures = name, AUTO_MAP, ["DiffRetriever"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".build-") as scratch:
        made = Path(scratch) / out.name
        made.mkdir()
        _fill(made, config, tokenizer, adapter_folder, out if link_code else None)
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    return config


def _check_replaceable(out: Path, base: Path) -> None:
    """Refuse to delete what is no release, or holds the backbone."""
    config = out / "config.json"
    if out.is_symlink() or not config.is_file() or backbones.read_json(config).get("model_type") != "diffretriever":
        raise FileExistsError(f"--out: {out} is no release folder, so --force does not replace it; remove it yourself.")
    if out.resolve() in (base.resolve(), *base.resolve().parents):
        raise FileExistsError(f"--out: {out} holds the backbone {base}, which --force would delete.")


def _path_from(base_folder: Path, out: Path) -> str:
    """Name a local backbone: relative where it lies beside the release, so that both can move; else absolute."""
    out = out.resolve()
    return f"../{base_folder.name}" if base_folder.parent == out.parent else str(base_folder)


def _configure(
    base_folder: Path, adapter_folder: Path | None, settings: dict[str, Any]
) -> tuple[DiffRetrieverConfig, Any]:
    """Check that backbone, adapter, tokenizer and settings fit, and return the config and tokenizer."""
    backbone_type, backbone_config = backbones.read_backbone_config(base_folder)
    shapes = parameter_shapes(backbone_type, backbone_config)
    if list(base_folder.glob("*.safetensors")):
        backbones.audit_weights(base_folder, backbone_type, shapes)
    places = [base_folder] if adapter_folder is None else [adapter_folder, base_folder]
    tokenizer = backbones.load_tokenizer(places)
    fields = dict(settings)
    if adapter_folder is not None:
        Adapter(
            adapter_folder,
            linear_shapes(shapes),
            lambda name: backbones.our_name(backbone_type, name),
            lambda name: backbones.original_name(backbone_type, name),
        )
        fields = _with_recorded(adapter_folder, tokenizer, settings, backbone_type)
    config = DiffRetrieverConfig(
        backbone_type=backbone_type,
        adapter_name_or_path=None if adapter_folder is None else "adapter",
        **{name: value for name, value in fields.items() if name != "backbone_type"},
    )
    if adapter_folder is not None:  # trained with these words; the zero-shot model's follow its budgets
        config.query_prompt, config.passage_prompt = config.prompt(True), config.prompt(False)
    RetrievalTokenizer(tokenizer, config)  # refuses what could not be encoded later
    return config, tokenizer


def _with_recorded(
    adapter_folder: Path, tokenizer: Any, settings: dict[str, Any], backbone_type: str
) -> dict[str, Any]:
    """Return the settings that the adapter was trained with, refusing others."""
    file = adapter_folder / RETRIEVER_FILE
    if not file.is_file():
        missing = {"num_query_masks", "num_passage_masks", "max_length"} - settings.keys()
        if missing:
            flags = ", ".join("--" + name.replace("_", "-") for name in sorted(missing))
            raise FileNotFoundError(f"{file} is not there, so the adapter's budgets are unknown; pass {flags}.")
        return settings
    recorded = read_retriever_config(file, tokenizer)
    for name, value in {**settings, "backbone_type": backbone_type}.items():
        if recorded[name] != value:
            raise ValueError(f"{file} says {name} = {recorded[name]!r}, but {value!r} was asked for.")
    return recorded


def _fill(
    made: Path, config: DiffRetrieverConfig, tokenizer: Any, adapter_folder: Path | None, link_from: Path | None
) -> None:
    for file in CODE_FILES:
        if link_from is None:
            shutil.copyfile(SOURCE / file, made / file)
        else:
            (made / file).symlink_to(os.path.relpath(SOURCE / file, link_from.resolve()))
    backbones.save_tokenizer(tokenizer, made)
    write_config(config, made / "config.json")
    if adapter_folder is not None:
        (made / "adapter").mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE, RETRIEVER_FILE):
            if (adapter_folder / file).is_file():
                shutil.copyfile(adapter_folder / file, made / "adapter" / file)


def write_config(config: DiffRetrieverConfig, file: Path) -> None:
    """Write a release's config.json: its own fields only, the same on every transformers."""
    fields = config.to_dict()
    own = ("architectures", "auto_map", "model_type", "release_name", *_OWN_FIELDS)
    kept = {name: fields[name] for name in own if fields.get(name) is not None or name == "base_model_revision"}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_OWN_FIELDS = (
    "backbone_type",
    "base_model_name_or_path",
    "base_model_revision",
    "adapter_name_or_path",
    "num_query_masks",
    "num_passage_masks",
    "num_denoise_steps",
    "max_length",
    "normalize",
    "query_prompt",
    "passage_prompt",
    "sparse_top_k",
)


def default_config() -> DiffRetrieverConfig:
    """Return the config of the default release, as the config.json at the top of the source tree has it."""
    name = "diffretriever-llada-8b-single"
    release = RELEASES[name]
    config = DiffRetrieverConfig(
        backbone_type="llada",
        base_model_name_or_path=release.base,
        adapter_name_or_path="adapter",
        num_query_masks=release.num_query_masks,
        num_passage_masks=release.num_passage_masks,
        max_length=release.max_length,
        query_prompt=paper_prompt("query", release.num_query_masks),
        passage_prompt=paper_prompt("passage", release.num_passage_masks),
    )
    config.release_name, config.auto_map, config.architectures = name, AUTO_MAP, ["DiffRetriever"]
    return config


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="publish.py", description="Build DiffRetriever releases.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="make a release folder")
    command.add_argument("release", nargs="?", help=f"a known release: {', '.join(RELEASES)}")
    command.add_argument("--base", help="backbone: Hub id or folder in LLaDA's or Dream's own format")
    command.add_argument("--adapter", help="training output: folder or Hub id; without it, the zero-shot model")
    command.add_argument("--out", type=Path, required=True, help="the folder to make")
    command.add_argument("--name", help="the release's name (default: the folder's)")
    command.add_argument("--num-query-masks", type=int, help="K_q, where the adapter does not record it")
    command.add_argument("--num-passage-masks", type=int, help="K_p, where the adapter does not record it")
    command.add_argument(
        "--max-length", type=int, help="tokens of prompt and text, where the adapter does not record it"
    )
    command.add_argument("--link-code", action="store_true", help="link to this source tree's code, do not copy it")
    command.add_argument("--force", action="store_true", help="replace the folder if it is there")
    options = parser.parse_args(arguments)
    if (options.release is None) == (options.base is None):
        parser.error("give either a known release or --base")
    if options.release is not None and (options.release not in RELEASES or options.adapter is not None):
        parser.error(f"{options.release!r} with these options is no known release; known: {', '.join(RELEASES)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parse(arguments)
    names = ("num_query_masks", "num_passage_masks", "max_length")
    settings = {name: value for name in names if (value := getattr(options, name)) is not None}
    base, adapter, name = options.base, options.adapter, options.name
    if options.release is not None:
        release = RELEASES[options.release]
        here = [
            str(SOURCE / place) if place.startswith("checkpoints/") else place
            for place in (release.base, release.adapter)
        ]
        base, adapter, name = here[0], here[1], name or options.release
        settings = {field: getattr(release, field) for field in names} | settings
    try:
        config = build(base, options.out, adapter, name, options.link_code, options.force, **settings)
    except (OSError, ValueError) as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 1
    budgets = f"K_q={config.num_query_masks}, K_p={config.num_passage_masks}, max_length={config.max_length}"
    print(f"{options.out}: {config.release_name} on {config.base_model_name_or_path} ({budgets})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
