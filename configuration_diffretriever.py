"""A DiffRetriever release's configuration (backbone, mask budgets, prompts) and where a model was loaded from."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from .checked_files import ROPE_SCALING, SIZES, check_fields, check_heads, check_rope_scaling, read_json, refuse_unknown
from .query_budgets import MOST_MASKS, budgets_of, check_table, choose_budget, query_features
from .scoring import SCORING_MODES

AUTO_MAP = {
    "AutoConfig": "configuration_diffretriever.DiffRetrieverConfig",
    "AutoModel": "modeling_diffretriever.DiffRetriever",
}
DIFFUSION_TYPES = ("llada", "dream")
BACKBONE_TYPES = (*DIFFUSION_TYPES, "llama", "qwen2")  # the latter two, trained without [MASK], are read at it
ROLES = ("system", "user", "assistant")
# What a saved config.json says about its backbone: each transformers writes the rest, RoPE's base above all, in a way
# of its own, and 4.54 would pass over 5.x's `rope_parameters` in silence.
BACKBONE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "mask_token_id",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "use_cache",
)
LONGEST_PROMPT = 10_000  # characters of a role's text
# What our own fields may say, by `check_fields`' rules; the prompts have a check of their own.
COUNTS = {
    "num_query_masks": ("whole", 1, MOST_MASKS),
    "num_passage_masks": ("whole", 1, MOST_MASKS),
    "num_denoise_steps": ("whole", 1, 1024),
    "max_length": ("whole", 1, 1 << 20),
    "query_length": ("whole", 1, 1 << 20, None),
    "passage_length": ("whole", 1, 1 << 20, None),
    "sparse_top_k": ("whole", 1, 1 << 24),
}
LENGTHS = ("query_length", "passage_length")
RULES: dict[str, tuple[Any, ...]] = COUNTS | {
    "denoise_confidence": ("one of", "entropy", "probability"),
    "base_model_name_or_path": ("name", None),
    "base_model_revision": ("name", None),
    "fetched_backbone": ("object", ("name",), None),
    "adapter_name_or_path": ("name", None),
    "mask_token": ("name", None),
    "normalize": ("flag",),
    "cut_in_training": ("object", ("number", 0, 1), None),
    "query_budget_table": ("object", None),
    "merge_adapter": ("flag", None),
    "recommended_mode": ("one of", *SCORING_MODES, None),
    "recommended_fusion_weight": ("number", 0, 1, None),
}
# What else a config.json may hold: what transformers and its Trainer write. Others could change which weights and whose
# code transformers loads, so they are the caller's to pass.
OTHER_FIELDS: dict[str, tuple[Any, ...]] = {
    "_commit_hash": ("text", None),
    "_name_or_path": ("text", None),
    "architectures": ("names", None),
    "auto_map": ("object", None),
    "bos_token_id": ("wholes", None),
    "dtype": ("one of", "bfloat16", "float16", "float32", "float64", None),
    "eos_token_id": ("wholes", None),
    "model_type": ("one of", "diffretriever"),
    "pad_token_id": ("wholes", None),
    "problem_type": ("one of", None),
    "release_name": ("text", None),
    "tie_word_embeddings": ("one of", False, None),
    "torch_dtype": ("one of", "bfloat16", "float16", "float32", "float64", None),
    "transformers_version": ("text", None),
    "use_cache": ("flag", None),
}


@dataclass(frozen=True)
class LoadedFrom:
    """The folders that a model was really made from, absolute; one of the Hub's cache is named by its commit.

    Args:
        release: of config.json and the code's settings.
        weights: of the backbone's weights and config, or the release itself where it holds merged ones.
        adapter: None without one.
        tokenizer: of the tokenizer's files.
    """

    release: Path
    weights: Path
    adapter: Path | None
    tokenizer: Path


def paper_prompt(side: str, num_masks: int) -> dict[str, str]:
    """Return the retrieval prompt of the paper (Table 1) for one side.

    Args:
        side: "query" or "passage".
        num_masks: K, the number of [MASK] tokens; 1 asks for "one word", more for "a few words".

    Returns:
        The texts of the three roles; the user's turn holds the placeholder `{text}` once.

    >>> paper_prompt("query", 1)["assistant"]
    'The word is: "'
    """
    words, answer = ("one word", "word is") if num_masks == 1 else ("a few words", "words are")
    return {
        "system": "You are an AI assistant that can understand human language.",
        "user": f'{side.capitalize()}: "{{text}}". Use {words} to represent the {side} in a retrieval task. '
        f"Make sure your {answer} in lowercase.",
        "assistant": f'The {answer}: "',
    }


class DiffRetrieverConfig(PretrainedConfig):
    """Everything a release says about itself; each field can be overridden in `from_pretrained`.

    Args:
        backbone_type: "llada", "dream", "llama" or "qwen2"; None reads it from the backbone's own config.json.
        base_model_name_or_path: Hub id or folder of the backbone in its original format. A relative path starts at
            the release's folder. None for a release that holds its own merged weights.
        base_model_revision: commit, tag or branch of the backbone on the Hub; None means its default branch.
        fetched_backbone: {"name", "origin", "sha256"} of a backbone that `diffretriever fetch-backbone` made: other
            weights in `base_model_name_or_path` are refused, unless the caller of `from_pretrained` named them.
        adapter_name_or_path: the LoRA adapter: a folder inside the release, any other folder, or a Hub id.
            None is the zero-shot model.
        mask_token: the special token that serves as [MASK] where the backbone has none (llama, qwen2): one that is not
            in use. None takes the tokenizer's own.
        merge_adapter: True merges the adapter at load, False keeps it beside the weights; None merges unless the
            backbone is quantised or offloaded.
        num_query_masks: K_q, masks appended to a query (paper §3.2).
        num_passage_masks: K_p, masks appended to a passage.
        query_budget_table: K_q of each query by its text's length and entropy, in the place of `num_query_masks`:
            {"length": edges in tokens, "entropy": edges in bits, "num_query_masks": K_q in rows by the length's part
            and columns by the entropy's}; a part ends with its edge. None is the same K_q for all, and a
            `num_query_masks` that the caller of `from_pretrained` sets stands in for the table.
        num_denoise_steps: forward passes; above 1 is the multi-step variant (paper App. A.1).
        denoise_confidence: by which several steps choose the masks to fill: "entropy", the negative entropy of the
            distribution, as the method's code; or "probability", the best token's, as LLaDA itself decodes.
        max_length: tokens of prefix + text + suffix; the masks and the closing tokens come on top.
        query_length: tokens of a query's text alone, as the method's training counts them (32); None leaves it to
            `max_length`, and a `max_length` that the caller of `from_pretrained` sets stands in for it.
        passage_length: the same for passages (156 in the method's training).
        cut_in_training: {"query", "passage": share of the training's texts that were cut}; None where it is not known.
        normalize: whether `repr_hidden` is L2-normalised.
        query_prompt: {"system", "user", "assistant"}; the user's turn holds `{text}` once. None is the paper's
            wording for K_q (Table 1).
        passage_prompt: the same for passages and K_p.
        sparse_top_k: how many sparse weights `encode` keeps when it is not told.
        recommended_mode: the scoring mode that serves the release best, which `diffretriever search` takes when it is
            told none; None is `single_dense` where both K are 1, else `multi_dense`.
        recommended_fusion_weight: the dense scores' share that serves it best in the fusion modes, for `model.score`,
            `search`, `demo` and `evaluate` where they are told none; None is half, as in the paper.
        backbone_config: the backbone as transformers' own Llama or Qwen2 config. Set in self-contained releases.

    Raises:
        ValueError: a field has a value that no release can have; the message names it.
    """

    model_type = "diffretriever"

    def __init__(
        self,
        backbone_type: str | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        fetched_backbone: dict[str, str] | None = None,
        adapter_name_or_path: str | None = None,
        mask_token: str | None = None,
        merge_adapter: bool | None = None,
        num_query_masks: int = 1,
        num_passage_masks: int = 1,
        query_budget_table: dict[str, list[Any]] | None = None,
        num_denoise_steps: int = 1,
        denoise_confidence: str = "entropy",
        max_length: int = 156,
        query_length: int | None = None,
        passage_length: int | None = None,
        cut_in_training: dict[str, float] | None = None,
        normalize: bool = True,
        query_prompt: dict[str, str] | None = None,
        passage_prompt: dict[str, str] | None = None,
        sparse_top_k: int = 128,
        recommended_mode: str | None = None,
        recommended_fusion_weight: float | None = None,
        backbone_config: dict[str, Any] | PretrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["tie_word_embeddings"] = False  # which is not the default on transformers 4
        super().__init__(**kwargs)
        self.backbone_type = backbone_type
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.fetched_backbone = fetched_backbone
        self.adapter_name_or_path = adapter_name_or_path
        self.mask_token = mask_token
        self.merge_adapter = merge_adapter
        self.num_query_masks = num_query_masks
        self.num_passage_masks = num_passage_masks
        self.query_budget_table = query_budget_table
        self.num_denoise_steps = num_denoise_steps
        self.denoise_confidence = denoise_confidence
        self.max_length = max_length
        self.query_length = query_length
        self.passage_length = passage_length
        self.cut_in_training = cut_in_training
        self.normalize = normalize
        self.query_prompt = query_prompt
        self.passage_prompt = passage_prompt
        self.sparse_top_k = sparse_top_k
        self.recommended_mode = recommended_mode
        self.recommended_fusion_weight = recommended_fusion_weight
        if isinstance(backbone_config, dict):
            backbone_config = _read_backbone_fields(backbone_config)
        self.backbone_config = backbone_config
        self.check()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers; refuses what a release's config.json may not say before anything reads it."""
        if (file := Path(pretrained_model_name_or_path) / "config.json").is_file():
            read_json(file)
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        _read_fields(pretrained_model_name_or_path, fields)
        return fields, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; remembers which fields the caller overrode, since an adapter's own settings yield to
        the caller's but not to the release's."""
        if "name_or_path" in kwargs:  # from AutoConfig, which read the file itself
            _read_fields(kwargs["name_or_path"], config_dict)
        overrides = tuple(name for name in kwargs if name in config_dict or name in FIELDS)
        kwargs = {name: _plain(value) for name, value in kwargs.items()}
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._note_overrides(overrides)
        config.check()
        return result

    @classmethod
    def to_load(cls, folder: Any, given: Any, overrides: dict[str, Any]) -> Any:
        """Return a config of its own to load a model by, with the caller's fields in place of the release's.

        Args:
            folder: of the release.
            given: what the caller passed as `config`: a config, or a path of one; None takes the release's.
            overrides: fields and their values.

        Raises:
            ValueError: a field has a value that no release can have.
        """
        if not isinstance(given, PretrainedConfig):
            return cls.from_pretrained(given or folder, **overrides)
        config: Any = deepcopy(given)
        for name, value in overrides.items():
            setattr(config, name, value)
        config._note_overrides(tuple(overrides))
        config.check()
        return config

    def adopt(self, recorded: dict[str, Any], file: Path) -> None:
        """Take over what an adapter was trained with, save for what the caller set.

        Args:
            recorded: fields and values.
            file: that they are from.

        Raises:
            ValueError: it was trained on another kind of backbone.
        """
        if recorded["backbone_type"] != self.backbone_type:
            raise ValueError(f"{file} was trained on another backbone than {self.backbone_type}.")
        for name, value in recorded.items():
            if name not in self.overrides:
                setattr(self, name, value)
        for name in {"query_budget_table", "recommended_fusion_weight"} - set(self.overrides):
            setattr(self, name, None)  # the release's was chosen with its own adapter

    def _note_overrides(self, names: tuple[str, ...]) -> None:
        """Remember which fields the caller set; some would be nothing beside what the release has in their place."""
        for given, instead in (("max_length", LENGTHS), ("num_query_masks", ("query_budget_table",))):
            if given in names:
                for name in set(instead) - set(names):
                    setattr(self, name, None)
                names = tuple(dict.fromkeys((*names, *instead)))
        self._overrides = (*self.overrides, *names)

    def merged(self) -> DiffRetrieverConfig:
        """Return the config of the same model where it lies by itself, its adapter in its weights.

        Raises:
            ValueError: a field was set that no release has: its config.json would not be read again.
        """
        config = deepcopy(self)
        config.base_model_name_or_path = config.base_model_revision = config.adapter_name_or_path = None
        config.fetched_backbone = None
        config.merge_adapter, config.auto_map, config.architectures = None, AUTO_MAP, ["DiffRetriever"]
        _read_fields(self.name_or_path or "this model", config.to_diff_dict())
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        fields = super().to_dict()
        fields.pop("_overrides", None)
        if isinstance(self.backbone_config, PretrainedConfig):
            fields["backbone_config"] = _backbone_fields(self.backbone_config)
        return fields

    def _get_generation_parameters(self) -> dict[str, Any]:
        """Tell transformers 5 that `max_length` is ours: it takes the name for text generation's, and will not save."""
        return {}

    def _get_non_default_generation_parameters(self) -> dict[str, Any]:
        """The same for transformers 4."""
        return {}

    @property
    def overrides(self) -> tuple[str, ...]:
        """Names of the fields that the caller of `from_pretrained` set."""
        return getattr(self, "_overrides", ())

    @property
    def hidden_size(self) -> int | None:
        """H, the width of the dense vectors; None until the backbone is known."""
        return getattr(self.backbone_config, "hidden_size", None)

    @property
    def vocab_size(self) -> int | None:
        """V, the rows of the output head; None until the backbone is known."""
        return getattr(self.backbone_config, "vocab_size", None)

    @property
    def default_mode(self) -> str:
        """The scoring mode to use where none is asked for."""
        single = self.num_query_masks == self.num_passage_masks == 1
        return self.recommended_mode or ("single_dense" if single else "multi_dense")

    def num_masks(self, is_query: bool) -> int:
        """Return K_q or K_p, the most that a text of a side may have."""
        return self.budgets(is_query)[-1]

    def budgets(self, is_query: bool) -> list[int]:
        """Return what K a text of a side may have, rising: the table's where a query's is chosen, else one."""
        if not is_query:
            return [self.num_passage_masks]
        table = self.query_budget_table
        return [self.num_query_masks] if table is None else budgets_of(table)

    def query_budget(self, ids: Sequence[int]) -> int:
        """Return K_q of a query by the tokens of its text, before anything is encoded (paper §6.3)."""
        table = self.query_budget_table
        return self.num_query_masks if table is None else choose_budget(table, query_features(ids))

    def text_length(self, is_query: bool) -> int | None:
        """Return how many tokens of a text are read; None where `max_length` says it, the prompt included."""
        return self.query_length if is_query else self.passage_length

    def prompt(self, is_query: bool, num_masks: int | None = None) -> dict[str, str]:
        """Return the prompt of a side: the configured one, else the paper's for K; None is the side's own."""
        configured = self.query_prompt if is_query else self.passage_prompt
        own = self.num_query_masks if is_query else self.num_passage_masks
        return configured or paper_prompt("query" if is_query else "passage", num_masks or own)

    def text_settings(self) -> str:
        """Return what tokenising depends on, as a text to compare."""
        fields = vars(self)  # transformers' own lookup takes many times as long
        return repr([fields.get(name) for name in (*COUNTS, "query_prompt", "passage_prompt", "query_budget_table")])

    def check(self) -> None:
        """Raise ValueError for a field that no release can have."""
        for name in RULES:
            setattr(self, name, _plain(getattr(self, name)))
        names = (*RULES, "tie_word_embeddings")  # True would put the embedding in the head's place
        check_fields("config field ", {name: getattr(self, name) for name in names}, RULES | OTHER_FIELDS)
        if self.backbone_type is not None and self.backbone_type not in BACKBONE_TYPES:
            known = '", "'.join(BACKBONE_TYPES)
            got = shortened(self.backbone_type)
            raise ValueError(f'config field `backbone_type` must be one of "{known}", got {got}.')
        if self.fetched_backbone is not None:
            check_fetched_backbone(self.fetched_backbone)
        for name in ("query_prompt", "passage_prompt"):
            check_prompt(name, getattr(self, name))
        if self.query_budget_table is not None:
            check_table("config field `query_budget_table`", self.query_budget_table)
            if self.num_denoise_steps > 1:
                raise ValueError("config field `query_budget_table` needs one forward pass: `num_denoise_steps` 1.")


def _read_fields(name: Any, fields: dict[str, Any]) -> None:
    """Refuse what the config.json of a release may not say, and fill in what earlier ones meant."""
    refuse_unknown(f"config.json of {name}: ", fields, FIELDS | OTHER_FIELDS.keys())
    check_fields(f"config.json of {name}: ", fields, RULES | OTHER_FIELDS)
    if fields.get("backbone_type") == "llada" and fields.get("num_denoise_steps", 1) > 1:
        fields.setdefault("denoise_confidence", "probability")  # what it meant before there was this field


def _plain(value: Any) -> Any:
    """Return paths and numpy's whole numbers as JSON has them, anything else as it is."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _backbone_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return a Llama or Qwen2 config as every supported transformers reads it."""
    fields = {name: getattr(config, name, None) for name in BACKBONE_FIELDS}
    fields["tie_word_embeddings"] = False  # a folder of merged weights has the head's own
    rope = getattr(config, "rope_parameters", None)  # transformers 5; 4 has two fields
    rope = rope or {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    fields["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = {name: rope[name] for name in ROPE_SCALING}
    return fields


def _read_backbone_fields(fields: dict[str, Any]) -> PretrainedConfig:
    """Make a Llama or Qwen2 config of what `_backbone_fields` gave."""
    rules = {"model_type": ("one of", "llama", "qwen2"), "tie_word_embeddings": ("one of", False), **SIZES}
    rules["rope_scaling"] = ("object", None)
    rules |= {name: ("whole", 0, 1 << 31, None) for name in BACKBONE_FIELDS if name.endswith("_token_id")}
    fields = {"model_type": None, **fields}
    named = {f"backbone_config.{name}": value for name, value in fields.items()}
    refuse_unknown(
        "config field ", named, [f"backbone_config.{name}" for name in (*BACKBONE_FIELDS, "rope_theta", "rope_scaling")]
    )
    check_fields("config field ", named, {f"backbone_config.{name}": rule for name, rule in rules.items()})
    missing = [name for name in SIZES if fields.get(name) is None]
    if missing:
        raise ValueError(f"config field `backbone_config` lacks {', '.join(missing)}.")
    if fields.get("rope_scaling"):
        check_rope_scaling("config field `backbone_config`: ", fields["rope_scaling"])
    check_heads("config field ", fields, {name: f"backbone_config.{name}" for name in SIZES})
    return CONFIG_MAPPING[fields["model_type"]](**fields)


def check_fetched_backbone(fields: dict[str, str]) -> None:
    """Raise ValueError for a record of a backbone that could not have made the command which an error may show."""
    if set(fields) != {"name", "origin", "sha256"}:
        raise ValueError(
            f"config field `fetched_backbone` must have exactly the keys name, origin, sha256; got {shortened(fields)}."
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", fields["name"]) or not re.fullmatch("[0-9a-f]{64}", fields["sha256"]):
        raise ValueError(
            f"config field `fetched_backbone` must hold a backbone's name and its SHA-256; got {shortened(fields)}."
        )


def check_prompt(name: str, prompt: Any) -> None:
    """Raise ValueError for a field that is neither null nor a prompt of the three roles."""
    if prompt is None:
        return
    if not isinstance(prompt, dict) or set(prompt) != set(ROLES):
        raise ValueError(
            f"config field `{name}` must be null (the paper's wording) or an object with exactly the keys "
            f"{', '.join(ROLES)}; got {shortened(prompt)}."
        )
    for role in ROLES:
        if not isinstance(prompt[role], str) or len(prompt[role]) > LONGEST_PROMPT:
            raise ValueError(
                f"config field `{name}.{role}` must be a string of at most {LONGEST_PROMPT} characters, got "
                f"{shortened(prompt[role])}."
            )
    if prompt["user"].count("{text}") != 1:
        raise ValueError(
            f"config field `{name}.user` must hold the placeholder {{text}} exactly once; got "
            f"{shortened(prompt['user'])}."
        )


# Our own fields; `from_pretrained` must leave transformers' (its dtype, for one) to transformers.
FIELDS = frozenset(inspect.signature(DiffRetrieverConfig.__init__).parameters) - {"self", "kwargs"}
