"""Autoregressive backbones: Llama and Qwen2 as transformers has them, under the causal mask."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from ..model.backbone_loading import (
    audit_weights,
    check_finite,
    check_no_adapter,
    choose_dtype,
    dtype_argument,
)
from ..model.checked_files import for_transformers, read_backbone_config, read_headers, read_json
from ..model.modeling_diffretriever import read_adapter

CAUSAL: dict[str, Any] = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}
DIFFUSION = ("llada", "dream", "diffretriever")  # model types of what DiffRetriever reads, and of its releases
# transformers 5.2x renamed the argument; the old name works on with a warning at every call.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def model_type(folder: Path) -> str:
    """Return what a backbone's config.json says it is, in lowercase."""
    return str(read_json(folder / "config.json").get("model_type", "")).lower()


def load_causal(folder: Path, method: str, adapter_folder: Path | None, merge: bool | None, **kwargs: Any) -> Any:
    """Load a causal language model from its safetensors files, with its adapter.

    Args:
        folder: config.json and weights of a Llama or Qwen2, its head tied or not.
        method: who asks, for messages.
        adapter_folder: a LoRA adapter in peft's own format, under the model's own names.
        merge: as for `Adapter.add_to`.
        kwargs: for transformers' `from_pretrained`; `dtype` as for DiffRetriever.

    Returns:
        LlamaForCausalLM or Qwen2ForCausalLM, in eval mode.

    Raises:
        FileNotFoundError, ValueError: another kind of model, weights that are missing or broken, or an adapter that
            does not fit; the message names file and key.
    """
    kind = model_type(folder)
    if kind not in CAUSAL:
        what = "a diffusion backbone, read without the causal mask" if kind in DIFFUSION else "no causal language model"
        raise ValueError(
            f"{folder / 'config.json'}: model_type {kind!r:.80} is {what} that {method} could read; it needs one of "
            f"{', '.join(CAUSAL)}."
        )
    check_no_adapter(folder)
    config = read_backbone_config(folder, kind)[1]
    with torch.device("meta"):
        skeleton = CAUSAL[kind](config)
    kwargs[dtype_argument()] = choose_dtype(kwargs, _audit(folder, skeleton))
    kwargs.update(config=config, output_loading_info=True, use_safetensors=True)
    with for_transformers(folder) as place:
        model, report = CAUSAL[kind].from_pretrained(place, **kwargs)
    if report["missing_keys"]:
        raise ValueError(f"{folder}: transformers left out {sorted(report['missing_keys'])[:5]}.")
    if adapter_folder is not None:
        _add_adapter(model, adapter_folder, merge, skeleton)
    check_finite(model, folder, str)
    return model.eval()


def _audit(folder: Path, skeleton: PreTrainedModel) -> str:
    """Check names and shapes of the weights against the config, and return their dtype as `audit_weights` does."""
    expected = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters(remove_duplicate=False)}
    headers = read_headers(folder)
    if skeleton.config.tie_word_embeddings and "lm_head.weight" not in headers:
        expected.pop("lm_head.weight", None)
    for name, (_, entry) in headers.items():
        if name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold what transformers computes
            expected[name] = tuple(entry["shape"])
    return audit_weights(folder, headers, None, expected)


def _add_adapter(model: Any, folder: Path, merge: bool | None, skeleton: nn.Module) -> None:
    linear = {name: layer for name, layer in skeleton.named_modules() if isinstance(layer, nn.Linear)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in linear.items()}
    adapter = read_adapter(folder, shapes, str, str)
    head = model.lm_head
    if "lm_head" in adapter.modules and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())  # the adapter is the head's, not the embedding's
        model.config.tie_word_embeddings = False
    adapter.add_to(model, merge)


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Number each row's tokens from 0, wherever its padding is: mask [B, L] -> int64 [B, L]."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def final_states(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None = None, cache: Any = None
) -> torch.Tensor:
    """Return the last layer's states after the final norm, with gradient.

    Args:
        model: from `load_causal`.
        ids: int64 [B, N], the tokens that the cache does not hold.
        mask: int64 [B, C + N], 1 for real tokens, over what the cache holds (C) and the new tokens.
        positions: int64 [B, N]; None counts the mask's ones.
        cache: transformers' DynamicCache, which then holds the new tokens, too.

    Returns:
        [B, N, H] in the model's dtype.
    """
    kwargs = {} if cache is None else {CACHE_ARGUMENT: cache}
    positions = position_ids(mask) if positions is None else positions
    seen = attention_mask(mask, ids.shape[1], model.config._attn_implementation)
    states: torch.Tensor = model.model(
        input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=cache is not None, **kwargs
    ).last_hidden_state
    return states


def attention_mask(mask: torch.Tensor, new: int, implementation: str) -> torch.Tensor:
    """Return what each new token sees: the real tokens up to itself; padding sees itself.

    Padding that saw nothing would have no softmax: on GPUs cuDNN's attention then leaves what was in memory, now and
    then a NaN, which the next layer's keys carry into the gradients of all.

    Args:
        mask: int64 [B, C + N], 1 for real tokens.
        new: N, how many of them are new, the last ones.
        implementation: of the attention.

    Returns:
        [B, 1, N, C + N]: bool for "sdpa", float32 to be added for "eager"; the mask itself for others, which take no
        such mask and cut padding out.
    """
    if implementation not in ("sdpa", "eager"):
        return mask
    columns = torch.arange(mask.shape[1], device=mask.device)
    rows = columns[-new:, None]
    seen = ((columns <= rows) & (mask[:, None] != 0)) | (columns == rows)  # [B, N, C + N]
    if implementation == "sdpa":
        return seen[:, None]
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
