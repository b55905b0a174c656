"""The recipe of `diffretriever pretrain`: one YAML file, every key checked before any work begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.recipe import read_recipe
from ..model.configuration_diffretriever import DIFFUSION_TYPES

STEP_KINDS = ("pairs", "neighbours", "cloze", "denoise")


@dataclass
class Shape:
    """Size of the backbone, in LLaDA's terms for either format."""

    vocab_size: int = 8192
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    mlp_hidden_size: int = 768
    max_sequence_length: int = 1024
    rope_theta: float | None = None  # left open: the format's own
    rms_norm_eps: float | None = None


@dataclass
class Stage:
    """One stage of pretraining."""

    name: str = "joint"
    steps: int = 1000
    pattern: list[str] = field(default_factory=lambda: ["pairs"])  # kinds of step, repeated
    batch_size: int = 48
    max_query: int = 32
    max_passage: int = 96
    budgets: list[int] = field(default_factory=lambda: [1, 4])  # K, in turn
    temperature: float = 0.05
    sparse_weight: float = 1.0
    word_weight: float = 0.1
    token_drop: float = 0.0
    denoise_length: int = 128  # tokens of a text in a denoising step
    denoise_tokens: int = 2048  # padded tokens of a denoising step's batch
    learning_rate: float = 1e-3
    embedding_rate: float = 1.0  # factor on the learning rate of embeddings and head
    final_rate: float = 0.1  # the rate falls to this fraction (cosine)
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0


@dataclass
class PretrainRecipe:
    """Everything `diffretriever pretrain` does, besides the data and the output folder."""

    seed: int = 42
    backbone_type: str = "llada"  # whose original format: llada or dream
    shape: Shape = field(default_factory=Shape)
    stages: list[Stage] = field(default_factory=lambda: [Stage()])
    start_from_statistics: bool = True  # embeddings, head and first layer from token statistics, else random
    tokenizer_characters: int = 2000  # of each text, for training the tokenizer
    tokenizer_every: int = 1  # use every n-th plain text for the tokenizer
    texts_every: int = 1  # use every n-th plain text for denoising and cloze
    neighbours: int = 8  # BM25 neighbours per query, for the steps of that name
    bf16: bool = True
    save_every: int = 200
    log_every: int = 20
    eval_every: int = 0
    eval_passages: int = 5000


def read_pretrain_recipe(path: str | Path, **overrides: Any) -> PretrainRecipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: values that win over the file (None: not given).

    Raises:
        FileNotFoundError: the file is absent.
        ValueError: an unknown key, or a value that cannot be; the message names file and key.
    """
    recipe = read_recipe(path, PretrainRecipe, {key: value for key, value in overrides.items() if value is not None})
    where = str(path)
    if recipe.backbone_type not in DIFFUSION_TYPES:
        known = ", ".join(DIFFUSION_TYPES)
        raise ValueError(f"{where}: unknown backbone_type {recipe.backbone_type!r}; expected one of {known}")
    _check_least(recipe, ("tokenizer_characters", "tokenizer_every", "texts_every", "neighbours", "log_every"), where)
    if recipe.seed < 0:
        raise ValueError(f"{where}: seed must be at least 0, got {recipe.seed}")
    _check_shape(recipe.shape, f"{where}: shape")
    for stage in recipe.stages:
        _check_stage(stage, where)
    return recipe


def _check_least(part: Any, names: Sequence[str], where: str) -> None:
    for name in names:
        if getattr(part, name) < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {getattr(part, name)}")


def _check_stage(stage: Stage, where: str) -> None:
    """Refuse values with which no step can be made."""
    sizes = ("steps", "batch_size", "max_query", "max_passage", "denoise_length", "denoise_tokens")
    _check_least(stage, sizes, where)
    for name in ("temperature", "learning_rate"):
        if getattr(stage, name) <= 0:
            raise ValueError(f"{where}: {name} must be positive, got {getattr(stage, name)}")
    if min(stage.budgets) < 1:
        raise ValueError(f"{where}: budgets must be at least 1, got {stage.budgets}")
    unknown = sorted(set(stage.pattern) - set(STEP_KINDS))
    if unknown:
        raise ValueError(f"{where}: unknown kind of step {unknown[0]!r}; expected one of {', '.join(STEP_KINDS)}")
    alone = sorted(set(stage.pattern) & {"pairs", "cloze"})
    if alone and stage.batch_size < 2:
        raise ValueError(f"{where}: batch_size must be at least 2, or a query of {alone[0]!r} steps has no negative")


def _check_shape(shape: Shape, where: str) -> None:
    """Refuse sizes of which no backbone can be made."""
    for name, value in dataclasses.asdict(shape).items():
        if value is not None and value <= 0:
            raise ValueError(f"{where}: {name} must be positive, got {value}")
    if shape.d_model % (2 * shape.n_heads):
        raise ValueError(
            f"{where}: d_model must be a multiple of twice n_heads, as a head's coordinates turn in pairs; "
            f"got d_model {shape.d_model} and n_heads {shape.n_heads}"
        )
