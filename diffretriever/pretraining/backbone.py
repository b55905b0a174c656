"""A new small backbone: the release's own model class, with initial weights of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..model.backbone_loading import load_tokenizer
from ..model.checked_files import read_backbone_config
from ..model.configuration_diffretriever import DiffRetrieverConfig
from ..model.modeling_diffretriever import DiffRetriever  # made anew here; what is loaded comes from AutoModel alone


def new_backbone(folder: Path, seed: int) -> DiffRetriever:
    """Make a model whose first attention layer pools embeddings and whose other sublayers start at zero.

    Layer 0 starts with value and output projections at the identity, so that a mask's state is the attention-weighted
    mean of the text's embeddings; every other sublayer's output projection starts at zero and leaves the state alone.
    The function computed by the whole network is then that of its first layer.

    Args:
        folder: a backbone's files but for the weights: config.json and tokenizer.
        seed: of the random weights.

    Returns:
        The model in float32. Biases, where its format has them, start at zero.
    """
    kind, config = read_backbone_config(folder)
    model = DiffRetriever(DiffRetrieverConfig(backbone_type=kind, backbone_config=config))
    model.tokenizer = load_tokenizer([folder])
    torch.manual_seed(seed)
    width = config.hidden_size
    nn.init.normal_(model.backbone.embed_tokens.weight, std=0.1)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    for number, layer in enumerate(model.backbone.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj):
            nn.init.normal_(projection.weight, std=0.5 * width**-0.5)
        for projection in (mlp.gate_proj, mlp.up_proj):
            nn.init.normal_(projection.weight, std=0.02)
        nn.init.zeros_(mlp.down_proj.weight)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if number == 0:
            nn.init.eye_(attention.v_proj.weight)
            nn.init.eye_(attention.o_proj.weight)
        else:
            nn.init.normal_(attention.v_proj.weight, std=width**-0.5)
            nn.init.zeros_(attention.o_proj.weight)
    return model
