"""What a baseline says about itself: `baseline.json`, beside its adapter or its weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.durable import write_json
from ..model.checked_files import read_json
from ..model.configuration_diffretriever import check_prompt, paper_prompt

CONFIG_FILE = "baseline.json"
METHODS = ("promptreps", "repllama", "diffembed")
SPARSE_METHODS = ("promptreps",)
NAMES = ("base_model_name_or_path", "base_model_revision", "adapter_name_or_path")
CAPS = ("num_query_vectors", "num_passage_vectors")
LENGTHS = ("query_length", "passage_length")
COUNTS = (*CAPS, *LENGTHS)
# What commands and recipes call a side's number of vectors, as DiffRetriever does.
BUDGETS = dict(zip(("num_query_masks", "num_passage_masks"), CAPS, strict=True))


@dataclass
class BaselineConfig:
    """Everything that decides a baseline's vectors beside its weights; each field can be set in `load_baseline`.

    Args:
        method: one of METHODS.
        base_model_name_or_path: the backbone, a Hub id or folder; a relative path starts at baseline.json's folder.
        base_model_revision: commit, tag or branch of the backbone on the Hub.
        adapter_name_or_path: the LoRA adapter in peft's own format, found in the same way; None is zero-shot.
        merge_adapter: True merges the adapter at load, False keeps it beside the weights; None merges unless the
            backbone is quantised or offloaded.
        num_query_vectors: PromptReps: K_q, the most vectors of a query, one of the prompt and one for each generated
            word (the paper's cap: 20 zero-shot, 4 fine-tuned). The other methods have 1.
        num_passage_vectors: the same for passages.
        query_length: tokens of a query's text; for RepLLaMA, as in its code, with `query: ` and end-of-text (App. B.1).
        passage_length: the same for passages.
        query_prompt: PromptReps: {"system", "user", "assistant"}; None is the paper's wording for K_q (Table 1).
        passage_prompt: the same for passages and K_p.
        append_end_of_text: DiffEmbed: whether an end-of-text token stands behind the text and counts in the mean. The
            original has none.
        normalize: whether the vectors are L2-normalised.
        sparse_top_k: PromptReps: T, sparse weights kept a text. The other methods have no sparse vectors: 0.
        cut_in_training: {"query", "passage": the share of the texts that were cut in training}; None where unknown.

    Attributes:
        name_or_path: what `load_baseline` was given.
        overrides: budgets and lengths that its caller chose, under DiffRetriever's names.
        hidden_size, vocab_size: H and V of the backbone; 0 until it is loaded.

    Raises:
        ValueError: a field has a value that the method cannot have; the message names it.
    """

    method: str
    base_model_name_or_path: str
    base_model_revision: str | None = None
    adapter_name_or_path: str | None = None
    merge_adapter: bool | None = None
    num_query_vectors: int = 1
    num_passage_vectors: int = 1
    query_length: int = 32
    passage_length: int = 156
    query_prompt: dict[str, str] | None = None
    passage_prompt: dict[str, str] | None = None
    append_end_of_text: bool = False
    normalize: bool = True
    sparse_top_k: int | None = None
    cut_in_training: dict[str, float] | None = None
    num_denoise_steps: int = dataclasses.field(default=1, init=False)
    name_or_path: str = dataclasses.field(default="", init=False)
    overrides: tuple[str, ...] = dataclasses.field(default=(), init=False)
    hidden_size: int = dataclasses.field(default=0, init=False)
    vocab_size: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.sparse_top_k is None:
            self.sparse_top_k = 128 if self.method == "promptreps" else 0
        self.check()

    @property
    def has_sparse(self) -> bool:
        """Whether the method has sparse vectors."""
        return self.method in SPARSE_METHODS

    @property
    def max_length(self) -> int:
        """The longer side's length; `text_length` has each."""
        return max(self.query_length, self.passage_length)

    def text_length(self, is_query: bool) -> int:
        """Return how many tokens of a text are read, counted as the method counts them."""
        return self.query_length if is_query else self.passage_length

    def num_masks(self, is_query: bool) -> int:
        """Return K of a side under the name that DiffRetriever's config has for it."""
        return self.num_query_vectors if is_query else self.num_passage_vectors

    @property
    def num_query_masks(self) -> int:
        """K_q under DiffRetriever's name, as `num_masks`."""
        return self.num_query_vectors

    @num_query_masks.setter
    def num_query_masks(self, value: int) -> None:
        self.num_query_vectors = value

    @property
    def num_passage_masks(self) -> int:
        """K_p under DiffRetriever's name, as `num_masks`."""
        return self.num_passage_vectors

    @num_passage_masks.setter
    def num_passage_masks(self, value: int) -> None:
        self.num_passage_vectors = value

    def prompt(self, is_query: bool) -> dict[str, str]:
        """Return what stands around the texts of a side, by role; `{text}` is the text."""
        side = "query" if is_query else "passage"
        if self.method == "repllama":
            return {"user": f"{side}: {{text}}"}
        if self.method == "diffembed":
            return {"user": "{text}"}
        configured = self.query_prompt if is_query else self.passage_prompt
        return configured or paper_prompt(side, self.num_masks(is_query))

    def check(self) -> None:
        """Raise ValueError for a field that this method cannot have."""
        if self.method not in METHODS:
            raise ValueError(f"field `method` must be one of {', '.join(METHODS)}, got {self.method!r}.")
        for name in NAMES:
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
            elif not (isinstance(value, str) and value) and not (value is None and name != NAMES[0]):
                raise ValueError(f"field `{name}` must be a string{' or null' * (name != NAMES[0])}, got {value!r}.")
        for name, optional in (("append_end_of_text", False), ("normalize", False), ("merge_adapter", True)):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (optional and value is None):
                raise ValueError(f"field `{name}` must be true or false{' or null' * optional}, got {value!r}.")
        for name in (*COUNTS, "sparse_top_k"):
            value, least = getattr(self, name), int(name in COUNTS)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"field `{name}` must be a whole number of at least {least}, got {value!r}.")
        cut = self.cut_in_training
        if not (cut is None or (isinstance(cut, dict) and all(type(share) in (int, float) for share in cut.values()))):
            raise ValueError(f"field `cut_in_training` must be null or numbers by side, got {cut!r:.80}.")
        for name in ("query_prompt", "passage_prompt"):
            check_prompt(name, getattr(self, name))
        self._check_method()

    def _check_method(self) -> None:
        """Refuse what belongs to another method: it would be passed over."""
        if self.method == "promptreps":
            foreign: dict[str, Any] = {"append_end_of_text": False}
            if self.sparse_top_k == 0:
                raise ValueError("field `sparse_top_k` must be a whole number of at least 1 for promptreps, got 0.")
        else:
            foreign = {**dict.fromkeys(CAPS, 1), "query_prompt": None, "passage_prompt": None, "sparse_top_k": 0}
            if self.method == "repllama":
                foreign["append_end_of_text"] = False  # it always has one
        for name, only in foreign.items():
            if getattr(self, name) != only:
                raise ValueError(f"field `{name}` of {self.method} can only be {only!r}, got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return what baseline.json holds."""
        return {name: getattr(self, name) for name in FIELDS}

    def save(self, folder: Path) -> None:
        """Write baseline.json, whole or not at all, making the folder."""
        write_json(folder / CONFIG_FILE, self.to_dict())


FIELDS = tuple(field.name for field in dataclasses.fields(BaselineConfig) if field.init)


def own_names(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that are given under DiffRetriever's names under a baseline's.

    Args:
        method: one of METHODS, for messages.
        settings: fields of either config, and whatever else a model is loaded with.

    Raises:
        ValueError: one that no baseline has.
    """
    if "max_length" in settings:
        raise ValueError(
            f"max_length counts the prompt of a DiffRetriever; of {method}, set query_length and passage_length."
        )
    if settings.get("num_denoise_steps", 1) != 1:
        raise ValueError(f"{method} denoises nothing; leave num_denoise_steps at 1.")
    left_out = ("num_denoise_steps", "denoise_confidence")
    return {BUDGETS.get(name, name): value for name, value in settings.items() if name not in left_out}


def read_config(folder: Path) -> BaselineConfig:
    """Read a folder's baseline.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: no JSON, a field that is missing, unknown or wrong; the message names file and field.
    """
    file = folder / CONFIG_FILE
    raw = read_json(file)
    unknown = sorted(raw.keys() - set(FIELDS))
    if unknown:
        raise ValueError(f"{file}: unknown field `{unknown[0]}`; the fields are {', '.join(FIELDS)}.")
    missing = [name for name in ("method", "base_model_name_or_path") if name not in raw]
    if missing:
        raise ValueError(f"{file} lacks `{missing[0]}`.")
    try:
        return BaselineConfig(**raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
