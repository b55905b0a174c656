"""A small bidirectional backbone: initial weights, and the forward passes that pretraining needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .backbone_format import Backbone, BackboneFormat, Config, make_bidirectional


def new_backbone(kind: BackboneFormat, config: Config, seed: int) -> Backbone:
    """Makes a backbone whose first attention layer pools embeddings and whose other sublayers start at zero.

    Layer 0 starts with value and output projections at the identity, so that a mask's state is the attention-
    weighted mean of the text's embeddings; every other sublayer's output projection starts at zero and leaves the
    state alone. The function computed by the whole network is then that of its first layer.

    Args:
        kind: which model it is; biases, where it has them, start at zero.
        config: from the format's `new_config` or `read_config`.
        seed: of the random weights.
    """
    torch.manual_seed(seed)
    model = make_bidirectional(kind.model_class(config))
    with torch.no_grad():
        nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
        for number, layer in enumerate(model.model.layers):
            nn.init.zeros_(layer.mlp.down_proj.weight)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                nn.init.normal_(projection.weight, std=0.5 * config.hidden_size**-0.5)
            if number == 0:
                nn.init.eye_(layer.self_attn.v_proj.weight)
                nn.init.eye_(layer.self_attn.o_proj.weight)
            else:
                nn.init.normal_(layer.self_attn.v_proj.weight, std=config.hidden_size**-0.5)
                nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Key-only additive mask [B, 1, 1, L] of a 0/1 mask [B, L]: 0 for tokens, dtype minimum for padding."""
    inverted = (1 - mask)[:, None, None, :].to(dtype)
    return inverted * torch.finfo(dtype).min


def _rope(model: Backbone, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(states.shape[1], device=states.device)[None]
    cos, sin = model.model.rotary_emb(states, positions)
    return cos, sin


def hidden_states(model: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Final hidden states at every position.

    Args:
        model: bidirectional backbone.
        ids: int64 [B, L].
        mask: 0/1 [B, L].

    Returns:
        [B, L, H], after the final norm, with gradient.
    """
    states = model.model.embed_tokens(ids)  # [B, L, H]
    rope, additive = _rope(model, states), additive_mask(mask, states.dtype)
    for layer in model.model.layers:
        states = _tensor(layer(states, attention_mask=additive, position_embeddings=rope))
    return model.model.norm(states)


def mask_states(
    model: Backbone, ids: torch.Tensor, mask: torch.Tensor, num_masks: int, num_tail: int = 3
) -> torch.Tensor:
    """Hidden states at the K masks of left-padded retrieval prompts; the last layer runs at the masks alone.

    Args:
        model: bidirectional backbone.
        ids: int64 [B, L], left-padded, each row ending in K masks and the tail.
        mask: 0/1 [B, L].
        num_masks: K.
        num_tail: tokens after the masks.

    Returns:
        [B, K, H], after the final norm, not normalised, with gradient.
    """
    layers: list[Any] = list(model.model.layers)
    states = model.model.embed_tokens(ids)  # [B, L, H]
    rope, additive = _rope(model, states), additive_mask(mask, states.dtype)
    for layer in layers[:-1]:
        states = _tensor(layer(states, attention_mask=additive, position_embeddings=rope))
    end = states.shape[1] - num_tail
    return model.model.norm(_layer_at(layers[-1], states, slice(end - num_masks, end), additive, rope))


def _layer_at(
    layer: Any, states: torch.Tensor, rows: slice, additive: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """One decoder layer whose output is computed at some positions only: [B, L, H] -> [B, len(rows), H]."""
    attention = layer.self_attn
    batch = len(states)
    normed, kept = layer.input_layernorm(states), states[:, rows]

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.view(batch, -1, projected.shape[-1] // attention.head_dim, attention.head_dim).transpose(1, 2)

    cos, sin = rope
    query = heads(attention.q_proj(normed[:, rows]))  # [B, heads, K, head_dim]
    key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))  # [B, kv heads, L, head_dim]
    query, _ = apply_rotary_pos_emb(query, query, cos[:, rows], sin[:, rows])
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    mixed = F.scaled_dot_product_attention(
        query.to(value.dtype), key.to(value.dtype), value, attn_mask=additive.to(value.dtype), enable_gqa=True
    )
    kept = kept + attention.o_proj(mixed.transpose(1, 2).reshape(batch, -1, attention.o_proj.in_features))
    return kept + layer.mlp(layer.post_attention_layernorm(kept))


def _tensor(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Older transformers return a tuple from a decoder layer."""
    return output[0] if isinstance(output, tuple) else output
