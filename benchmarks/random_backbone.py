"""Random backbones in LLaDA's format, for measurements that do not need trained weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).resolve().parent.parent / "tests/parity/backbones/tiny-llada"
VOCABULARY = 126_464  # LLaDA's own


@dataclass(frozen=True)
class Shape:
    """A backbone's size.

    Args:
        layers, hidden, inner, heads: numbers of layers, width, width inside the MLP, attention heads.
        vocabulary: rows of the embedding and of the head.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int = VOCABULARY

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.hidden}, MLP of {self.inner}, vocabulary of {self.vocabulary:,}"


def write_backbone(folder: Path, tokenizer: Path, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
    """Write a random backbone.

    Args:
        folder: to be made.
        tokenizer: folder of a tokenizer in LLaDA's manner, with a chat template.
        shape: its size.
        dtype: of the weights.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, inner = shape.hidden, shape.inner
    shapes: dict[str, tuple[int, ...]] = {
        "wte": (shape.vocabulary, hidden),
        "ff_out": (shape.vocabulary, hidden),
        "ln_f": (hidden,),
    }
    layer: dict[str, tuple[int, ...]] = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (hidden, hidden))
    layer |= {"ff_proj": (inner, hidden), "up_proj": (inner, hidden), "ff_out": (hidden, inner)}
    layer |= {"attn_norm": (hidden,), "ff_norm": (hidden,)}
    shapes |= {f"blocks.{number}.{name}": size for number in range(shape.layers) for name, size in layer.items()}
    state = {
        f"model.transformer.{name}.weight": torch.ones(size, dtype=dtype)
        if len(size) == 1
        else (torch.randn(size, generator=generator) * 0.02).to(dtype)
        for name, size in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((TOKENIZER / "config.json").read_text())
    config |= {"d_model": hidden, "n_layers": shape.layers, "n_heads": shape.heads, "n_kv_heads": shape.heads}
    config |= {"mlp_hidden_size": inner, "embedding_size": shape.vocabulary, "vocab_size": shape.vocabulary}
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": None}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer / file).read_bytes())
