"""Backbones quantised by bitsandbytes while they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_folders import ADAPTERS, KINDS, TEXTS
from transformers import AutoModel

bitsandbytes = pytest.importorskip("bitsandbytes")


def load(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)


def dequantised(layer: Any) -> torch.Tensor | None:
    """Return the weight that a quantised layer stands for; None of any other layer."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return layer.weight.CB.float() * layer.weight.SCB[:, None] / 127  # int8 and each row's largest weight
    return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "least"), [(4, 0.999), (8, 0.997)])  # 8 bits round the hidden states, too
def test_vectors_are_those_of_the_rounded_weights(
    kind: str, bits: int, least: float, build_release: Callable[..., Path]
) -> None:
    folder = build_release(f"tiny-{kind}", ADAPTERS[kind])
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    options = {"quantization_config": config, "device_map": {"": "cpu"}}
    model, rounded = load(folder, **options), load(folder, merge_adapter=False)
    assert hasattr(model.backbone.layers[0].self_attn.q_proj, "lora_A")  # unmerged
    layers, count = dict(rounded.named_modules()), 0
    for name, layer in model.named_modules():
        weight = dequantised(layer)
        if weight is not None:
            layers[name].weight.data, count = weight, count + 1
    assert count == 7 * len(model.backbone.layers)
    cosine = (model.encode_texts(TEXTS, True).repr_hidden * rounded.encode_texts(TEXTS, True).repr_hidden).sum(dim=-1)
    assert cosine.min() > least
    with pytest.raises(ValueError, match="Quantised or offloaded weights cannot be saved"):
        model.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="merge_adapter=True, but the backbone is quantised"):
        load(folder, merge_adapter=True, **options)
