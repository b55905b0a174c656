"""The mean of adapters that went on from one, a model soup (Wortsman et al. 2022)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..files.durable import publish_folder, write_json, write_whole
from ..files.hashes import hash_file
from ..model.adapter_loading import (
    ADAPTER_FIELDS,
    CONFIG_FILE,
    RETRIEVER_FIELDS,
    RETRIEVER_FILE,
    WEIGHTS_FILE,
    find_adapter_files,
)
from ..model.checked_files import read_json, read_tensors
from .run_record import AVERAGE_FILE, RUN_FILE, trained_weights

# What a mean takes over from its first adapter: configs and tokenizer, and nothing of a run or its checkpoints.
TAKEN_OVER = (
    CONFIG_FILE, RETRIEVER_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
FILES = (WEIGHTS_FILE, RUN_FILE, AVERAGE_FILE, *TAKEN_OVER)  # of an adapter that are read here
# Fields of an adapter's config that say what its weights compute; the others are of training, or of where it was.
COMPUTING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")
# Of retriever_config.json; lengths may differ.
SETTINGS = [name for name in RETRIEVER_FIELDS if "length" not in name and name != "cut_in_training"]
# Two adapters' factors A point this far the same way where both went on from one, by their cosine; those of different
# beginnings are at right angles to each other.
LEAST_COSINE = 0.5


def average_adapters(folders: Sequence[Path], out: Path) -> float:
    """Write the mean of several adapters' weights, as an adapter with the settings of the first.

    The mean of the products B A of different beginnings is not the product of the means; of adapters that went on
    from one it nearly is.

    Args:
        folders: of adapters as `diffretriever train` writes them, two or more; one that is named twice counts twice.
        out: the folder to make: the mean in float32, settings and tokenizer of the first, and `average.json`, which
            has the SHA-256 of each adapter's weights and of the backbone's, where known.

    Returns:
        The least cosine of two adapters' factors A.

    Raises:
        FileExistsError: `out` is there.
        FileNotFoundError: a folder holds no adapter of DiffRetriever (one of a baseline is none).
        ValueError: the adapters do not fit each other, were trained on other weights, did not go on from one, or hold
            weights that are not finite; names the files.
    """
    if len(folders) < 2:
        raise ValueError(f"a mean needs two adapters or more, got {len(folders)}")
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose another folder")
    files = [find_adapter_files(folder) for folder in folders]
    check_same([config for config, _ in files], COMPUTING, ADAPTER_FIELDS)
    check_same([folder / RETRIEVER_FILE for folder in folders], SETTINGS)
    backbone = common_weights(folders)
    weights = [read_tensors(file) for _, file in files]
    names = [str(file) for _, file in files]
    check_fit(names, weights)
    cosine = least_cosine(names, weights)
    mean = {key: torch.stack([part[key].float() for part in weights]).mean(dim=0) for key in weights[0]}
    record = {"adapters": [hash_file(file) for _, file in files], "least_cosine": cosine}
    if backbone is not None:
        record["release"] = {"weights_sha256": backbone}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".average-") as scratch:
        made = Path(scratch) / out.name
        made.mkdir()
        for name in TAKEN_OVER:
            if (folders[0] / name).is_file():
                shutil.copyfile(folders[0] / name, made / name)
        write_json(made / AVERAGE_FILE, record)
        write_whole(made / WEIGHTS_FILE, [save(mean, metadata={"format": "pt"})])
        publish_folder(made, out)
    return cosine


def check_same(files: Sequence[Path], names: Sequence[str], rules: Mapping[str, tuple[Any, ...]] | None = None) -> None:
    """Raise ValueError for a field that two JSON files, read by `rules`, have different values for; names both."""
    found = [read_json(file, rules) for file in files]
    for name in names:
        for file, fields in zip(files[1:], found[1:], strict=True):
            if (fields.get(name) or None) != (found[0].get(name) or None):  # what is off may be left out
                raise ValueError(
                    f"{file}: {name} is {fields.get(name)!r:.200}, in {files[0]} it is {found[0].get(name)!r:.200}; "
                    "a mean needs adapters of one kind"
                )


def common_weights(folders: Sequence[Path]) -> str | None:
    """Return the hash of the weights that all adapters were trained on, None where none says it.

    Adapters of one seed begin with the same factors A on any backbone, which their cosine does not tell.

    Raises:
        ValueError: two were trained on other weights, as their records say.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if (weights := trained_weights(folder)) is not None:
            found.setdefault(weights, folder)
    if len(found) > 1:
        first, other, *_ = found.values()
        raise ValueError(
            f"{first} and {other} were trained on other weights of the backbone, as their {RUN_FILE} say; a mean needs "
            "adapters of one backbone"
        )
    return next(iter(found), None)


def check_fit(names: Sequence[str], weights: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raise ValueError for weights that not all adapters have in one shape, or that are not finite."""
    for name, part in zip(names, weights, strict=True):
        for key in sorted(part.keys() ^ weights[0].keys()):
            raise ValueError(
                f"{key} is in one of {names[0]} and {name}, not in both; a mean needs adapters of one kind"
            )
        for key, value in part.items():
            if value.shape != weights[0][key].shape:
                expected = list(weights[0][key].shape)
                raise ValueError(f"{name}: {key} has shape {list(value.shape)}, in {names[0]} {expected}")
            if not torch.isfinite(value).all():
                raise ValueError(f"{name}: {key} holds NaN or infinite values")


def least_cosine(names: Sequence[str], weights: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Return the least cosine of two adapters' factors A, all layers' as one vector.

    Raises:
        ValueError: it is below `LEAST_COSINE`.
    """
    factors = [torch.cat([part[key].float().flatten() for key in sorted(part) if "lora_A" in key]) for part in weights]
    least = 1.0
    for (first, one), (second, other) in combinations(zip(names, factors, strict=True), 2):
        cosine = float(torch.cosine_similarity(one, other, dim=0))
        if cosine < LEAST_COSINE:
            raise ValueError(
                f"{first} and {second} did not go on from one adapter (the cosine of their factors A is {cosine:.2f}): "
                "their mean would be neither. Train each with --adapter from the same one"
            )
        least = min(least, cosine)
    return least
