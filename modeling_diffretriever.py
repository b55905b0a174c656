"""DiffRetriever: a diffusion language model as a retriever, in one bidirectional forward pass (arXiv:2605.07210)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .adapter_loading import (
    ADAPTER_FIELDS,
    RETRIEVER_FIELDS,
    RETRIEVER_FILE,
    Adapter,
    find_adapter_files,
    merged_state,
    read_recorded,
)
from .backbone_loading import (
    NAME_PATTERNS,
    audit_weights,
    check_finite,
    check_output,
    choose_dtype,
    dtype_argument,
    find_weights,
    load_tokenizer,
    one_at_a_time,
    original_name,
    our_name,
    resolve_folder,
    save_tokenizer,
)
from .batching import (
    DiffRetrieverOutput,
    check_count,
    check_id_tensor,
    check_ids,
    check_side,
    check_texts,
    count_workers,
    encode_in_order,
    existing_masks,
    find_masks,
    in_eval_mode,
    run_ahead,
    run_side_by_side,
)
from .bidirectional_layers import build_backbone, linear_shapes, parameter_shapes
from .chat_template import render_prompt, render_prompts
from .checked_files import (
    check_fields,
    for_transformers,
    has_weights,
    read_backbone_config,
    read_headers,
    read_json,
    read_tensors,
)
from .configuration_diffretriever import DIFFUSION_TYPES, FIELDS, DiffRetrieverConfig, LoadedFrom
from .device_copies import HostBatch, Packed, runs_apart
from .optimized_layers import BidirectionalLayers
from .release_code import load_other, other_code
from .saved_folder import all_of_it, copy_files, replacing, sentence_transformers_files, whole_state
from .scoring import fusion_weight_of, score
from .sparse_head import content_columns, vectors_of
from .tokenization_helpers import PreparedText, RetrievalTokenizer, find_mask_id, name_mask_token

RELEASE_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "adapter/*", "*.py"]
ADAPTER_FILES = ["*.json", "*.safetensors", "*.jinja"]
HUB_OPTIONS = ("cache_dir", "token", "local_files_only", "force_download")


class DiffRetriever(BidirectionalLayers, PreTrainedModel):
    """A backbone with its adapter, read at K [MASK] tokens after a retrieval prompt.

    Load it with `AutoModel.from_pretrained(repo_or_dir, trust_remote_code=True)`.

    Attributes:
        backbone: transformers' LlamaModel or Qwen2Model, without the causal mask.
        lm_head: the output head, Linear [V, H].
        tokenizer: the backbone's fast tokenizer.
        loaded_from: the folders that `from_pretrained` took it from; None for a model that was made otherwise.
    """

    config_class = DiffRetrieverConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "Qwen2DecoderLayer"]
    _keys_to_ignore_on_load_missing = ["lm_head.weight"]  # of a tied backbone; `audit_weights` looked at the others'
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True

    def __init__(self, config: DiffRetrieverConfig) -> None:
        super().__init__(config)
        if config.backbone_config is None or config.backbone_type is None:
            raise ValueError("This config does not hold its backbone's config; load the model with from_pretrained.")
        backbone_config = config.backbone_config
        backbone_config._attn_implementation = config._attn_implementation
        self.backbone: Any = build_backbone(config.backbone_type, backbone_config)
        self.lm_head = nn.Linear(backbone_config.hidden_size, backbone_config.vocab_size, bias=False)
        self.tokenizer: Any = None
        self.loaded_from: LoadedFrom | None = None
        self._texts: tuple[str, RetrievalTokenizer] | None = None
        self.post_init()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Let the head of a tied backbone be its embedding; transformers calls this when the weights are loaded."""
        super().tie_weights(*args, **kwargs)
        if self.config.backbone_config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head, [V, H]."""
        return self.lm_head

    # ---------------------------------------------------------------------------------------------- load and save

    @classmethod
    @one_at_a_time
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a release: backbone, adapter, tokenizer, prompts. Usually called through `AutoModel`.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a release, or of what `save_pretrained` wrote.
            kwargs: any field of `DiffRetrieverConfig`, and what `PreTrainedModel.from_pretrained` takes (dtype,
                device_map, attn_implementation, quantization_config, revision, token, cache_dir, local_files_only).
                `dtype` defaults to bfloat16 where the model will run on an accelerator or a CPU with AMX or
                AVX512_BF16, else float32; "auto" is the checkpoint's own.

        Returns:
            The model in eval mode; with `output_loading_info=True` also transformers' report.

        Raises:
            FileNotFoundError, ValueError: a file is missing, broken or does not fit; the message names file and key.
        """
        given, trusted = dict(kwargs), kwargs.pop("trust_remote_code", None) is True
        hub = {name: value for name in HUB_OPTIONS if (value := kwargs.pop(name, None)) is not None}
        revision, config, _ = (kwargs.pop(name, None) for name in ("revision", "config", "adapter_kwargs"))
        want_report = kwargs.pop("output_loading_info", False)
        if kwargs.pop("subfolder", None):
            raise ValueError("`subfolder` is not read: a release lies at the top of its folder; pass that folder.")
        folder = resolve_folder(str(pretrained_model_name_or_path), None, revision, hub, RELEASE_FILES)
        if differing := other_code(folder):
            return load_other(folder, differing, trusted, given)
        overrides = {name: kwargs.pop(name) for name in FIELDS & kwargs.keys()}
        config = DiffRetrieverConfig.to_load(folder, config, overrides)
        merged = has_weights(folder)
        weights = find_weights(config, folder, merged, hub)
        if not merged:
            config.backbone_type, config.backbone_config = read_backbone_config(weights, config.backbone_type)
        names_of = None if merged else config.backbone_type
        shapes = parameter_shapes(config.backbone_type, config.backbone_config)
        stored_dtype = audit_weights(weights, read_headers(weights), names_of, shapes)
        tokenizer = load_tokenizer([folder, weights], config.vocab_size)
        adapter = _read_adapter(config, folder, hub, tokenizer, shapes)
        name_mask_token(tokenizer, config.mask_token, config.backbone_type in DIFFUSION_TYPES)
        if names_of is not None:
            kwargs["key_mapping"] = NAME_PATTERNS[names_of]
        kwargs[dtype_argument()] = choose_dtype(kwargs, stored_dtype)
        kwargs.update(config=config, output_loading_info=True, use_safetensors=True)
        with for_transformers(weights) as place:
            loaded: Any = super().from_pretrained(place, *args, **kwargs)
        model, report = loaded
        if problems := {name: found for name in ("missing_keys", "unexpected_keys") if (found := report.get(name))}:
            raise ValueError(f"{weights}: transformers reports {problems!r:.300}; the weights are not whole.")
        model.tokenizer = tokenizer
        model.loaded_from = LoadedFrom(folder, weights, getattr(adapter, "folder", None), Path(tokenizer.name_or_path))
        _ = model.texts  # a tokenizer that cannot build the prompts is refused now, not at the first text
        if adapter is not None:
            adapter.add_to(model, model.config.merge_adapter)
        check_finite(model, weights, partial(original_name, names_of) if names_of else str)
        model.config.name_or_path = str(pretrained_model_name_or_path)
        return (model.eval(), report) if want_report else model.eval()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a folder that loads without backbone or adapter: merged weights, tokenizer, config and code.

        Args:
            save_directory: made if it is not there. An earlier save in it is replaced at once, when all is written.
            kwargs: as `PreTrainedModel.save_pretrained` takes them.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            ValueError: the weights cannot be merged (quantised or offloaded), are to be pickled, or would not load
                again; or the folder holds another model, which is not overwritten.
        """
        if getattr(self, "hf_quantizer", None) is not None or any(weight.is_meta for weight in self.parameters()):
            raise ValueError("Quantised or offloaded weights cannot be saved merged; load the model without.")
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes a folder only; call model.push_to_hub(repo_id) to upload one.")
        if kwargs.get("variant") is not None or not kwargs.get("safe_serialization", True):
            raise ValueError("save_pretrained writes model.safetensors; leave out variant and safe_serialization.")
        if not kwargs.get("is_main_process", True):  # the others' weights are the main process's
            return
        config = self.config.merged()
        shapes = parameter_shapes(config.backbone_type, config.backbone_config)
        kwargs["state_dict"] = whole_state(kwargs.get("state_dict") or merged_state(self), shapes)
        kwargs["save_original_format"] = False  # transformers 5 would give the weights the backbone's names again
        with replacing(Path(save_directory)) as folder, all_of_it(self):
            super().save_pretrained(folder, *args, **kwargs)
            if self.tokenizer is not None:
                save_tokenizer(self.tokenizer, folder)
            config.save_pretrained(folder)
            copy_files(map(Path, (__file__, *get_relative_import_files(__file__))), folder)
            if self.loaded_from is not None:
                copy_files(sentence_transformers_files(self.loaded_from.release, Path(save_directory)), folder)

    # ---------------------------------------------------------------------------------------------- forward pass

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_query: bool = False,
        mask_positions: torch.Tensor | None = None,
    ) -> DiffRetrieverOutput:
        """Run the backbone once and return the final states at the masks, with gradient.

        Args:
            input_ids: int64 [B, L] from `tokenize`.
            attention_mask: [B, L], 1 for real tokens; None when no row is padded.
            is_query: which side's K masks each row has.
            mask_positions: int64 [B, K]; None finds the K masks of each row.

        Returns:
            An output with `mask_hidden` [B, K, H].
        """
        check_id_tensor(input_ids)
        if mask_positions is None:
            mask_positions = find_masks(input_ids, self.texts.mask_id, self.config.budgets(check_side(is_query)))
        return DiffRetrieverOutput(mask_hidden=self.states_at(input_ids, attention_mask, mask_positions))

    # ---------------------------------------------------------------------------------------------- texts to vectors

    @property
    def texts(self) -> RetrievalTokenizer:
        """The prompt and tokenisation rules, following the config's budgets, prompts and lengths."""
        if self.tokenizer is None:
            raise ValueError("The model has no tokenizer; load it with from_pretrained, or set model.tokenizer.")
        config, settings = self.config, self.config.text_settings()
        if self._texts is None or self._texts[0] != settings or self._texts[1].tokenizer is not self.tokenizer:
            config.check()
            self._texts = (settings, RetrievalTokenizer(self.tokenizer, config, render_prompts(self.tokenizer, config)))
        return self._texts[1]

    def tokenize(self, texts: Sequence[str], is_query: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Wrap texts in the retrieval prompt with K masks (paper Eq. 1).

        Args:
            texts: one or more strings; special-token strings in them stay plain text.
            is_query: True for queries, False for passages.

        Returns:
            ids and attention mask, int64 [B, L] each, left-padded, on the CPU.

        Raises:
            TypeError, ValueError: `texts` is not a list of strings, or is empty.
        """
        return self.texts.pad(self.texts.tokenize(check_texts(texts), check_side(is_query)))

    def content_token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the sorted ids of each text's content words, the vocabulary of its sparse vector (paper §3.3)."""
        return [self.texts.content_ids(text) for text in check_texts(texts)]

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
    ) -> DiffRetrieverOutput:
        """Encode one batch in one forward pass (more with `num_denoise_steps` > 1).

        Args:
            input_ids: int64 [B, L] from `tokenize`, padded on either side.
            attention_mask: [B, L], 1 for real tokens; None when no row is padded.
            is_query: the side that `tokenize` was told.
            compute_sparse: also return the sparse vectors.
            sparse_top_k: T, weights kept a text; None is the config's.
            content_token_ids: one list of ids a text, its sparse vocabulary; None derives it from `input_ids`.
            content_filter: False lets the whole vocabulary in.

        Returns:
            `repr_hidden` float32 [B, K, H] (L2-normalised unless the config says not), `repr_mask` bool [B, K] for
            queries of a release with `query_budget_table`, and with `compute_sparse` `sparse_indices` int64 and
            `sparse_values` float32, both [B, T] (paper Eq. 2 and 3).

        Raises:
            ValueError: the ids are not this side's, sizes do not match, or an output is not finite.
        """
        is_query = check_side(is_query)
        host_ids, host_mask = check_ids(input_ids, attention_mask)
        if content_token_ids is not None and not content_filter:
            raise ValueError("content_filter=False lets the whole vocabulary in; leave `content_token_ids` out.")
        positions, text_ids = self.texts.locate(host_ids, host_mask, is_query)
        content = None
        if compute_sparse and content_filter:
            content = self.texts.content_lists(text_ids) if content_token_ids is None else content_token_ids
            if len(content) != len(host_ids):
                raise ValueError(f"content_token_ids has {len(content)} lists for {len(host_ids)} texts.")
        batch = self._pack(host_ids.long(), host_mask, positions, content, is_query)
        return self._output(self._launch(batch, compute_sparse, sparse_top_k), is_query)

    @torch.no_grad()
    def encode_prepared(
        self,
        prepared: Sequence[PreparedText],
        is_query: bool,
        compute_sparse: bool = True,
        sparse_top_k: int | None = None,
    ) -> DiffRetrieverOutput:
        """Encode what `texts.prepare` returned as one batch; neither masks nor content words are looked for again.

        Args:
            prepared: B texts, all with their content words or all without.
            is_query: the side that they were prepared for.
            compute_sparse, sparse_top_k: as for `encode`.

        Returns:
            As `encode`.

        Raises:
            ValueError: an output is not finite.
        """
        batch = self._pack_prepared(prepared, is_query, compute_sparse)
        return self._output(self._launch(batch, compute_sparse, sparse_top_k), is_query)

    @torch.no_grad()
    def encode_batches(
        self,
        prepared: Sequence[PreparedText],
        batches: Sequence[Sequence[int]],
        is_query: bool,
        compute_sparse: bool = True,
        sparse_top_k: int | None = None,
    ) -> Generator[tuple[Sequence[int], DiffRetrieverOutput], None, None]:
        """Encode batches of what `texts.prepare` returned: on a CPU several at a time, on a GPU without ever waiting.

        Args:
            prepared: texts, all with their content words or all without.
            batches: the rows of each.
            is_query, compute_sparse, sparse_top_k: as for `encode_prepared`.

        Yields:
            Each batch and its vectors, on the CPU, in the batches' order.

        Raises:
            ValueError: as `encode_prepared`, behind the vectors of the batches before.
        """

        def texts_of(rows: Sequence[int]) -> list[PreparedText]:
            return [prepared[row] for row in rows]

        options = (is_query, compute_sparse, sparse_top_k)
        if not runs_apart(self.device):
            work: Callable[[Any], Any] = lambda rows: self.encode_prepared(texts_of(rows), *options)  # noqa: E731
            yield from run_side_by_side(work, batches, count_workers(self) if len(batches) > 1 else 1)
            return
        pack: Callable[[Any], HostBatch] = lambda rows: self._pack_prepared(texts_of(rows), *options[:2]).pinned()  # noqa: E731
        for rows, output in run_ahead(pack, lambda batch: self._launch(batch, *options[1:]), batches):
            yield rows, self._output(output, is_query)

    def _pack_prepared(self, prepared: Sequence[PreparedText], is_query: bool, compute_sparse: bool) -> HostBatch:
        ids, mask = self.texts.pad([text.sequence for text in prepared])  # int64 [B, L] each
        filtered = compute_sparse and prepared[0].content is not None
        content = [text.content or [] for text in prepared] if filtered else None
        return self._pack(ids, mask, self.texts.mask_positions(ids, is_query), content, is_query)

    def _pack(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        content: Sequence[Sequence[int]] | None,
        is_query: bool,
    ) -> HostBatch:
        """Put together what `_launch` needs of ids [B, L], their mask [B, L] and the masks' positions [B, K]."""
        columns = allowed = None
        if content is not None:
            columns, allowed = content_columns(content, self.lm_head.out_features, self.texts.mask_id)
        exists = existing_masks(positions) if is_query and self.config.query_budget_table is not None else None
        return HostBatch(ids, None if mask.all() else (mask != 0).long(), positions, exists, columns, allowed)

    def _launch(self, batch: HostBatch, compute_sparse: bool, sparse_top_k: int | None) -> dict[str, torch.Tensor]:
        """Encode a batch on the model's device; nothing here waits for it, nor looks at what it computes."""
        top_k = self.config.sparse_top_k if sparse_top_k is None else sparse_top_k
        top_k = min(check_count("sparse_top_k", top_k), self.config.vocab_size)
        if self._recorded is not None and self._recorded.takes(batch):
            return self._recorded(batch, top_k if compute_sparse else None)
        with in_eval_mode(self):
            return vectors_of(self, batch.on(self.device), top_k if compute_sparse else None)

    def _output(self, found: dict[str, torch.Tensor], is_query: bool) -> DiffRetrieverOutput:
        """Check what `_launch` found, and wrap it."""
        if isinstance(found, Packed):  # each by itself again, as one that is saved or kept should be
            found = {name: values.clone() for name, values in found.items()}
        return DiffRetrieverOutput(**check_output(self, found)).on_side(is_query)

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
    ) -> DiffRetrieverOutput:
        """Encode any number of texts, in batches of similar length; see `encode_batches`.

        Args:
            texts: a list, tuple, numpy array, pandas Series, column of a dataset, or any iterator of strings, which is
                read a window at a time.
            is_query: True for queries, False for passages.
            batch_size: at most so many texts a batch; None leaves it to the token budget.
            show_progress_bar: draw one, in texts.
            compute_sparse, sparse_top_k, content_filter: as for `encode`.
            tokens_per_batch: at most so many tokens a batch, padding included; None is 16,384 on an accelerator and
                1,024 on a CPU, whose caches hold no more.

        Returns:
            As `encode`, for all texts in their order, on the CPU.

        Raises:
            TypeError, ValueError: as `tokenize` and `encode`; an entry's number counts from 0. More or fewer texts than
                their `len`.
        """
        options: Any = {"compute_sparse": compute_sparse, "sparse_top_k": sparse_top_k}
        options["content_filter"] = content_filter
        found = encode_in_order(self, texts, is_query, batch_size, tokens_per_batch, show_progress_bar, **options)
        return DiffRetrieverOutput(**found).on_side(is_query)

    def score(
        self,
        queries: Mapping[str, Any],
        passages: Mapping[str, Any],
        mode: str = "multi_dense",
        fusion_weight: float | None = None,
    ) -> torch.Tensor:
        """Score every query against every passage, float32 [Q, P], as `scoring.score`; None is the release's weight."""
        return score(queries, passages, mode, fusion_weight_of(self.config, fusion_weight))


