"""What a run was: its recipe, data and software, kept beside the adapter and compared when it is resumed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from ..data.pair_files import PairFiles
from ..files.durable import write_json
from ..files.lines import read_object
from .adapter_recipe import AdapterRecipe

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
# Keys that do not touch the weights: they may change between an interruption and its resumption.
FREE_KEYS = frozenset("save_steps keep_checkpoints log_steps eval_steps eval_passages report_to workers".split())


def run_record(recipe: AdapterRecipe, files: PairFiles, model: str, base: str, processes: int) -> dict[str, Any]:
    """Describe a run.

    Args:
        recipe: what is done.
        files: the data.
        model: the release that it starts from.
        base: the backbone's name.
        processes: how many train together.
    """
    report = files.report
    data = [
        {"file": Path(name).name, "sha256": report.fingerprints[name], "queries": count}
        for name, count in zip(files.names, report.counts, strict=True)
    ]
    return {
        "model": Path(model).name if Path(model).is_dir() else model,
        "base": base,
        "processes": processes,
        "steps": recipe.total_steps(len(files)),
        "recipe": dataclasses.asdict(recipe),
        "data": data,
        "dropped_negatives": report.dropped_negatives,
        "queries_without_negatives": report.without_negatives,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }


def check_resumable(folder: Path, record: dict[str, Any]) -> None:
    """Compare a run with the one that `folder` was made by, or write the record if there is none.

    Args:
        folder: the run's state.
        record: from `run_record`.

    Raises:
        ValueError: another recipe, other data or another model; names the difference and both values.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        write_json(file, record)
        return
    before = read_object(file)
    advice = "Choose another --out, or remove the folder to start anew."
    for key, value in record["recipe"].items():
        old = before["recipe"].get(key)
        if key not in FREE_KEYS and old != value:
            raise ValueError(f"{file}: this run was started with {key} = {old!r}, now it is {value!r}. {advice}")
    for key, what in (("data", "other data"), ("model", "another model"), ("base", "another base name")):
        if before[key] != record[key]:
            raise ValueError(f"{file}: this run was started with {what} ({before[key]}, now {record[key]}). {advice}")
