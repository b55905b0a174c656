"""A Llama in llama.cpp's file format, GGUF, written as the folder that transformers reads natively."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..files.durable import write_json, write_whole
from ..model.checked_files import WEIGHTS_FILE

CONTROL = 3  # a special token, among the tokenizer's token types
# Our config's field: the file's, behind "llama.". A file that says more about its architecture is not read.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
IMPLIED = ("rope.dimension_count", "attention.key_length", "attention.value_length")  # the width of a head
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufLlama:
    """A GGUF file of a Llama with a byte-level BPE tokenizer in SmolLM's form.

    Args:
        file: the file.

    Attributes:
        config: config.json of the native folder.

    Raises:
        ImportError: the package gguf is not installed.
        FileNotFoundError: no such file.
        ValueError: no GGUF file, another architecture or tokenizer, or something about it that is not read here.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._reader = _open(file)
        if (architecture := self._field("general.architecture")) != "llama":
            self._refuse(f'its architecture is {architecture!r}; only "llama" is read')
        known = {f"llama.{name}" for name in (*SIZES.values(), *IMPLIED)}
        if strange := sorted(name for name in self._reader.fields if name.startswith("llama.") and name not in known):
            self._refuse(f"it says {strange[0]}, which is not read here")
        form = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if form != ("gpt2", "smollm"):
            self._refuse(
                f"its tokenizer is {form[0]!r} with the pre-tokenizer {form[1]!r}; only gpt2 with smollm is read"
            )
        self.config = self._make_config()

    def write(self, folder: Path) -> None:
        """Write config.json, the weights in bfloat16 and the tokenizer into a folder.

        Raises:
            OSError: the disk is full, say.
            ValueError: a tensor is missing, unknown, of another shape, or quantised in a way that is not known.
        """
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in self.weights().items()}
        write_whole(folder / WEIGHTS_FILE, [save(weights, metadata={"format": "pt"})])
        write_whole(folder / "tokenizer.json", [self.tokenizer_json().encode()])
        write_json(folder / "tokenizer_config.json", self._tokenizer_config())
        write_json(folder / "config.json", self.config)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return {transformers' name: float32 weights}, dequantised, q and k in transformers' order of rows."""
        found: dict[str, torch.Tensor] = {}
        for tensor in self._reader.tensors:
            found[self._native_name(tensor.name)] = self._dequantise(tensor)
        wanted = self._shapes(untied="lm_head.weight" in found)
        if missing := sorted(wanted.keys() - found.keys()):
            self._refuse(f"it holds no {missing[0]}")
        for name, weight in found.items():
            if tuple(weight.shape) != wanted.get(name):
                self._refuse(f"{name} has the shape {tuple(weight.shape)}; its sizes make it {wanted.get(name)}")
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for name, weight in found.items():
            if (part := name.split(".")[-2]) in heads:
                found[name] = _split_pairs(weight, self.config[heads[part]])
        return found

    def tokenizer_json(self) -> str:
        """Return tokenizer.json as SmolLM2's authors wrote it, byte by byte.

        Digits stand alone; the rest is split as GPT-2 does. Merges are texts, the older of the two spellings.
        """
        tokens, merges = self._field("tokenizer.ggml.tokens"), self._field("tokenizer.ggml.merges")
        kinds = self._field("tokenizer.ggml.token_type")
        pairs = [tuple(merge.split(" ")) for merge in merges]
        if len(kinds) != len(tokens) or any(len(pair) != 2 for pair in pairs):
            self._refuse("its tokenizer's lists do not fit together")
        made = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=pairs))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        made.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
        made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        content = json.loads(made.to_str())
        content["model"]["merges"] = merges
        return json.dumps(content, indent=2, ensure_ascii=False)

    def _tokenizer_config(self) -> dict[str, Any]:
        tokens = self._field("tokenizer.ggml.tokens")
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: tokens[self._field(f"tokenizer.ggml.{theirs}_token_id")] for name, theirs in names.items()},
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.config["max_position_embeddings"],
            "chat_template": self._field("tokenizer.chat_template"),
        }

    def _make_config(self) -> dict[str, Any]:
        sizes = {ours: self._field(f"llama.{theirs}") for ours, theirs in SIZES.items()}
        for field in ("rms_norm_eps", "rope_theta"):  # float32 in the file: 1e-05 is 9.999999747378752e-06 there
            sizes[field] = float(f"{sizes[field]:.7g}")
        width = sizes["hidden_size"] // sizes["num_attention_heads"]
        for name in IMPLIED:
            if self._reader.fields.get(f"llama.{name}") and self._field(f"llama.{name}") != width:
                self._refuse(f"its llama.{name} is {self._field(f'llama.{name}')}, its heads are {width} wide")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **sizes,
            "attention_bias": False,
            "hidden_act": "silu",
            "mlp_bias": False,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in self._reader.tensors),
            "torch_dtype": "bfloat16",
        }

    def _shapes(self, untied: bool) -> Mapping[str, tuple[int, ...]]:
        """Return {name: shape} of every weight that a Llama of these sizes has."""
        sizes = self.config
        width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
        grouped = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
        shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (width,)}
        shapes |= dict.fromkeys(("model.embed_tokens.weight", *(["lm_head.weight"] * untied)), (vocabulary, width))
        rows = {"attn_k": grouped, "attn_v": grouped, "ffn_gate": inner, "ffn_up": inner}
        for layer in range(sizes["num_hidden_layers"]):
            for theirs, ours in IN_A_LAYER.items():
                matrix = (rows.get(theirs, width), inner if theirs == "ffn_down" else width)
                shapes[f"model.layers.{layer}.{ours}.weight"] = (width,) if theirs.endswith("_norm") else matrix
        return shapes

    def _native_name(self, name: str) -> str:
        if name in WHOLE:
            return WHOLE[name]
        match name.split("."):
            case ["blk", layer, part, "weight"] if part in IN_A_LAYER:
                return f"model.layers.{layer}.{IN_A_LAYER[part]}.weight"
        return self._refuse(f"it holds the tensor {name}, which no plain Llama has")

    def _dequantise(self, tensor: Any) -> torch.Tensor:
        from gguf import dequantize

        try:
            return torch.tensor(dequantize(tensor.data, tensor.tensor_type)).float()
        except NotImplementedError:
            return self._refuse(f"{tensor.name} is quantised as {tensor.tensor_type.name}, which gguf cannot read back")

    def _field(self, name: str) -> Any:
        found = self._reader.fields.get(name)
        return found.contents() if found else self._refuse(f"it does not say {name}")

    def _refuse(self, problem: str) -> Any:
        raise ValueError(f"{self.file} cannot be read as a backbone: {problem}.")


def _open(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("GGUF files are read with the package gguf: pip install gguf") from error
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there.")
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # what its reader meets in other bytes
        raise ValueError(f"{file} is no whole GGUF file ({error}).") from error


def _split_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of a head's rows: it has each rotated pair together, transformers halves the head."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
