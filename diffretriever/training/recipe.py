"""Training recipes: YAML files read into dataclasses, every key checked before any work begins."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

Recipe = TypeVar("Recipe")
BACKBONE_TYPES = ("llada", "dream")
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


def read_recipe(path: str | Path, kind: type[Recipe], overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file.
        kind: the recipe's class, for example `PretrainRecipe`.
        overrides: values that replace those of the file (None: not given).

    Raises:
        FileNotFoundError: if the file is absent.
        ValueError: on a key the recipe does not have, or a value of another type; names the file and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; expected a YAML file")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if isinstance(given, dict):
        given.update({key: value for key, value in (overrides or {}).items() if value is not None})
    recipe = _build(kind, given, str(path))
    _check(recipe, str(path))
    return recipe


def _build(kind: type[Recipe], given: Any, where: str) -> Recipe:
    """Fills a dataclass from a dict, recursively."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected keys and values, got {type(given).__name__}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(given.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; the recipe has {', '.join(sorted(hints))}")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in given.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks one value against its type; whole numbers and strings like 1e-3 pass as floats."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where)
    if isinstance(hint, types.UnionType):
        return None if value is None else _convert(typing.get_args(hint)[0], value, where)
    if typing.get_origin(hint) is list:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where} must be a list with at least one entry, got {value!r}")
        return [_convert(typing.get_args(hint)[0], each, f"{where}[{n}]") for n, each in enumerate(value)]
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{where} must be a number, got {value!r}") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value


def _check(recipe: Any, where: str) -> None:
    """Refuses values that cannot work."""
    named = getattr(recipe, "backbone_type", BACKBONE_TYPES[0])
    if named not in BACKBONE_TYPES:
        raise ValueError(f"{where}: unknown backbone_type {named!r}; expected one of {', '.join(BACKBONE_TYPES)}")
    parts = [recipe, *getattr(recipe, "stages", [])]
    for part in parts:
        for name in ("steps", "batch_size", "num_query_masks", "num_passage_masks", "rank", "max_passage", "max_query"):
            if hasattr(part, name) and getattr(part, name) < 1:
                raise ValueError(f"{where}: {name} must be at least 1, got {getattr(part, name)}")
        for name in ("temperature", "learning_rate"):
            if hasattr(part, name) and getattr(part, name) <= 0:
                raise ValueError(f"{where}: {name} must be positive, got {getattr(part, name)}")
    if hasattr(recipe, "shape"):
        _check_shape(recipe.shape, f"{where}: shape")
    for stage in getattr(recipe, "stages", []):
        unknown = sorted(set(stage.pattern) - set(STEP_KINDS))
        if unknown:
            raise ValueError(f"{where}: unknown kind of step {unknown[0]!r}; expected one of {', '.join(STEP_KINDS)}")


def _check_shape(shape: Shape, where: str) -> None:
    """Refuses sizes of which no backbone can be made."""
    for name, value in dataclasses.asdict(shape).items():
        if value is not None and value <= 0:
            raise ValueError(f"{where}: {name} must be positive, got {value}")
    if shape.d_model % (2 * shape.n_heads):
        raise ValueError(
            f"{where}: d_model must be a multiple of twice n_heads, as a head's coordinates turn in pairs; "
            f"got d_model {shape.d_model} and n_heads {shape.n_heads}"
        )
