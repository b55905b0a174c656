"""Configuration of a DiffRetriever release: the backbone, the mask budgets and the retrieval prompts."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

BACKBONE_TYPES = ("llada", "dream")
ROLES = ("system", "user", "assistant")


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
            backbone_config = CONFIG_MAPPING[backbone_config["model_type"]](**backbone_config)
        self.backbone_config = backbone_config
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; remembers which fields the caller overrode, since an adapter's own settings yield to
        the caller's but not to the release's."""
        overrides = tuple(name for name in kwargs if name in config_dict or name in FIELDS)
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._overrides = overrides
        config.check()
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        fields = super().to_dict()
        fields.pop("_overrides", None)
        return fields

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
        for name in ("num_query_masks", "num_passage_masks", "num_denoise_steps", "max_length", "sparse_top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config field `{name}` must be a whole number of at least 1, got {value!r}.")
        if self.backbone_type is not None and self.backbone_type not in BACKBONE_TYPES:
            known = '", "'.join(BACKBONE_TYPES)
            raise ValueError(f'config field `backbone_type` must be one of "{known}", got {self.backbone_type!r}.')
        for name in ("query_prompt", "passage_prompt"):
            _check_prompt(name, getattr(self, name))


def _check_prompt(name: str, prompt: Any) -> None:
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


FIELDS = frozenset(DiffRetrieverConfig().to_dict()) | {"backbone_config"}
