"""What the on-disk formats of small backbones share: configurations, saving, loading, checks.

A format is a transformers model without its causal mask, under the names and with the files of the original
checkpoints; `llada_format` and `dream_format` say what is their own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ..training.recipe import Shape
from .tokenizer import TokenizerForm

Backbone = LlamaForCausalLM | Qwen2ForCausalLM
Config = LlamaConfig | Qwen2Config
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class BackboneFormat:
    """One original format: which transformers model it is, and how its files are written and read."""

    title: str  # for messages
    config_class: type[Any]
    model_class: type[Any]
    tokenizer: TokenizerForm
    rope_theta: float  # where a recipe's shape leaves it open
    rms_norm_eps: float  # likewise
    shift: int  # a token is predicted from the state so many positions before it
    sizes: dict[str, str]  # transformers' configuration field -> the key of the format's config.json
    original_config: Callable[[Any, dict[str, int]], dict[str, Any]]  # configuration, special ids -> config.json
    generation_config: Callable[[dict[str, int]], dict[str, Any]]  # special ids -> generation_config.json
    to_original: Callable[[str], str]  # transformers' parameter name -> the format's
    from_original: Callable[[str], str]

    def new_config(self, shape: Shape, special_ids: dict[str, int]) -> Config:
        """Returns transformers' configuration of a recipe's shape.

        Args:
            shape: sizes; every head has keys and values of its own.
            special_ids: ids of "mask", "bos" and "eos" (which pads).
        """
        return self._config(
            {
                "hidden_size": shape.d_model,
                "intermediate_size": shape.mlp_hidden_size,
                "num_attention_heads": shape.n_heads,
                "num_key_value_heads": shape.n_heads,
                "num_hidden_layers": shape.n_layers,
                "vocab_size": shape.vocab_size,
                "max_position_embeddings": shape.max_sequence_length,
                "rms_norm_eps": self.rms_norm_eps if shape.rms_norm_eps is None else shape.rms_norm_eps,
                "rope_theta": self.rope_theta if shape.rope_theta is None else shape.rope_theta,
                "eos_token_id": special_ids["eos"],
                "pad_token_id": special_ids["eos"],
            }
        )

    def read_config(self, original: dict[str, Any]) -> Config:
        """Returns transformers' configuration of the format's config.json (as a dict).

        Raises:
            KeyError: if a size is missing.
        """
        return self._config({ours: original[theirs] for ours, theirs in self.sizes.items()})

    def _config(self, fields: dict[str, Any]) -> Config:
        config: Config = self.config_class(**fields, bos_token_id=None, tie_word_embeddings=False)
        config._attn_implementation = "sdpa"
        return config

    def save(
        self,
        model: Backbone,
        tokenizer_folder: str | Path,
        folder: str | Path,
        special_ids: dict[str, int],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Writes a backbone: config.json, generation_config.json, model.safetensors, tokenizer.

        Args:
            model: what to write.
            tokenizer_folder: where tokenizer.json, tokenizer_config.json and special_tokens_map.json are.
            folder: the target; made if absent. The weights are replaced in one step, so that an interrupted
                write leaves the previous file.
            special_ids: ids of "mask", "bos" and "eos".
            dtype: of the stored weights.
        """
        folder, tokenizer_folder = Path(folder), Path(tokenizer_folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = model.state_dict().items()
        weights = {self.to_original(name): value.detach().to(dtype).contiguous() for name, value in state}
        partial = folder / "model.safetensors.partial"
        save_file(weights, str(partial), metadata={"format": "pt"})
        partial.chmod(0o644)
        os.replace(partial, folder / "model.safetensors")
        config = self.original_config(model.config, special_ids)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "generation_config.json").write_text(json.dumps(self.generation_config(special_ids)) + "\n")
        if tokenizer_folder.resolve() != folder.resolve():
            for name in TOKENIZER_FILES:
                shutil.copyfile(tokenizer_folder / name, folder / name)

    def load(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Backbone:
        """Reads a folder of this format into transformers' model, bidirectional.

        Args:
            folder: with config.json and model.safetensors.
            dtype: of the loaded weights.

        Raises:
            FileNotFoundError: if one of the two files is absent.
            ValueError: if a weight is missing, left over, or of another shape; names the keys.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: expected a backbone in {self.title} format")
        model: Any = self.model_class(self.read_config(json.loads((folder / "config.json").read_text())))
        weights = load_file(str(folder / "model.safetensors"))
        renamed = {self.from_original(name): value.to(dtype) for name, value in weights.items()}
        expected = model.state_dict()
        wrong = sorted(expected.keys() ^ renamed.keys())
        wrong += [k for k in expected.keys() & renamed.keys() if expected[k].shape != renamed[k].shape]
        if wrong:
            raise ValueError(f"{folder / 'model.safetensors'}: missing, left-over or misshapen weights: {wrong}")
        model.load_state_dict(renamed)
        model.to(dtype)
        return make_bidirectional(model)


def rope_theta(config: Config) -> float:
    """Reads RoPE's base, wherever this version of transformers keeps it."""
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def make_bidirectional(model: Backbone) -> Backbone:
    """Switches the causal mask off in every attention module (sdpa) and returns the model."""
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model
