"""The recipe of `diffretriever train`: one YAML file, every key checked before any model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..baselines import configuration
from ..files.recipe import read_recipe
from ..model.configuration_diffretriever import check_prompt

METHODS = ("diffretriever", *configuration.METHODS)
LENGTHS = ("query_length", "passage_length", "max_length")
PROMPTS = ("query_prompt", "passage_prompt")
DTYPES = ("float32", "bfloat16")
REPORTS = ("none", "tensorboard", "wandb")


@dataclass
class AdapterRecipe:
    """Everything `diffretriever train` does, besides data, base model and output folder.

    The defaults are the paper's (§3.4, §4.5, App. B.1) where it states a value.
    """

    seed: int = 42
    method: str = "diffretriever"  # or a baseline (paper §4.2): promptreps, repllama, diffembed
    num_query_masks: int = 1  # K_q; promptreps: the most vectors
    num_passage_masks: int = 1  # K_p
    num_denoise_steps: int = 1  # forward passes, in training and in the release (paper App. A.1)
    query_length: int | None = None  # tokens of a query's text alone, in training and in the release; 32, the paper's
    passage_length: int | None = None  # the same for passages; 156
    max_length: int | None = None  # in their place, of diffretriever: tokens of prefix + text + suffix
    query_prompt: dict[str, str] | None = None  # system, user (with {text}), assistant; the paper's (Table 1)
    passage_prompt: dict[str, str] | None = None
    append_end_of_text: bool = False  # diffembed: let an end-of-text token take part in the mean
    epochs: float = 3.0
    max_steps: int = 0  # stop after so many optimiser steps; 0 leaves it to `epochs`
    global_batch_size: int = 128  # queries a step, over all processes
    mix_files: bool = True  # false: all queries of a step are from one file of pairs, so that negatives are of its kind
    accumulation_steps: int = 1  # micro-batches a step; each has its own in-batch negatives
    forward_texts: int = 0  # texts of similar length that are read at once, so that little is padding; 0: a whole side
    grad_cache_chunk: int = 0  # the same, but texts whose activations are held at once (GradCache); 0 holds all
    hard_negatives: int = 15  # sampled for each query
    temperature: float = 0.01  # of the dense InfoNCE
    sparse_weight: float = 1.0
    denoising_weight: float = 0.0  # of restoring masked passages, beside the contrastive loss; 0 leaves it out
    teacher: str | None = None  # a sentence-transformers model, folder or Hub id, whose rankings are learned, too
    teacher_temperature: float = 0.05  # divides its scores
    distillation_weight: float = 1.0  # of learning its rankings; without a teacher nothing
    rank: int = 16
    alpha: int = 64
    dropout: float = 0.05
    learning_rate: float = 1e-4
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = True  # mixed precision
    backbone_dtype: str = "float32"  # of the frozen weights; bfloat16 halves their memory
    gradient_checkpointing: bool = False
    compile_layers: bool = False  # torch.compile: a step takes less time and memory, the first half a minute more
    workers: int = 0  # processes that prepare batches
    save_steps: int = 200
    keep_checkpoints: int = 2
    log_steps: int = 20
    eval_steps: int = 0  # evaluate the dev split every so many steps; 0 never
    eval_passages: int = 5000
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.max_length is None:
            self.query_length = 32 if self.query_length is None else self.query_length
            self.passage_length = 156 if self.passage_length is None else self.passage_length

    def lengths(self) -> dict[str, int]:
        """Return the config's fields that say where texts are cut: `max_length`, or each side's."""
        return {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}

    def model_settings(self) -> dict[str, Any]:
        """Return what `from_pretrained` needs to load the release as the recipe wants it."""
        names = ("num_query_masks", "num_passage_masks", "num_denoise_steps")
        masks = {name: getattr(self, name) for name in names}
        prompts = {name: prompt for name in PROMPTS if (prompt := getattr(self, name)) is not None}
        settings = {"dtype": self.backbone_dtype, "denoise_confidence": "entropy", **masks, **self.lengths(), **prompts}
        return settings | ({"append_end_of_text": True} if self.append_end_of_text else {})

    def attention(self) -> str:
        """Return the attention to train with: on a CPU, the fused kind's backward pass is slow in bfloat16."""
        return "eager" if self.bf16 and not torch.accelerator.is_available() else "sdpa"

    def total_steps(self, counts: Sequence[int]) -> int:
        """Return the optimiser steps of the whole run on files of so many training items."""
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch(counts))

    def steps_per_epoch(self, counts: Sequence[int]) -> int:
        """Return the optimiser steps in one pass over the items; an incomplete last batch is left out.

        Args:
            counts: items of each file.

        Raises:
            ValueError: there are fewer items than one batch needs.
        """
        groups = self.groups(counts)
        if min(groups) < self.global_batch_size:
            what = (
                "the data has" if self.mix_files else "a file has (with mix_files = false, each fills its own batches)"
            )
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}, but {what} only {min(groups)} queries; lower it, or "
                "add data"
            )
        return sum(group // self.global_batch_size for group in groups)

    def groups(self, counts: Sequence[int]) -> list[int]:
        """Return the sizes of the runs of items that batches are drawn from: of each file, or of all together."""
        return [sum(counts)] if self.mix_files else list(counts)

    def process_batch_size(self, processes: int) -> int:
        """Return how many queries each process sees in one micro-batch.

        Raises:
            ValueError: the global batch does not divide evenly.
        """
        parts = processes * self.accumulation_steps
        if self.global_batch_size % parts:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} does not divide into {processes} processes times "
                f"accumulation_steps {self.accumulation_steps}; choose a multiple of {parts}"
            )
        return self.global_batch_size // parts


