"""What the baselines share: batches of texts into vectors, as the DiffRetriever model does it."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..files.durable import publish_folder
from ..model.adapter_loading import merged_state
from ..model.backbone_loading import check_output, save_tokenizer
from ..model.batching import (
    check_count,
    check_ids,
    check_side,
    check_texts,
    count_workers,
    encode_in_order,
    in_eval_mode,
    run_side_by_side,
)
from ..model.configuration_diffretriever import LoadedFrom
from ..model.modeling_diffretriever import DiffRetrieverOutput
from ..model.scoring import SCORING_MODES, fusion_weight_of, score
from ..model.sparse_head import content_columns, sparse_vectors
from ..model.tokenization_helpers import FramedTokenizer, PreparedText
from .configuration import BaselineConfig

DENSE_ONLY_MODES = ("single_dense", "multi_dense")


@dataclass
class BaselineOutput(DiffRetrieverOutput):
    """What a baseline returns for B texts.

    Args:
        repr_hidden, repr_mask, sparse_indices, sparse_values: as DiffRetriever's.
        states: [B, K, H] in the model's dtype, with gradient, not normalised (`forward`).
    """

    states: torch.Tensor | None = None


class Baseline(nn.Module):
    """A retriever of the paper's comparison. Load it with `load_baseline`.

    Args:
        config: its settings; a later change holds from the next text on.
        backbone: LlamaForCausalLM or Qwen2ForCausalLM; for DiffEmbed also a DiffRetriever without its masks.
        tokenizer: the backbone's fast tokenizer.

    Attributes:
        loaded_from: the folders that `load_baseline` took it from; None for a model that was made otherwise.

    Raises:
        ValueError: a tokenizer or length that the method cannot work with.
    """

    def __init__(self, config: BaselineConfig, backbone: Any, tokenizer: Any) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.tokenizer = tokenizer
        config.hidden_size, config.vocab_size = backbone.config.hidden_size, backbone.config.vocab_size
        self.loaded_from: LoadedFrom | None = None
        self._texts: tuple[Any, FramedTokenizer] | None = None
        _ = self.texts  # what cannot be tokenised is refused now, not at the first text
        self.eval()

    def _make_texts(self) -> FramedTokenizer:
        """Return the method's rules of tokenisation under the present config."""
        raise NotImplementedError

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, is_query: bool = False
    ) -> BaselineOutput:
        """Return the states that are the vectors, with gradient.

        Args:
            input_ids: int64 [B, L] from `tokenize`, left-padded.
            attention_mask: [B, L], 1 for real tokens; None when no row is padded.
            is_query: the side that `tokenize` was told.

        Returns:
            `states` [B, K, H], and `repr_mask` where some do not exist.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.backbone.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        dtype: torch.dtype = self.backbone.dtype
        return dtype

    @property
    def lm_head(self) -> Any:
        """The backbone's output head, [V, H]."""
        return self.backbone.lm_head

    @property
    def texts(self) -> FramedTokenizer:
        """The rules of tokenisation, following the config."""
        settings = self.config.to_dict()
        if self._texts is None or self._texts[0] != settings or self._texts[1].tokenizer is not self.tokenizer:
            self.config.check()
            self._texts = (settings, self._make_texts())
        return self._texts[1]

    # ---------------------------------------------------------------------------------------------- texts to vectors

    def tokenize(self, texts: Sequence[str], is_query: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and attention mask of texts, int64 [B, L] each, left-padded, on the CPU.

        Args:
            texts: one or more strings; special-token strings in them stay plain text.
            is_query: True for queries, False for passages.

        Raises:
            TypeError, ValueError: `texts` is not a list of strings, or is empty.
        """
        return self.texts.pad(self.texts.tokenize(check_texts(texts), check_side(is_query)))

    @torch.no_grad()
    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_query: bool = False,
        compute_sparse: bool = False,
        sparse_top_k: int | None = None,
        content_token_ids: Sequence[Sequence[int]] | None = None,
        content_filter: bool = True,
    ) -> BaselineOutput:
        """Encode one batch, without dropout.

        Args:
            input_ids: int64 [B, L] from `tokenize`, padded on either side.
            attention_mask: [B, L], 1 for real tokens; None when no row is padded.
            is_query: the side that `tokenize` was told.
            compute_sparse: also return the sparse vectors, where the method has them.
            sparse_top_k: T, weights kept a text; None is the config's.
            content_token_ids: one list of ids a text, its sparse vocabulary; None derives it from `input_ids`.
            content_filter: False lets the whole vocabulary in.

        Returns:
            `repr_hidden` float32 [B, K, H] (L2-normalised unless the config says not), `repr_mask` bool [B, K] where
            texts may have fewer vectors, and with `compute_sparse` `sparse_indices` int64 and `sparse_values` float32,
            both [B, T].

        Raises:
            ValueError: the ids are not this side's, sizes do not match, an output is not finite, or sparse vectors are
                asked of a method that has none.
        """
        is_query = check_side(is_query)
        host_ids, host_mask = check_ids(input_ids, attention_mask)
        if content_token_ids is not None and not content_filter:
            raise ValueError("content_filter=False lets the whole vocabulary in; leave `content_token_ids` out.")
        _, text_ids = self.texts.locate(host_ids, host_mask, is_query)
        content = None
        if compute_sparse and content_filter:
            content = self.texts.content_lists(text_ids) if content_token_ids is None else content_token_ids
            if len(content) != len(host_ids):
                raise ValueError(f"content_token_ids has {len(content)} lists for {len(host_ids)} texts.")
        rows = [row[real].tolist() for row, real in zip(host_ids, host_mask != 0, strict=True)]
        return self._encode(rows, is_query, content, compute_sparse, sparse_top_k)

    @torch.no_grad()
    def encode_prepared(
        self,
        prepared: Sequence[PreparedText],
        is_query: bool,
        compute_sparse: bool | None = None,
        sparse_top_k: int | None = None,
    ) -> BaselineOutput:
        """Encode what `texts.prepare` returned as one batch.

        Args:
            prepared: B texts, all with their content words or all without.
            is_query: the side that they were prepared for.
            compute_sparse: None asks for sparse vectors where the method has them.
            sparse_top_k: as for `encode`.

        Returns:
            As `encode`.

        Raises:
            ValueError: as `encode`.
        """
        sparse = self.config.has_sparse if compute_sparse is None else compute_sparse
        content = None if prepared[0].content is None else [text.content or [] for text in prepared]
        return self._encode([text.sequence for text in prepared], is_query, content, sparse, sparse_top_k)

    def _encode(
        self,
        rows: Sequence[Sequence[int]],
        is_query: bool,
        content: Sequence[Sequence[int]] | None,
        compute_sparse: bool,
        sparse_top_k: int | None,
    ) -> BaselineOutput:
        """Encode B unpadded sequences; `content` None lets the whole vocabulary into the sparse vectors."""
        if compute_sparse and not self.config.has_sparse:
            raise ValueError(f"{type(self).__name__} has no sparse vectors; leave compute_sparse out.")
        ids, mask = (tensor.to(self.device) for tensor in self.texts.pad(rows))  # int64 [B, L], left-padded
        with in_eval_mode(self):
            states, exists = self._read(ids, mask, is_query)  # [B, K, H]; bool [B, K] or None
        vectors = states.float()
        output = BaselineOutput(repr_hidden=F.normalize(vectors, dim=-1) if self.config.normalize else vectors)
        output.on_side(is_query)
        if exists is not None:
            output["repr_mask"] = exists
        if compute_sparse:
            top_k = self.config.sparse_top_k if sparse_top_k is None else sparse_top_k
            top_k = min(check_count("sparse_top_k", top_k), self.config.vocab_size)
            output["sparse_indices"], output["sparse_values"] = self._sparse(states, exists, content, top_k)
        check_output(self, output)
        return output

    def _read(self, ids: torch.Tensor, mask: torch.Tensor, is_query: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `states` and `repr_mask` of a left-padded batch, without gradient."""
        output = self(ids, mask, is_query)
        return output.states, output.repr_mask

    def _sparse(
        self, states: torch.Tensor, exists: torch.Tensor | None, content: Sequence[Sequence[int]] | None, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return indices and values [B, T] of log1p(relu(max over the vectors that exist)) (paper Eq. 3)."""
        if exists is not None:  # the first vector always exists, and a maximum does not mind it twice
            states = torch.where(exists[..., None], states, states[:, :1])
        columns = None if content is None else content_columns(content, self.config.vocab_size, None)
        return sparse_vectors(self.lm_head, states, columns, top_k, None)

    def encode_texts(
        self,
        texts: Iterable[str],
        is_query: bool,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        compute_sparse: bool | None = None,
        sparse_top_k: int | None = None,
        content_filter: bool = True,
        tokens_per_batch: int | None = None,
    ) -> BaselineOutput:
        """Encode any number of texts, in batches of similar length; on a CPU several batches run side by side.

        Args:
            texts: a list, or any iterator of strings; an iterator is read a window at a time.
            is_query: True for queries, False for passages.
            batch_size: at most so many texts a batch; None leaves it to the token budget.
            show_progress_bar: draw one, in texts.
            compute_sparse: None asks for sparse vectors where the method has them.
            sparse_top_k, content_filter: as for `encode`.
            tokens_per_batch: at most so many tokens a batch, padding included and generated words not; None is 16,384
                on an accelerator and 1,024 on a CPU.

        Returns:
            As `encode`, for all texts in their order, on the CPU.

        Raises:
            TypeError, ValueError: as `tokenize` and `encode`; an entry's number counts from 0.
        """
        sparse = self.config.has_sparse if compute_sparse is None else compute_sparse
        options: Any = {"compute_sparse": sparse, "sparse_top_k": sparse_top_k, "content_filter": content_filter}
        found = encode_in_order(self, texts, is_query, batch_size, tokens_per_batch, show_progress_bar, **options)
        output = BaselineOutput(**found)
        output.on_side(is_query)
        return output

    def encode_batches(
        self,
        prepared: Sequence[PreparedText],
        batches: Sequence[Sequence[int]],
        is_query: bool,
        compute_sparse: bool | None = None,
        sparse_top_k: int | None = None,
    ) -> Generator[tuple[Sequence[int], BaselineOutput], None, None]:
        """Encode batches of what `texts.prepare` returned: on a CPU several at a time.

        Args:
            prepared: texts, all with their content words or all without.
            batches: the rows of each.
            is_query, compute_sparse, sparse_top_k: as for `encode_prepared`.

        Yields:
            Each batch and its vectors, in the batches' order.
        """

        def work(rows: Sequence[int]) -> BaselineOutput:
            return self.encode_prepared([prepared[row] for row in rows], is_query, compute_sparse, sparse_top_k)

        with in_eval_mode(self):  # for all threads together: none may switch dropout on while another encodes
            yield from run_side_by_side(work, batches, count_workers(self.backbone))

    def score(
        self,
        queries: Mapping[str, Any],
        passages: Mapping[str, Any],
        mode: str = "multi_dense",
        fusion_weight: float | None = None,
    ) -> torch.Tensor:
        """Score every query against every passage, float32 [Q, P], as `scoring.score`; no `fusion_weight` is half.

        Vectors that do not exist are left out of means and of MaxSim.
        """
        if mode in SCORING_MODES and mode not in DENSE_ONLY_MODES and not self.config.has_sparse:
            known = " and ".join(DENSE_ONLY_MODES)
            raise ValueError(f"{type(self).__name__} has no sparse vectors for mode {mode!r}; its modes are {known}.")
        return score(queries, passages, mode, fusion_weight_of(self.config, fusion_weight))

    # ---------------------------------------------------------------------------------------------- save

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `load_baseline` loads without backbone or adapter: merged weights, tokenizer, settings.

        Args:
            folder: made if it is not there; appears whole or not at all.

        Raises:
            FileExistsError: the folder holds something.
            ValueError: the weights are quantised or offloaded.
        """
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(f"{folder} is there already; save_pretrained writes into a new or empty folder.")
        if getattr(self.backbone, "hf_quantizer", None) is not None or any(w.is_meta for w in self.parameters()):
            raise ValueError("Quantised or offloaded weights cannot be saved merged; load the model without.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".save-") as scratch:
            made = Path(scratch) / folder.name
            made.mkdir()
            self._save_backbone(made)
            save_tokenizer(self.tokenizer, made)
            own: dict[str, Any] = dict.fromkeys(("base_model_revision", "adapter_name_or_path", "merge_adapter"))
            replace(self.config, base_model_name_or_path=".", **own).save(made)
            publish_folder(made, folder)

    def _save_backbone(self, folder: Path) -> None:
        self.backbone.save_pretrained(folder, state_dict=merged_state(self.backbone))


def opening_ids(texts: FramedTokenizer) -> list[int]:
    """Return what the tokenizer puts before a text of its own accord: Llama-3's begin-of-text, nothing for Qwen2."""
    with_specials = texts.tokenizer("a")["input_ids"]
    without = texts.tokenizer("a", add_special_tokens=False)["input_ids"]
    return with_specials[: with_specials.index(without[0])]
