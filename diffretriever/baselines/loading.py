"""Loads a baseline: settings, backbone, adapter and tokenizer, from folders or the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..model.adapter_loading import RETRIEVER_FILE
from ..model.backbone_loading import BACKBONE_FILES, load_tokenizer, one_at_a_time, resolve_folder
from ..model.configuration_diffretriever import LoadedFrom
from .baseline import Baseline
from .causal import DIFFUSION, load_causal, model_type
from .configuration import BUDGETS, CAPS, CONFIG_FILE, FIELDS, LENGTHS, METHODS, BaselineConfig, read_config
from .diffembed import DiffEmbed
from .diffusion import load_diffusion
from .promptreps import PromptReps
from .repllama import RepLLaMA

CLASSES: dict[str, type[Baseline]] = {"promptreps": PromptReps, "repllama": RepLLaMA, "diffembed": DiffEmbed}
FILES = [*BACKBONE_FILES, "adapter/*"]
HUB_OPTIONS = ("cache_dir", "token", "local_files_only", "force_download")
MODEL_OPTIONS = "dtype torch_dtype device_map max_memory offload_folder attn_implementation quantization_config".split()
TRAINED = (*CAPS, "query_length", "passage_length", "query_prompt", "passage_prompt", "append_end_of_text", "normalize")


@one_at_a_time
def load_baseline(
    folder_or_id: str | Path, method: str | None = None, revision: str | None = None, **options: Any
) -> Baseline:
    """Load a baseline from a folder or Hub repository that says what it is, or zero-shot from a backbone.

    Args:
        folder_or_id: holds a baseline.json; or is a backbone, and then `method` must be given.
        method: "promptreps", "repllama" or "diffembed"; None reads it.
        revision: commit, tag or branch of `folder_or_id` on the Hub.
        options: any field of `BaselineConfig`; what transformers' `from_pretrained` takes of dtype, device_map,
            max_memory, offload_folder, attn_implementation, quantization_config; cache_dir, token, local_files_only,
            force_download. An adapter that is given here brings the settings of its own baseline.json, save those
            that are given, too.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError, OSError: a folder, file or Hub repository is not there.
        ValueError: a setting that the method cannot have, a backbone or adapter that is another method's, more vectors
            than the adapter was trained with, broken files; the message names file, field or key.
        TypeError: an unknown option.
    """
    hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    kwargs = {name: options.pop(name) for name in MODEL_OPTIONS if name in options}
    unknown = sorted(options.keys() - set(FIELDS))
    if unknown:
        raise TypeError(f"load_baseline() takes no option {unknown[0]!r}.")
    name = os.fspath(folder_or_id)
    folder = resolve_folder(name, None, revision, hub, FILES)
    config = _read_settings(name, folder, method, revision, options)
    base = folder
    if config.base_model_name_or_path != name:
        beside = None if "base_model_name_or_path" in options else folder
        base = resolve_folder(config.base_model_name_or_path, beside, config.base_model_revision, hub, BACKBONE_FILES)
    adapter = None
    if config.adapter_name_or_path is not None:
        beside = None if "adapter_name_or_path" in options else folder
        adapter = resolve_folder(config.adapter_name_or_path, beside, None, hub, BACKBONE_FILES)
        config = _take_settings(config, adapter, options)
    backbone = _load_backbone(config, base, adapter, kwargs)
    tokenizer = getattr(backbone, "tokenizer", None) or load_tokenizer([folder, base])
    model = CLASSES[config.method](config, backbone, tokenizer)
    config.name_or_path = name
    known = {given: name for name, given in BUDGETS.items()}
    config.overrides = tuple(known.get(option, option) for option in options if option in (*CAPS, *LENGTHS))
    made_from = getattr(backbone, "loaded_from", None)  # a DiffRetriever's, whose release may name a backbone
    weights = base if made_from is None else made_from.weights
    adapted = adapter if made_from is None else made_from.adapter
    model.loaded_from = LoadedFrom(folder, weights, adapted, Path(tokenizer.name_or_path))
    return model


def _read_settings(
    name: str, folder: Path, method: str | None, revision: str | None, options: Mapping[str, Any]
) -> BaselineConfig:
    """Return the settings of a folder with a baseline.json, or the method's own for a backbone, with the caller's."""
    if not (folder / CONFIG_FILE).is_file():
        if method is None:
            raise ValueError(
                f"{folder} holds no {CONFIG_FILE}; say which `method` to use it for: {', '.join(METHODS)}."
            )
        own = {"base_model_name_or_path": name, "base_model_revision": revision}
        return BaselineConfig(method, **{**own, **options})
    said = read_config(folder)
    if method not in (None, said.method):
        raise ValueError(f"{folder / CONFIG_FILE} is of method {said.method!r}, not {method!r}.")
    config = replace(said, **options)
    if said.adapter_name_or_path is not None and "adapter_name_or_path" not in options:
        _check_caps(config, said, folder)
    return config


def _take_settings(config: BaselineConfig, adapter: Path, options: Mapping[str, Any]) -> BaselineConfig:
    """Check what an adapter's folder says of its training; one that the caller chose brings those settings along."""
    if (adapter / RETRIEVER_FILE).is_file():
        raise ValueError(f"{adapter} is the adapter of a DiffRetriever ({RETRIEVER_FILE}), not of {config.method}.")
    if not (adapter / CONFIG_FILE).is_file():
        return config
    trained = read_config(adapter)
    if trained.method != config.method:
        raise ValueError(
            f"{adapter / CONFIG_FILE}: the adapter is of method {trained.method!r}, not {config.method!r}."
        )
    if "adapter_name_or_path" in options:
        config = replace(config, **{name: getattr(trained, name) for name in TRAINED if name not in options})
    _check_caps(config, trained, adapter)
    return config


def _check_caps(config: BaselineConfig, trained: BaselineConfig, folder: Path) -> None:
    """Refuse more vectors than the adapter was trained to give, as `folder` says."""
    for name in CAPS:
        asked, most = getattr(config, name), getattr(trained, name)
        if asked > most:
            raise ValueError(
                f"`{name}` is {asked}, but {folder / CONFIG_FILE} says that its adapter was trained with at most "
                f"{most}."
            )


def _load_backbone(config: BaselineConfig, base: Path, adapter: Path | None, kwargs: dict[str, Any]) -> Any:
    """Return a causal language model, or for DiffEmbed on a diffusion backbone a DiffRetriever."""
    kind = model_type(base)
    if config.method != "diffembed" or kind not in DIFFUSION:
        return load_causal(base, CLASSES[config.method].__name__, adapter, config.merge_adapter, **kwargs)
    return load_diffusion(base, kind, adapter, config.merge_adapter, **kwargs)
