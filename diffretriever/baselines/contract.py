"""What the tools ask of a model: the contract that DiffRetriever and the baselines share."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from ..model.tokenization_helpers import PreparedText


@runtime_checkable
class RetrievalConfig(Protocol):
    """What decides a model's vectors beside its weights."""

    name_or_path: str
    normalize: bool
    sparse_top_k: int  # T; 0 for a model without sparse vectors

    @property
    def hidden_size(self) -> int:
        """Return H."""

    @property
    def vocab_size(self) -> int:
        """Return V."""

    @property
    def max_length(self) -> int:
        """Return the longest text's tokens, counted as the method counts them."""

    @property
    def num_denoise_steps(self) -> int:
        """Return the forward passes of multi-step denoising."""

    def num_masks(self, is_query: bool) -> int:
        """Return K, the most vectors that a text of a side has."""

    def prompt(self, is_query: bool) -> dict[str, str]:
        """Return what stands around the texts of a side."""


@runtime_checkable
class RetrievalTexts(Protocol):
    """A model's rules of tokenisation (`tokenization_helpers.FramedTokenizer`)."""

    def prepare(self, texts: Sequence[str], is_query: bool, content_filter: bool = True) -> list[PreparedText]:
        """Return each text as the model reads it."""

    def pad(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, int64 [B, L], left-padded."""

    def locate(self, ids: torch.Tensor, mask: torch.Tensor, is_query: bool) -> tuple[torch.Tensor, list[list[int]]]:
        """Return the positions of the masks, int64 [B, K], and each text's ids; refuse rows of another side."""


@runtime_checkable
class RetrievalModel(Protocol):
    """A model whose vectors can be stored, searched and evaluated."""

    config: Any  # a RetrievalConfig; transformers' models declare theirs otherwise
    tokenizer: Any
    loaded_from: Any  # a `configuration_diffretriever.LoadedFrom`: the folders that a store's identity reads

    @property
    def device(self) -> torch.device:
        """Return where token ids go."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the weights' dtype."""

    @property
    def texts(self) -> Any:
        """Return the `RetrievalTexts`."""

    def tokenize(self, texts: Sequence[str], is_query: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, int64 [B, L]."""

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_query: bool = False,
        compute_sparse: bool = False,
        sparse_top_k: int | None = None,
        content_token_ids: Sequence[Sequence[int]] | None = None,
        content_filter: bool = True,
    ) -> Mapping[str, Any]:
        """Return one batch's vectors."""

    def encode_prepared(
        self,
        prepared: Sequence[PreparedText],
        is_query: bool,
        compute_sparse: bool = True,
        sparse_top_k: int | None = None,
    ) -> Mapping[str, Any]:
        """Return one batch's vectors, of what `texts.prepare` made."""

    def encode_texts(
        self,
        texts: Iterable[str],
        is_query: bool,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        compute_sparse: bool = True,
        sparse_top_k: int | None = None,
        content_filter: bool = True,
        tokens_per_batch: int | None = None,
    ) -> Mapping[str, Any]:
        """Return any number of texts' vectors."""

    def score(
        self,
        queries: Mapping[str, Any],
        passages: Mapping[str, Any],
        mode: str = "multi_dense",
        fusion_weight: float | None = None,
    ) -> torch.Tensor:
        """Return float32 [Q, P]."""

    def encode_batches(
        self,
        prepared: Sequence[PreparedText],
        batches: Sequence[Sequence[int]],
        is_query: bool,
        compute_sparse: bool = True,
        sparse_top_k: int | None = None,
    ) -> Generator[tuple[Sequence[int], Mapping[str, Any]], None, None]:
        """Yield each batch, the rows of some of what `texts.prepare` made, and its vectors."""
