"""DiffRetriever in sentence-transformers: what SentenceTransformer, SparseEncoder and MultiVectorEncoder load.

Needs sentence-transformers 5 (dense, sparse) or 6 (multi-vector too). transformers' AutoModel never imports this file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel

# base.modules since sentence-transformers 5.4
MODULES = (
    "sentence_transformers.base.modules" if find_spec("sentence_transformers.base") else "sentence_transformers.models"
)
InputModule: Any = import_module(MODULES).InputModule
logger = logging.getLogger(__name__)

# What sentence-transformers calls the two sides, and the prompts of a release that stand for them.
TASKS = {"query": True, "document": False}
ROLE_TAGS = {"<|query|>": True, "<|document|>": False}
CLASSES = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multi-vector": "MultiVectorEncoder"}
KINDS = tuple(CLASSES)
# Of what sentence-transformers hands on for the tokenizer, these are about the download only.
DOWNLOAD_OPTIONS = {"token", "trust_remote_code", "revision", "local_files_only", "cache_dir"}


def split_role(text: str) -> tuple[bool | None, str]:
    """Read a role tag at the start of a text.

    Args:
        text: a prompt, or a text with its prompt in front.

    Returns:
        True for a query, False for a document, None without a tag; and the text behind the tag.

    >>> split_role("<|query|>what is a tide")
    (True, 'what is a tide')
    >>> split_role("what is a <|query|>")
    (None, 'what is a <|query|>')
    """
    for tag, is_query in ROLE_TAGS.items():
        if text.startswith(tag):
            return is_query, text[len(tag) :]
    return None, text


class DiffRetrieverModule(InputModule):
    """A DiffRetriever model as the one module of a sentence-transformers model.

    Each text is a query or a document. Which one it is, is said by, in this order: a role tag as the prompt (the
    release's stored prompts "query" and "document" are role tags), `task="query"` or `task="document"` (`encode_query`
    and `encode_document` give both), or, where neither is given, a role tag at the start of the text itself. A text
    without any of these is taken as a document, and a warning says so once. A tag that was read is not part of the
    text. A tag at the start of a text whose side is known already is ordinary characters.

    Args:
        model: what `AutoModel.from_pretrained` of a DiffRetriever release returns.
        kind: "dense" (`single_dense` vectors), "sparse" (`sparse_max`) or "multi-vector" (`multi_dense`).

    Raises:
        ValueError: `kind` is none of these.
    """

    config_file_name = "st_diffretriever.json"
    config_keys = ["kind"]
    save_in_root = True

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__()
        if kind not in KINDS:
            known = '", "'.join(KINDS)
            raise ValueError(f'{self.config_file_name}: `kind` must be one of "{known}", got {kind!r}.')
        self.model = model
        self.kind = kind
        self.forward_kwargs = {"task", "max_active_dims"} if kind == "sparse" else {"task"}
        self._said_side = False
        self.eval()

    # ---------------------------------------------------------------------------------------------- load and save

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> DiffRetrieverModule:
        """Load a release; sentence-transformers calls this.

        Args:
            model_name_or_path: Hub id or folder of a release.
            subfolder: must be empty, the module lies at the top of a release.
            token, cache_folder, revision, local_files_only, trust_remote_code: as in transformers.
            model_kwargs: what `AutoModel.from_pretrained` takes: dtype, device_map, attn_implementation and others.
            processor_kwargs: must be empty, the prompt fixes how texts are tokenised.
            config_kwargs: fields of the release's config.json, to override.
            backend: must be "torch".

        Raises:
            FileNotFoundError: the release has no st_diffretriever.json.
            ValueError: an argument that this model cannot honour, or files for another class.
        """
        processor_kwargs = processor_kwargs or kwargs.get("tokenizer_kwargs") or {}
        _check_options(subfolder, processor_kwargs, backend)
        hub: dict[str, Any] = {"token": token, "revision": revision, "local_files_only": local_files_only}
        settings = cls.load_config(model_name_or_path, cache_folder=cache_folder, **hub)
        if not settings:
            raise FileNotFoundError(
                f"{model_name_or_path} has no {cls.config_file_name}, which says what the release gives to "
                "sentence-transformers; load it with transformers' AutoModel, or build it again with publish.py."
            )
        kind, asked = settings.get("kind", ""), revision if revision in KINDS else None
        if kind == "dense" and all(
            "trust_remote_code" in given for given in (model_kwargs or {}, processor_kwargs, config_kwargs or {})
        ):
            asked = "sparse"  # SparseEncoder alone repeats the download's options so, to put random weights behind this
        if asked is not None and asked != kind:
            raise ValueError(_elsewhere(model_name_or_path, asked))
        hub |= {"cache_dir": cache_folder, "trust_remote_code": trust_remote_code}
        options = {**hub, **(config_kwargs or {}), **(model_kwargs or {})}
        release = _around(model_name_or_path) if settings.get("release") == ".." else model_name_or_path
        return cls(AutoModel.from_pretrained(release, **options), kind)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write merged weights, tokenizer, config and code, and this module's settings, into a folder."""
        self.model.save_pretrained(output_path, safe_serialization=safe_serialization)
        self.save_config(output_path)

    # ---------------------------------------------------------------------------------------------- texts to ids

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, task: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Wrap texts in the retrieval prompt of their side.

        Args:
            inputs: one or more strings, or objects {"text": string}.
            prompt: a role tag, a text to put in front of each input, or a role tag with such a text behind it.
            task: "query", "document" or None.

        Returns:
            `input_ids` and `attention_mask`, int64 [B, L] each, left-padded; `sides`, True for queries, and `prepared`,
            what the model reads of each, B entries each, which stay on the host.

        Raises:
            ValueError: an input is no text, the task is unknown, prompt and task contradict each other, or there are
                options for the tokenizer (`processing_kwargs`).
        """
        if kwargs.get("processing_kwargs"):
            raise ValueError(_tokenizer_is_fixed(kwargs["processing_kwargs"]))
        texts = [_as_text(value) for value in inputs]
        return self._features(*self._sides(texts, prompt or "", task))

    def tokenize(self, texts: Sequence[str], task: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Do what `preprocess` does, for sentence-transformers before 5.4: the prompt is in front of each text already.

        There, a text that begins with a role tag of its own loses it where `task` is given without a prompt.
        """
        texts = [_as_text(value) for value in texts]
        if task is None or not any(split_role(text)[0] is not None for text in texts):
            return self._features(*self._sides(texts, "", task))
        sides, bare = zip(*map(split_role, texts), strict=True)
        is_query = _side_of_task(task)
        if any(side is not None and side != is_query for side in sides):
            raise ValueError(_contradiction(task))
        return self._features([is_query] * len(texts), list(bare))

    def _sides(self, texts: list[str], prompt: str, task: str | None) -> tuple[list[bool], list[str]]:
        """Return which texts are queries, and the texts that the model is to read."""
        is_query = None if task is None else _side_of_task(task)
        tagged, rest = split_role(prompt)
        if tagged is not None:
            if is_query is not None and is_query != tagged:
                raise ValueError(_contradiction(task))
            return [tagged] * len(texts), [rest + text for text in texts]
        texts = [prompt + text for text in texts]
        if is_query is not None:
            return [is_query] * len(texts), texts
        found = [split_role(text) for text in texts]
        if any(side is None for side, _ in found):
            self._say_side()
        return [side is True for side, _ in found], [text for _, text in found]

    def _say_side(self) -> None:
        """Warn, once for a loaded model, that texts were taken as documents."""
        if not self._said_side:
            self._said_side = True
            logger.warning(
                "encode() was not told whether these texts are queries or documents, and takes them as documents. Use "
                'encode_query and encode_document, or pass prompt_name="query" or prompt_name="document" (or task=...).'
            )

    def _features(self, sides: list[bool], texts: list[str]) -> dict[str, Any]:
        """Tokenise each side by its own prompt and pad all rows to the longest."""
        rules = self.model.texts
        prepared: list[Any] = [None] * len(texts)
        for side in set(sides):
            rows = [row for row, own in enumerate(sides) if own == side]
            found = rules.prepare([texts[row] for row in rows], side, content_filter=self.kind == "sparse")
            for row, text in zip(rows, found, strict=True):
                prepared[row] = text
        ids, mask = rules.pad([text.sequence for text in prepared])
        return {"input_ids": ids, "attention_mask": mask, "sides": sides, "prepared": prepared}

    # ---------------------------------------------------------------------------------------------- ids to vectors

    def forward(
        self, features: dict[str, Any], task: str | None = None, max_active_dims: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Encode one batch.

        Args:
            features: what `preprocess` made.
            task: read by `preprocess`, of no effect here.
            max_active_dims: weights that a sparse vector keeps; None is the release's `sparse_top_k`.

        Returns:
            The features with `sentence_embedding`: dense float32 [B, H], unit length; sparse float32 [B, V]. Dense and
            multi-vector also have `token_embeddings` float32 [B, K, H] and, as `attention_mask`, int64 [B, K].
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "A DiffRetriever release gives no gradients in sentence-transformers. Train its adapter with "
                "`diffretriever train`; to encode, call model.eval() or work under torch.no_grad()."
            )
        if self.kind == "sparse":
            features["sentence_embedding"] = self._sparse(features, max_active_dims)
            return features
        vectors, exists = self._dense(features)
        features["token_embeddings"], features["attention_mask"] = vectors, exists
        if self.kind == "dense":  # the cosine of these is `single_dense`
            means = (vectors * exists[..., None]).sum(dim=1) / exists.sum(dim=1, keepdim=True)
            features["sentence_embedding"] = F.normalize(means, dim=-1)
        return features

    def _encode_sides(self, features: dict[str, Any], **options: Any) -> list[tuple[Any, Any]]:
        """Encode each side's rows; returns their numbers and what the model gives for them.

        Sides and texts are read on the host, where `preprocess` left them: nothing is copied back from a device.
        """
        prepared, sides = features["prepared"], features["sides"]
        parts = []
        for side in sorted(set(sides)):
            rows = [row for row, own in enumerate(sides) if own == side]
            out = self.model.encode_prepared([prepared[row] for row in rows], side, **options)
            parts.append((slice(None) if len(rows) == len(sides) else rows, out))
        return parts

    def _dense(self, features: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the vectors [B, K, H] and which exist [B, K]; K is the larger side's where both are in the batch."""
        parts = self._encode_sides(features, compute_sparse=False)
        widest = max((out["repr_hidden"] for _, out in parts), key=lambda vectors: vectors.shape[1])
        vectors = widest.new_zeros(len(features["sides"]), *widest.shape[1:])
        exists = torch.zeros(vectors.shape[:2], dtype=torch.long, device=vectors.device)
        for rows, out in parts:
            num_masks = out["repr_hidden"].shape[1]
            vectors[rows, :num_masks] = out["repr_hidden"]
            exists[rows, :num_masks] = _existing(out)
        return vectors, exists

    def _sparse(self, features: dict[str, Any], max_active_dims: int | None) -> torch.Tensor:
        """Return the sparse vectors over the whole vocabulary, float32 [B, V]."""
        parts = self._encode_sides(features, sparse_top_k=max_active_dims)
        shape = len(features["sides"]), self.model.config.vocab_size
        vectors = torch.zeros(shape, dtype=torch.float32, device=features["input_ids"].device)
        for rows, out in parts:
            weights = out["sparse_values"].to(vectors.device)
            indices = out["sparse_indices"].to(vectors.device)
            # Unused slots are index 0 with weight 0, so they may be added, not written.
            vectors[rows] = torch.zeros_like(vectors[rows]).scatter_add_(1, indices, weights)
        return vectors

    # ---------------------------------------------------------------------------------------------- properties

    @property
    def auto_model(self) -> Any:
        """The release's model, by the name under which Infinity looks for it."""
        return self.model

    @property
    def tokenizer(self) -> Any:
        """The release's tokenizer."""
        return self.model.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens of prompt and text, on the longer side; the masks and the closing tokens come on top."""
        return max(len(one.prefix) + len(one.suffix) + one.room for one in self.model.texts.layouts.values())

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        lengths = {"max_length": value, "query_length": None, "passage_length": None}
        before = {name: getattr(self.model.config, name) for name in lengths}
        self.model.config.__dict__.update(lengths)
        try:
            _ = self.model.texts  # the model's own checks
        except ValueError:
            self.model.config.__dict__.update(before)
            raise

    def get_embedding_dimension(self) -> int:
        """Return the width of the vectors: H, or for sparse vectors V."""
        return self.model.config.vocab_size if self.kind == "sparse" else self.model.config.hidden_size

    def get_sentence_embedding_dimension(self) -> int:
        """Return `get_embedding_dimension()`, by its name before sentence-transformers 5.4."""
        return self.get_embedding_dimension()


def _around(folder: str) -> str:
    """Return the release that a folder for one class lies in, as given: a link is not followed."""
    return os.path.dirname(os.path.abspath(folder))


def _elsewhere(release: str, kind: str) -> str:
    """Say where a release's files for another class are: in a folder, which has no revisions, or on a branch."""
    inside = f'"{os.path.join(release, kind)}"'
    place = inside if os.path.isdir(release) else f'"{release}", revision="{kind}"'
    return (
        f"the files of {release} are not for {CLASSES[kind]}; its {kind} vectors are loaded with "
        f"{CLASSES[kind]}({place}, trust_remote_code=True)."
    )


def _existing(out: Any) -> torch.Tensor:
    """Return which vectors of the model's output exist, int64 [B, K]."""
    vectors = out["repr_hidden"]
    return torch.ones_like(vectors[..., 0], dtype=torch.long) if out.repr_mask is None else out.repr_mask.long()


def _check_options(subfolder: str, processor_kwargs: dict[str, Any], backend: str) -> None:
    """Refuse what this model could only pass over in silence."""
    if subfolder:
        raise ValueError(f"modules.json: `path` of DiffRetrieverModule must be empty, got {subfolder!r}.")
    if backend != "torch":
        raise ValueError(f'DiffRetriever runs on backend="torch" only, got backend={backend!r}.')
    if unknown := set(processor_kwargs) - DOWNLOAD_OPTIONS:
        raise ValueError(_tokenizer_is_fixed(unknown))


def _tokenizer_is_fixed(options: Iterable[str]) -> str:
    return (
        f"The retrieval prompt fixes how texts are tokenised, so {', '.join(sorted(options))} cannot be set for the "
        "tokenizer; set max_seq_length on the model for another text length."
    )


def _side_of_task(task: str) -> bool:
    if task not in TASKS:
        raise ValueError(f'`task` must be "query" or "document", got {task!r}.')
    return TASKS[task]


def _contradiction(task: str | None) -> str:
    return f"task={task!r}, but the prompt is the role tag of the other side; leave one of the two out."


def _as_text(value: Any) -> str:
    """Return the text of an input, or say what it is instead; its number is lost, as encode sorts by length."""
    text = value["text"] if isinstance(value, dict) and set(value) == {"text"} else value
    if not isinstance(text, str):  # not a TypeError: sentence-transformers would try again in other ways
        kind = type(value).__name__
        raise ValueError(f'an input must be a string or {{"text": string}}, got {kind}: {value!r:.80}.')
    return text
