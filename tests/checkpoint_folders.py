"""Checkpoint folders for the tests: copies of the parity files with something changed, and what is in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import torch
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PARITY = Path(__file__).resolve().parent / "parity"
ADAPTERS = {"llada": "llada-q4p4", "dream": "dream-q4p4"}
KINDS = tuple(ADAPTERS)
TEXTS = ["what causes the seasons on earth", "The tilt of the axis, 23.4 degrees.", ""]


class Removed:
    """A field that is taken out; its name in a test's id is the same in every process."""

    def __repr__(self) -> str:
        return "removed"


REMOVED = Removed()

# The LLaDA checkpoints' names of what a Llama layer holds, written out apart from the code's own mapping.
LLADA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
LLADA_OUTER = {
    "backbone.embed_tokens": "model.transformer.wte",
    "backbone.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}


def original_key(kind: str, parameter: str) -> str:
    """Name one of the model's parameters as the backbone's own checkpoints do."""
    if kind == "dream":
        return parameter.replace("backbone.", "model.")
    module, part = parameter.rsplit(".", 1)
    if module in LLADA_OUTER:
        return f"{LLADA_OUTER[module]}.{part}"
    layer, inner = module.removeprefix("backbone.layers.").split(".", 1)
    return f"model.transformer.blocks.{layer}.{LLADA_LAYER[inner]}.{part}"


def edit_json(file: Path, **changes: Any) -> None:
    """Set or remove (REMOVED) fields of a JSON file."""
    fields = json.loads(file.read_text())
    for name, value in changes.items():
        if value is REMOVED:
            fields.pop(name, None)
        else:
            fields[name] = value
    file.write_text(json.dumps(fields))


def copy_backbone(kind: str, to: Path, **config: Any) -> Path:
    """Copy a parity backbone, with changes to its config.json."""
    shutil.copytree(PARITY / "backbones" / f"tiny-{kind}", to)
    for file in to.iterdir():
        file.chmod(0o644)
    edit_json(to / "config.json", **config)
    return to


def copy_adapter(name: str, to: Path, **config: Any) -> Path:
    """Copy a parity adapter, with changes to its adapter_config.json."""
    shutil.copytree(PARITY / "adapters" / name, to)
    for file in to.iterdir():
        file.chmod(0o644)
    edit_json(to / "adapter_config.json", **config)
    return to


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Let `change` work on the tensors of a safetensors file in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard(folder: Path, parts: int = 3) -> None:
    """Split model.safetensors into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        held = {name: tensors[name] for name in names[part::parts]}
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def module_tree(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Return modules under the checkpoint's own names: a Linear for every matrix, as peft saw them in training."""
    root = nn.Module()
    for key, weight in weights.items():
        *path, name, part = key.split(".")
        if part != "weight" or weight.dim() != 2 or name in ("wte", "embed_tokens"):
            continue
        parent = root
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        bias = weights.get(key.removesuffix("weight") + "bias")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight.data = weight.float().clone()
        if bias is not None:
            linear.bias.data = bias.float().clone()
        parent.add_module(name, linear)
    return root


def vectors(model: Any, is_query: bool = True) -> list[torch.Tensor]:
    """Encode a few texts; the tensors to compare."""
    return list(model.encode_texts(TEXTS, is_query).values())


def run_python(code: str, *arguments: Any, **environment: Any) -> str:
    """Run code in a fresh process, offline, and return what it printed; `python`: in that interpreter."""
    python = environment.pop("python", None)
    given = {name: str(value) for name, value in environment.items()}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **given}
    words = ["-c", code, *map(str, arguments)]
    if python is None:
        done = fresh.run(words, env=env)
    else:
        done = subprocess.run([python, *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def hub_repository(cache: Path, name: str, source: Path, refs: tuple[str, ...] = ("main",)) -> str:
    """Put a folder into a Hub cache as huggingface_hub lays it out; returns the commit it is under."""
    commit = os.urandom(20).hex()
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        link = place / "snapshots" / commit / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = place / "blobs" / os.urandom(20).hex()
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs").mkdir(exist_ok=True)
    for ref in refs:
        (place / "refs" / ref).write_text(commit)
    return commit
