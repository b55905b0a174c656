"""A DiffRetriever release's configuration (backbone, mask budgets, prompts) and where a model was loaded from."""

from __future__ import annotations

import inspect
import os
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_diffretriever.DiffRetrieverConfig",
    "AutoModel": "modeling_diffretriever.DiffRetriever",
}
BACKBONE_TYPES = ("llada", "dream")
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
        backbone_type: "llada" or "dream"; None reads it from the backbone's own config.json.
        base_model_name_or_path: Hub id or folder of the backbone in its original format. A relative path starts at
            the release's folder. None for a release that holds its own merged weights.
        base_model_revision: commit, tag or branch of the backbone on the Hub; None means its default branch.
        adapter_name_or_path: the LoRA adapter: a folder inside the release, any other folder, or a Hub id.
            None is the zero-shot model.
        merge_adapter: True merges the adapter at load, False keeps it beside the weights; None merges unless the
            backbone is quantised or offloaded.
        num_query_masks: K_q, masks appended to a query (paper §3.2).
        num_passage_masks: K_p, masks appended to a passage.
        num_denoise_steps: forward passes; above 1 is the multi-step variant (paper App. A.1).
        max_length: tokens of prefix + text + suffix; the masks and the closing tokens come on top.
        normalize: whether `repr_hidden` is L2-normalised.
        query_prompt: {"system", "user", "assistant"}; the user's turn holds `{text}` once. None is the paper's
            wording for K_q (Table 1).
        passage_prompt: the same for passages and K_p.
        sparse_top_k: how many sparse weights `encode` keeps when it is not told.
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
        adapter_name_or_path: str | None = None,
        merge_adapter: bool | None = None,
        num_query_masks: int = 1,
        num_passage_masks: int = 1,
        num_denoise_steps: int = 1,
        max_length: int = 156,
        normalize: bool = True,
        query_prompt: dict[str, str] | None = None,
        passage_prompt: dict[str, str] | None = None,
        sparse_top_k: int = 128,
        backbone_config: dict[str, Any] | PretrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["tie_word_embeddings"] = False  # transformers would otherwise replace the head by the embedding
        super().__init__(**kwargs)
        self.backbone_type = backbone_type
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.adapter_name_or_path = adapter_name_or_path
        self.merge_adapter = merge_adapter
        self.num_query_masks = num_query_masks
        self.num_passage_masks = num_passage_masks
        self.num_denoise_steps = num_denoise_steps
        self.max_length = max_length
        self.normalize = normalize
        self.query_prompt = query_prompt
        self.passage_prompt = passage_prompt
        self.sparse_top_k = sparse_top_k
        if isinstance(backbone_config, dict):
            backbone_config = _read_backbone_fields(backbone_config)
        self.backbone_config = backbone_config
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; remembers which fields the caller overrode, since an adapter's own settings yield to
        the caller's but not to the release's."""
        overrides = tuple(name for name in kwargs if name in config_dict or name in FIELDS)
        kwargs = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in kwargs.items()}
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._overrides = overrides
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
        config._overrides = (*getattr(config, "_overrides", ()), *overrides)
        config.check()
        return config

    def merged(self) -> DiffRetrieverConfig:
        """Return the config of the same model where it lies by itself, its adapter in its weights."""
        config = deepcopy(self)
        config.base_model_name_or_path = config.base_model_revision = config.adapter_name_or_path = None
        config.merge_adapter, config.auto_map, config.architectures = None, AUTO_MAP, ["DiffRetriever"]
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

    def num_masks(self, is_query: bool) -> int:
        """Return K_q or K_p."""
        return self.num_query_masks if is_query else self.num_passage_masks

    def prompt(self, is_query: bool) -> dict[str, str]:
        """Return the prompt of a side: the configured one, else the paper's for its K."""
        configured = self.query_prompt if is_query else self.passage_prompt
        return configured or paper_prompt("query" if is_query else "passage", self.num_masks(is_query))

    def check(self) -> None:
        """Raise ValueError for a field that no release can have."""
        for name in ("base_model_name_or_path", "base_model_revision", "adapter_name_or_path"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
            elif value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"config field `{name}` must be a string or null, got {value!r}.")
        for name, optional in (("normalize", False), ("merge_adapter", True)):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (optional and value is None):
                raise ValueError(f"config field `{name}` must be true or false{' or null' * optional}, got {value!r}.")
        for name in ("num_query_masks", "num_passage_masks", "num_denoise_steps", "max_length", "sparse_top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config field `{name}` must be a whole number of at least 1, got {value!r}.")
        if self.backbone_type is not None and self.backbone_type not in BACKBONE_TYPES:
            known = '", "'.join(BACKBONE_TYPES)
            raise ValueError(f'config field `backbone_type` must be one of "{known}", got {self.backbone_type!r}.')
        for name in ("query_prompt", "passage_prompt"):
            check_prompt(name, getattr(self, name))


def _backbone_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return a Llama or Qwen2 config as every supported transformers reads it."""
    fields = {name: getattr(config, name, None) for name in BACKBONE_FIELDS}
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}  # transformers 5, and 4
    fields["rope_theta"] = rope["rope_theta"]
    return fields


def _read_backbone_fields(fields: dict[str, Any]) -> PretrainedConfig:
    kinds = ("llama", "qwen2")
    if fields.get("model_type") not in kinds:
        raise ValueError(
            f"config field `backbone_config.model_type` must be one of {kinds}, got {fields.get('model_type')!r}."
        )
    missing = [name for name in (*BACKBONE_FIELDS[:9], "rope_theta") if fields.get(name) is None]
    if missing:
        raise ValueError(f"config field `backbone_config` lacks {', '.join(missing)}.")
    return CONFIG_MAPPING[fields["model_type"]](**fields)


def check_prompt(name: str, prompt: Any) -> None:
    """Raise ValueError for a field that is neither null nor a prompt of the three roles."""
    if prompt is None:
        return
    if not isinstance(prompt, dict) or set(prompt) != set(ROLES):
        raise ValueError(
            f"config field `{name}` must be null (the paper's wording) or an object with exactly the keys "
            f"{', '.join(ROLES)}; got {prompt!r}."
        )
    for role in ROLES:
        if not isinstance(prompt[role], str):
            raise ValueError(f"config field `{name}.{role}` must be a string, got {prompt[role]!r}.")
    if prompt["user"].count("{text}") != 1:
        raise ValueError(
            f"config field `{name}.user` must hold the placeholder {{text}} exactly once; got {prompt['user']!r}."
        )


# Our own fields; `from_pretrained` must leave transformers' (its dtype, for one) to transformers.
FIELDS = frozenset(inspect.signature(DiffRetrieverConfig.__init__).parameters) - {"self", "kwargs"}
