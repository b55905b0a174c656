"""Write a table of K_q into a release (`diffretriever select-budget --adaptive`); nothing else of it changes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..files.durable import publish_folder, write_json, write_text
from ..files.hashes import hash_file
from ..files.lines import read_object
from ..model.configuration_diffretriever import DiffRetrieverConfig
from . import card, probe, record

FIELD = "query_budget_table"


def check_writable(name: str) -> Path:
    """Return the folder of a release that a table may be written into, before hours go into learning one.

    Args:
        name: of the release.

    Raises:
        FileNotFoundError: no such folder; a release on the Hub has none of its own.
        ValueError: the Hub's cache, or a release with files that are no longer as they were built: what is written
            would vouch for them.
        PermissionError: the folder could not be replaced.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--adaptive writes into a release's folder, but {name} is none; download it first.")
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        raise ValueError(f"{folder} lies in the Hub's cache; copy the release, and give --adaptive the copy.")
    recorded = (folder / record.RECORD_FILE).is_file()
    if recorded and (changes := record.changes_since(record.read_record(folder), folder)):
        raise ValueError(f"{folder} is not as it was built: {'; '.join(changes[:3])}.")
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder.parent} must be writable, for the release to be replaced whole.")
    return folder


def write_table(folder: Path, table: dict[str, Any], device: str = "cpu") -> None:
    """Put a table into a release's config.json; card and release.json, where there are any, follow.

    The release is copied beside itself, its large files by links, and replaced in one step.

    Args:
        folder: from `check_writable`.
        table: as `DiffRetrieverConfig.query_budget_table`.
        device: where the fixed texts of release.json's fingerprint are encoded.

    Raises:
        ValueError: as `check_writable`, or no table.
        OSError: the release could not be written; it is as it was.
    """
    check_writable(str(folder))
    fields = read_object(folder / "config.json")
    before, after = (_config(values) for values in (fields, {**fields, FIELD: table}))
    made_by = record.read_record(folder) if (folder / record.RECORD_FILE).is_file() else None
    if made_by is not None and (recorded := made_by["fingerprint"]) is not None:
        model = probe.load(str(folder), recorded["dtype"], device, **{FIELD: table})
        made_by["fingerprint"] = probe.fingerprint(model, recorded["dtype"])
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".budget-") as scratch:
        made = Path(scratch) / folder.name
        shutil.copytree(folder, made, symlinks=True, copy_function=_link_or_copy)
        write_json(made / "config.json", {**fields, FIELD: table})
        if made_by is not None:
            text = (made / record.CARD_FILE).read_text(encoding="utf-8")
            write_text(made / record.CARD_FILE, card.with_adaptive_budgets(text, made_by["repo_id"], before, after))
            for name in ("config.json", record.CARD_FILE):
                made_by["files"][name] = hash_file(made / name)
            record.write_record(made_by, made)
        publish_folder(made, folder)


def _config(fields: dict[str, Any]) -> DiffRetrieverConfig:
    """Return a config.json's fields as the model reads them."""
    config: DiffRetrieverConfig = DiffRetrieverConfig.from_dict(dict(fields))
    return config


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a filesystem without links
        shutil.copy2(source, target)