def read_adapter_recipe(path: str | Path, assignments: Sequence[str] = (), **overrides: Any) -> AdapterRecipe:
    """Read a recipe and the command line's changes to it.

    Args:
        path: a YAML file.
        assignments: "key=value" texts; they win over the file.
        overrides: values that win over both (None: not given).

    Raises:
        FileNotFoundError: the file is absent.
        ValueError: an unknown key, or a value that cannot be; the message names file and key.
    """
    changes = dict(map(read_assignment, assignments)) | {k: v for k, v in overrides.items() if v is not None}
    recipe = read_recipe(path, AdapterRecipe, changes)
    changed = set(LENGTHS) & changes.keys()  # on the command line, one way to say lengths takes the other's place
    if changed == {"max_length"}:
        recipe.query_length = recipe.passage_length = None
    elif changed and "max_length" not in changed:
        recipe = replace(recipe, max_length=None)
    check_recipe(recipe, str(path))
    return recipe


def read_assignment(text: str) -> tuple[str, Any]:
    """Split "key=value"; the value is read as YAML.

    >>> read_assignment("learning_rate=1e-3")
    ('learning_rate', '1e-3')
    >>> read_assignment("bf16=false")
    ('bf16', False)
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip() or not value.strip():
        raise ValueError(f"--set {text}: expected key=value, for example --set learning_rate=2e-4")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text}: the value is not valid YAML: {error}") from error


_AT_LEAST: dict[str, int] = {
    "num_query_masks": 1,
    "num_passage_masks": 1,
    "num_denoise_steps": 1,
    "query_length": 1,
    "passage_length": 1,
    "max_length": 1,
    "max_steps": 0,
    "global_batch_size": 1,
    "accumulation_steps": 1,
    "forward_texts": 0,
    "grad_cache_chunk": 0,
    "hard_negatives": 0,
    "rank": 1,
    "alpha": 1,
    "workers": 0,
    "save_steps": 1,
    "keep_checkpoints": 1,
    "log_steps": 1,
    "eval_steps": 0,
    "eval_passages": 1,
    "seed": 0,
}


def check_recipe(recipe: AdapterRecipe, where: str) -> None:
    """Refuse values that cannot work.

    Raises:
        ValueError: names the key, what it is and what it may be.
    """
    for name, least in _AT_LEAST.items():
        value = getattr(recipe, name)
        if value is not None and value < least:
            raise ValueError(f"{where}: {name} must be at least {least}, got {value}")
    if recipe.max_length is not None and len(recipe.lengths()) > 1:
        raise ValueError(
            f"{where}: say the lengths of the texts (query_length, passage_length) or max_length, not both"
        )
    for name in ("temperature", "teacher_temperature", "learning_rate", "epochs", "max_grad_norm"):
        value = getattr(recipe, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{where}: {name} must be positive, got {value}")
    for name in ("sparse_weight", "denoising_weight", "distillation_weight", "weight_decay"):
        value = getattr(recipe, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{where}: {name} must not be negative, got {value}")
    for name in ("dropout", "warmup"):
        if not 0 <= getattr(recipe, name) < 1:
            raise ValueError(f"{where}: {name} must lie between 0 and 1, got {getattr(recipe, name)}")
    for name, allowed in (("method", METHODS), ("backbone_dtype", DTYPES), ("report_to", REPORTS)):
        if getattr(recipe, name) not in allowed:
            raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}, got {getattr(recipe, name)!r}")
    least = 2 * recipe.accumulation_steps  # two queries a micro-batch: each is the other's negative
    if not recipe.hard_negatives and recipe.global_batch_size < least:
        raise ValueError(
            f"{where}: a query alone in its micro-batch has no negative and learns nothing: with hard_negatives 0 and "
            f"accumulation_steps {recipe.accumulation_steps}, global_batch_size must be at least {least}, got "
            f"{recipe.global_batch_size}"
        )
    for name in PROMPTS:
        try:
            check_prompt(name, getattr(recipe, name))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if recipe.method in configuration.METHODS:
        _check_baseline(recipe, where)
    elif recipe.append_end_of_text:
        raise ValueError(f"{where}: append_end_of_text belongs to method: diffembed; leave it out")


def _check_baseline(recipe: AdapterRecipe, where: str) -> None:
    """Refuse what the baseline cannot have."""
    settings = {name: value for name, value in recipe.model_settings().items() if name != "dtype"}
    try:
        method = configuration.BaselineConfig(
            recipe.method, "backbone", **configuration.own_names(recipe.method, settings)
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if recipe.denoising_weight:
        raise ValueError(f"{where}: {recipe.method} reads no masks; leave denoising_weight at 0")
    if recipe.sparse_weight and not method.has_sparse:
        raise ValueError(f"{where}: {recipe.method} has no sparse vectors; set sparse_weight to 0")
