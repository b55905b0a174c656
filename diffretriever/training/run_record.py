"""What a run was: its recipe, data and software, kept with its checkpoints and compared when it is resumed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..data.pair_files import PairFiles
from ..model.checked_files import read_json
from ..store.differences import tell_difference
from ..store.identity import describe_model
from ..store.manifest import flat, is_recorded_only
from .adapter_recipe import AdapterRecipe

RUN_FILE = "run.json"
AVERAGE_FILE = "average.json"  # a mean of adapters has it instead
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
# Keys that do not touch the weights: they may change between an interruption and its resumption. Of a teacher its own
# weights are compared, not its name.
FREE_KEYS = frozenset(
    "save_steps keep_checkpoints log_steps eval_steps eval_passages report_to workers teacher".split()
)
# Sections of a record that must be the same when a run is resumed, and how a message begins on them.
COMPARED = {
    "recipe": "",
    "data": "other data: ",
    "initial_adapter": "another --adapter: ",
    "teacher_weights": "another teacher: ",
    "release": "another release: ",
    "backbone": "other files of the backbone: ",
}


def trained_weights(adapter: Path) -> str | None:
    """Return the hash of the backbone's weights that an adapter was trained on (`hash_weights`).

    Args:
        adapter: its folder, in which a training has its run.json and a mean its average.json.

    Returns:
        None where nothing there says it.

    Raises:
        ValueError: a record is no JSON object.
    """
    for name in (RUN_FILE, AVERAGE_FILE):
        release = read_json(adapter / name).get("release") if (adapter / name).is_file() else None
        weights = release.get("weights_sha256") if isinstance(release, dict) else None
        if isinstance(weights, str):
            return weights
    return None


def run_record(recipe: AdapterRecipe, files: PairFiles, model: str, processes: int) -> dict[str, Any]:
    """Describe a run.

    Args:
        recipe: what is done.
        files: the data.
        model: the release that it starts from.
        processes: how many train together.
    """
    report = files.report
    data = [
        {"file": Path(name).name, "sha256": report.fingerprints[name], "queries": count}
        for name, count in zip(files.names, report.counts, strict=True)
    ]
    return {
        "model": Path(model).name if Path(model).is_dir() else model,
        "processes": processes,
        "steps": recipe.total_steps(report.counts),
        "recipe": dataclasses.asdict(recipe),
        "data": data,
        "dropped_negatives": report.dropped_negatives,
        "queries_without_negatives": report.without_negatives,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }


def release_identity(model: Any) -> dict[str, Any]:
    """Describe a release by the content of its files, wherever they lie and whatever they are called.

    Args:
        model: as loaded, before `add_lora`.

    Returns:
        Everything that its queries' vectors depend on, as a store of them would record it.
    """
    settings = flat(dataclasses.asdict(describe_model(model, is_query=True, dtype="float32")))
    return {name: value for name, value in settings.items() if name != "revision" and not is_recorded_only(name)}


def check_same_run(
    kept: tuple[Path, dict[str, Any]] | None, now: dict[str, Any], free: Collection[str] = FREE_KEYS
) -> None:
    """Compare a run with the one that is to be resumed.

    Args:
        kept: the file or folder that is resumed, and its record; None where there is nothing to resume.
        now: this run's, or the sections of it that are known yet.
        free: keys of the recipe that may differ.

    Raises:
        ValueError: another recipe, other data or another model; names the difference and both values.
    """
    where, before = kept or (None, now)
    for section, lead in COMPARED.items():
        if section not in now:
            continue
        old, new = (dict(_leaves(record.get(section), section)) for record in (before, now))
        for name in {**new, **old}:
            key = name.removeprefix("recipe.")
            if old.get(name) != new.get(name) and key not in free and not _is_name(name):
                told = tell_difference(key.removeprefix("release."), old.get(name), new.get(name))
                raise ValueError(
                    f"{where}: this run was started with {lead}{told}. Choose another --output, or remove the folder "
                    "to start anew."
                )


def _is_name(field: str) -> bool:
    """Return whether a field names a data file, whose content alone is compared."""
    return field.startswith("data[") and field.endswith("].file")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the values inside lists and objects by their place, such as "recipe.stages[0].steps".

    >>> dict(_leaves({"a": [{"b": 1}, 2]}, "x"))
    {'x.a[0].b': 1, 'x.a[1]': 2}
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{place}]")
    else:
        yield name, value