def _read_adapter(
    config: Any, folder: Path, hub: dict[str, Any], tokenizer: Any, shapes: dict[str, tuple[int, ...]]
) -> Adapter | None:
    """Read the adapter; one that the caller chose brings its own budgets and prompts."""
    if config.adapter_name_or_path is None:
        return None
    kind = config.backbone_type
    chosen = "adapter_name_or_path" in config.overrides
    place = resolve_folder(str(config.adapter_name_or_path), None if chosen else folder, None, hub, ADAPTER_FILES)
    if chosen and (place / RETRIEVER_FILE).is_file():
        config.adopt(read_settings(place / RETRIEVER_FILE, tokenizer), place / RETRIEVER_FILE)
    embedding = None if kind in DIFFUSION_TYPES else shapes["backbone.embed_tokens.weight"]
    return read_adapter(place, linear_shapes(shapes), partial(our_name, kind), partial(original_name, kind), embedding)


def read_settings(file: Path, tokenizer: Any) -> dict[str, Any]:
    """Read the fields of `DiffRetrieverConfig` that an adapter was trained with, as `read_recorded` returns them."""
    fields = read_json(file)
    check_fields(f"{file}: ", fields, RETRIEVER_FIELDS)
    if fields.get("mask_token") is not None:
        name_mask_token(tokenizer, fields["mask_token"], fields["model_type"] in ("llada1", *DIFFUSION_TYPES))
    return read_recorded(file, fields, tokenizer, find_mask_id(tokenizer, fields.get("mask_token")), render_prompt)


def read_adapter(
    folder: Path,
    layers: dict[str, tuple[int, int]],
    our_name: Callable[[str], str],
    original_name: Callable[[str], str],
    embedding: tuple[int, ...] | None = None,
) -> Adapter:
    """Read an adapter and check that it fits.

    Args:
        folder: of the adapter.
        layers, our_name, original_name: the linear layers' shapes and their names, as for `Adapter`.
        embedding: as for `Adapter`: of a Llama or Qwen2, whose [MASK] may have a row of the adapter's.

    Raises:
        FileNotFoundError, ValueError: a file is missing or broken, or the adapter does not fit.
    """
    config_file, weights_file = find_adapter_files(folder)
    fields, tensors = read_json(config_file, ADAPTER_FIELDS), read_tensors(weights_file)
    return Adapter(folder, fields, tensors, layers, our_name, original_name, embedding)
