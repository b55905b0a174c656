"""What makes transformers' causal layers bidirectional, and their last layer cheap when only the masks are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel, PreTrainedModel, Qwen2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, eager_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # torch's, on a module


class _Float32Frequencies(nn.Module):
    """Keeps RoPE's frequencies in float32 when the model is cast."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class Float32LlamaRotaryEmbedding(_Float32Frequencies, LlamaRotaryEmbedding):
    """LLaDA's rotary embedding, and Llama's."""


class Float32Qwen2RotaryEmbedding(_Float32Frequencies, Qwen2RotaryEmbedding):
    """Dream's rotary embedding, and Qwen2's."""


def build_backbone(backbone_type: str, config: Any) -> PreTrainedModel:
    """Build LLaDA as a LlamaModel or Dream as a Qwen2Model, without the causal mask; a Llama or Qwen2 as itself.

    Args:
        backbone_type: "llada", "dream", "llama" or "qwen2".
        config: the Llama or Qwen2 config, its attention implementation chosen.
    """
    backbone: Any
    if backbone_type in ("llada", "llama"):
        backbone = LlamaModel(config)
        backbone.rotary_emb = Float32LlamaRotaryEmbedding(config)
    else:
        backbone = Qwen2Model(config)
        backbone.rotary_emb = Float32Qwen2RotaryEmbedding(config)
    for layer in backbone.layers:
        layer.self_attn.is_causal = False
    return backbone


def attention_bias(
    implementation: str, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return the mask that makes the chosen attention see every real token and no padding.

    Args:
        implementation: sdpa, eager or flash_attention_2 (or _3).
        input_ids: int64 [B, L].
        attention_mask: [B, L], 1 for real tokens; None when no row is padded.
        dtype: the states' dtype.

    Returns:
        An additive mask [B, 1, 1, L] over the keys (no row can be masked whole, so no NaN), for flash attention the
        mask [B, L] itself, or None where nothing needs masking.

    Raises:
        ValueError: another implementation, whose masks nobody has tried.
    """
    if implementation.startswith("flash_attention"):
        return attention_mask
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported; use sdpa, eager or flash_attention_2."
        )
    if attention_mask is None:
        if implementation == "sdpa":
            return None
        attention_mask = torch.ones_like(input_ids)  # eager takes "no mask" for "causal"
    bias = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return bias.masked_fill(attention_mask == 0, torch.finfo(dtype).min)[:, None, None, :]


def run_layers(
    backbone: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    implementation: str,
    instead: Sequence[Callable[..., torch.Tensor]] = (),
) -> torch.Tensor:
    """Run a backbone of `build_backbone` once, with gradient.

    Args:
        backbone: the LlamaModel or Qwen2Model.
        input_ids: int64 [B, L].
        attention_mask: int64 [B, L], 1 for real tokens; None when no row is padded.
        positions: int64 [B, K], whose final states to return; None for all.
        implementation: of the attention, as for `attention_bias`.
        instead: what runs in the place of as many of the first layers.

    Returns:
        The final states, [B, K, H] or [B, L, H] in the backbone's dtype.
    """
    hidden = backbone.embed_tokens(input_ids)  # [B, L, H]
    if attention_mask is None:
        position_ids = torch.arange(input_ids.shape[1], device=hidden.device).expand(input_ids.shape)
    else:  # every text starts at 0, wherever its padding is
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # [B, L]
    rotation = backbone.rotary_emb(hidden, position_ids)  # cos, sin: [B, L, D]
    bias = attention_bias(implementation, input_ids, attention_mask, hidden.dtype)
    *layers, last = backbone.layers
    for layer in (*instead, *layers[len(instead) :]):
        hidden = layer(hidden, attention_mask=bias, position_ids=position_ids, position_embeddings=rotation)
    if positions is not None and can_trim(last, implementation):
        hidden = trimmed_layer(last, hidden, positions, rotation, bias, implementation)  # [B, K, H]
    else:
        hidden = last(hidden, attention_mask=bias, position_ids=position_ids, position_embeddings=rotation)
        hidden = hidden if positions is None else rows_at(hidden, positions)
    return backbone.norm(hidden)


def device_of(layer: nn.Module) -> torch.device:
    """Return where a layer's input belongs: where it runs, which is not where the weights of an offloaded one are."""
    place = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    weight = layer.weight if isinstance(layer, nn.Embedding) else next(layer.parameters())  # the search takes longer
    return weight.device if place is None else torch.device(place)


def can_trim(layer: Any, implementation: str) -> bool:
    """Whether `trimmed_layer` may stand in for the layer: no hooks or checkpointing to bypass, a mask over keys."""
    watched = hasattr(layer, "_hf_hook") or getattr(layer, "gradient_checkpointing", False)
    hooked = any(getattr(part, hooks) for part in (layer, layer.self_attn) for hooks in HOOKS)
    return not (watched or hooked) and implementation in ("sdpa", "eager")


def trimmed_layer(
    layer: Any,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    implementation: str,
) -> torch.Tensor:
    """Run a decoder layer for some positions only; keys and values still come from all.

    Args:
        layer: a LlamaDecoderLayer or Qwen2DecoderLayer.
        hidden: [B, L, H]; positions: int64 [B, K]; rotation: cos and sin, [B, L, D]; bias: [B, 1, 1, L] or None.
        implementation: sdpa or eager.

    Returns:
        The layer's output at the positions, [B, K, H].
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    cos, sin = rotation
    query = split_heads(attention.q_proj(rows_at(normed, positions)), attention.head_dim)  # [B, heads, K, D]
    key = split_heads(attention.k_proj(normed), attention.head_dim)  # [B, kv heads, L, D]
    value = split_heads(attention.v_proj(normed), attention.head_dim)
    query = rotate(query, rows_at(cos, positions), rows_at(sin, positions))
    key = rotate(key, cos, sin)
    mixed = attend(implementation, attention, query, key, value, bias)
    states = rows_at(hidden, positions) + attention.o_proj(mixed)
    return states + layer.mlp(layer.post_attention_layernorm(states))


def attend(
    implementation: str,
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return transformers' attention of states [B, heads, N, D], its heads side by side: [B, N, heads * D]."""
    chosen = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    dropout = attention.attention_dropout if attention.training else 0.0
    mixed, _ = chosen(attention, query, key, value, bias, dropout=dropout, scaling=attention.scaling)
    return mixed.flatten(2)


def rows_at(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick positions [B, K] out of states [B, L, N]; returns [B, K, N]."""
    positions = positions.to(states.device)
    return states.expand(len(positions), -1, -1).gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def split_heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Turn states [B, N, heads * D] into [B, heads, N, D]."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE in transformers' half-split layout; states [B, heads, N, D], cos and sin [B, N, D]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def parameter_shapes(backbone_type: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Return {our parameter name: shape} of a backbone and of its head if it has its own; nothing is allocated."""
    with torch.device("meta"):
        backbone = build_backbone(backbone_type, config)
    shapes = {f"backbone.{name}": tuple(weight.shape) for name, weight in backbone.named_parameters()}
    head = {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    return shapes | head


def linear_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Return {module name: (out, in)} of the linear layers among `parameter_shapes`, where LoRA can go."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if len(shape) == 2 and "embed_tokens" not in name
    }
