"""LoRA adapters as the method's training saves them, under the backbone's original names. peft does the maths."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RETRIEVER_FILE = "retriever_config.json"
PREFIX = "base_model.model."
PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
# What adapter_config.json may say where other values would need weights or arithmetic that are not read here.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the backbone's weights too
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
}
CHUNK_ELEMENTS = 16 * 1024 * 1024  # a merge holds at most this many weights in float32 at once (64 MiB)


class Adapter:
    """An adapter read from disk and checked against its backbone.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        linear_shapes: {our module name: (out, in)} of every linear layer of the model.
        our_name: translates an original module name into ours.
        original_name: translates back.

    Attributes:
        modules: {our module name: {part: tensor}}, part being one of PARTS.
        config: peft's LoraConfig with the target modules, ranks and alphas spelled out under our names.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or the adapter does not fit; the message names the key.
    """

    def __init__(
        self,
        folder: Path,
        linear_shapes: Mapping[str, tuple[int, int]],
        our_name: Callable[[str], str],
        original_name: Callable[[str], str],
    ) -> None:
        self.folder = folder
        self.file = folder / WEIGHTS_FILE
        self._shapes = linear_shapes
        self._our_name = our_name
        self._original_name = original_name
        self.config = self._read_config()
        self.modules = self._read_modules()
        self._check_targets()
        self._spell_out()
        self._check_shapes()

    def _read_config(self) -> Any:
        if not (self.folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{self.folder} holds no {CONFIG_FILE}; it is no LoRA adapter.")
        if not self.file.is_file():
            pickled = " (adapter_model.bin is pickled and never loaded; save it as safetensors)"
            hint = pickled if (self.folder / "adapter_model.bin").is_file() else ""
            raise FileNotFoundError(f"{self.file} is not there{hint}.")
        try:
            raw = json.loads((self.folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.folder / CONFIG_FILE} is not valid JSON: {error}.") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{self.folder / CONFIG_FILE} must hold a JSON object, got {type(raw).__name__}.")
        for field, allowed in ALLOWED.items():
            if raw.get(field, allowed[0]) not in allowed:
                raise ValueError(
                    f"{self.folder / CONFIG_FILE}: `{field}` is {raw[field]!r}; only {allowed[0]!r} is supported."
                )
        return import_peft().LoraConfig.from_pretrained(str(self.folder))

    def _read_modules(self) -> dict[str, dict[str, torch.Tensor]]:
        modules: dict[str, dict[str, torch.Tensor]] = {}
        try:
            tensors = load_file(self.file)
        except SafetensorError as error:
            raise ValueError(f"{self.file} is no whole safetensors file ({error}). Fetch it again.") from error
        for key, tensor in tensors.items():
            part = next((part for part in PARTS if key.endswith("." + part)), None)
            if part is None or not key.startswith(PREFIX):
                raise ValueError(f"{self.file}: unexpected key {key}; expected {PREFIX}<module>.<{'|'.join(PARTS)}>.")
            name = self._our_name(key[len(PREFIX) : -len(part) - 1])
            if name not in self._shapes:
                raise ValueError(f"{self.file}: key {key} belongs to no linear layer of this backbone.")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.file}: {key} holds NaN or infinite values.")
            modules.setdefault(name, {})[part] = tensor
        return modules

    def _check_targets(self) -> None:
        """The layers that the config targets must be those that the file holds."""
        from_config = import_peft().tuners.tuners_utils.check_target_module_exists
        for name in self._shapes:
            original = self._original_name(name)
            targeted = bool(from_config(self.config, original))
            if targeted != (name in self.modules):
                says, holds = ("targets", "holds no") if targeted else ("does not target", "holds")
                raise ValueError(
                    f"{self.folder / CONFIG_FILE} {says} {original}, but {WEIGHTS_FILE} {holds} weights for it."
                )

    def _spell_out(self) -> None:
        """Resolve rank and alpha of each layer by its original name, then address it by ours."""
        pattern_key = import_peft().utils.other.get_pattern_key
        given, config = self.config, copy.deepcopy(self.config)
        config.target_modules = set(self.modules)
        config.rank_pattern, config.alpha_pattern = {}, {}
        for name in self.modules:
            original = self._original_name(name)
            rank_key = pattern_key(given.rank_pattern.keys(), original)
            alpha_key = pattern_key(given.alpha_pattern.keys(), original)
            config.rank_pattern[name] = given.rank_pattern.get(rank_key, given.r)
            config.alpha_pattern[name] = given.alpha_pattern.get(alpha_key, given.lora_alpha)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.task_type, config.inference_mode = None, True
        config.init_lora_weights = False  # the file's weights take the place of any
        self.config = config

    def _check_shapes(self) -> None:
        for name, parts in self.modules.items():
            rows, columns = self._shapes[name]
            rank = self.config.rank_pattern[name]
            wanted: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
            if self.config.use_dora:
                wanted["lora_magnitude_vector"] = (rows,)
            if self.config.lora_bias:
                wanted["lora_B.bias"] = (rows,)
            key = PREFIX + self._original_name(name)
            for part in wanted.keys() | parts.keys():
                if part not in parts or part not in wanted:
                    problem = "is missing" if part in wanted else "is unexpected: adapter_config.json has no such part"
                    raise ValueError(f"{self.file}: {key}.{part} {problem}.")
                if tuple(parts[part].shape) != wanted[part]:
                    raise ValueError(
                        f"{self.file}: {key}.{part} has shape {list(parts[part].shape)}; rank {rank} on a backbone "
                        f"layer of {rows} x {columns} needs {list(wanted[part])}."
                    )

    def add_to(self, model: nn.Module, merge: bool | None) -> None:
        """Merge the adapter into the model's weights, or attach it where they cannot take it.

        Args:
            model: has the layers that the adapter is for.
            merge: True and False say which; None merges unless the model is quantised or offloaded.

        Raises:
            ValueError: `merge` is True for a model that is quantised or offloaded.
        """
        quantised = getattr(model, "hf_quantizer", None) is not None
        offloaded = any(weight.is_meta for weight in model.parameters())
        if merge and (quantised or offloaded):
            state = "quantised" if quantised else "offloaded"
            raise ValueError(f"merge_adapter=True, but the backbone is {state}; leave it unset to keep them apart.")
        if merge is False or quantised or offloaded:
            self.attach(model)
        else:
            self.merge_into(model)

    def attach(self, model: nn.Module) -> None:
        """Put the adapter beside the model's weights, in float32, unmerged."""
        peft = import_peft()
        peft.inject_adapter_in_model(self.config, model)
        for name, parts in self.modules.items():
            layer: Any = model.get_submodule(name)
            base = layer.get_base_layer()
            # Of an offloaded layer, peft would put the adapter where the weights are: nowhere.
            device = base._hf_hook.execution_device if base.weight.is_meta else base.weight.device
            for part, tensor in parts.items():
                holder, _, attribute = part.partition(".")
                weight = nn.Parameter(tensor.to(device, torch.float32), requires_grad=False)
                setattr(getattr(layer, holder)["default"], attribute or "weight", weight)

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Add the adapter to the model's weights in float32 and round once to the weights' dtype.

        A few rows at a time, so that no float32 copy of a large layer ever exists; LoRA, rsLoRA and DoRA all act on
        each output row by itself.
        """
        for name, parts in self.modules.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            if self.config.lora_bias and layer.bias is None:
                raise ValueError(
                    f"{self.file}: {PREFIX}{self._original_name(name)}.lora_B.bias has no bias in the backbone to be "
                    "merged into; load with merge_adapter=False."
                )
            step = max(1, CHUNK_ELEMENTS // layer.in_features)
            for start in range(0, layer.out_features, step):
                self._merge_rows(name, layer, parts, slice(start, start + step))

    def _merge_rows(self, name: str, layer: nn.Linear, parts: dict[str, torch.Tensor], rows: slice) -> None:
        peft = import_peft()
        weight = layer.weight[rows]
        block = nn.Linear(layer.in_features, len(weight), bias=layer.bias is not None, device="meta")
        block.weight = nn.Parameter(weight.float(), requires_grad=False)
        if layer.bias is not None:
            block.bias = nn.Parameter(layer.bias[rows].float(), requires_grad=False)
        config = copy.copy(self.config)
        config.target_modules, config.rank_pattern, config.alpha_pattern = {"block"}, {}, {}
        config.r, config.lora_alpha = self.config.rank_pattern[name], self.config.alpha_pattern[name]
        holder = peft.inject_adapter_in_model(config, nn.ModuleDict({"block": block}))
        state = {
            f"block.{part}": (tensor if part == "lora_A.weight" else tensor[rows]).to(weight.device, torch.float32)
            for part, tensor in parts.items()
        }
        peft.set_peft_model_state_dict(holder, state)
        holder["block"].merge()
        merged = holder["block"].get_base_layer()
        layer.weight[rows] = merged.weight.to(layer.weight.dtype)
        if layer.bias is not None:
            layer.bias[rows] = merged.bias.to(layer.bias.dtype)


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's state with unmerged adapters added in float32, under the names of a merged model."""
    state: dict[str, torch.Tensor] = {}
    adapted: list[str] = []
    for name, layer in model.named_modules():
        if not hasattr(layer, "get_base_layer"):
            continue
        adapted.append(name + ".")
        merged = copy.deepcopy(layer).float()
        merged.merge()
        for part, tensor in merged.get_base_layer().state_dict().items():
            state[f"{name}.{part}"] = tensor.to(layer.get_base_layer().weight.dtype)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(adapted))}
    return own | state


def import_peft() -> Any:
    """Import peft when an adapter is first used; releases with merged weights do without it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("This release has a LoRA adapter, which needs peft: pip install peft") from error
    return peft
