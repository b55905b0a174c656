"""LoRA adapters as the method's training saves them, under the backbone's original names. peft does the maths."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
from torch import nn

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RETRIEVER_FILE = "retriever_config.json"
PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"  # peft's name; they take the place of the rows
PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
LARGEST_RANK = 65_536
# Every field that peft writes into adapter_config.json, with what it may say (rules of `check_fields`): peft never sees
# the file. "one of": other values would need weights or arithmetic that are not read here, or run code of their own.
ADAPTER_FIELDS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("one of", "LORA"),
    "r": ("whole", 1, LARGEST_RANK),
    "lora_alpha": ("number", -1e6, 1e6),
    "rank_pattern": ("object", ("whole", 1, LARGEST_RANK), None),
    "alpha_pattern": ("object", ("number", -1e6, 1e6), None),
    "use_rslora": ("flag",),
    "use_dora": ("flag",),
    "lora_bias": ("flag",),
    "target_modules": ("names",),
    "exclude_modules": ("names", None),
    "layers_to_transform": ("wholes", None),
    "layers_pattern": ("names", None),
    # Of no effect on what the finished weights compute.
    "auto_mapping": ("object", None),
    "base_model_name_or_path": ("text", None),
    "eva_config": ("object", None),
    "inference_mode": ("flag",),
    "init_lora_weights": ("one of", True, False, "gaussian", "eva", "orthogonal"),  # others change the backbone, too
    "lora_dropout": ("number", 0, 1),
    "megatron_core": ("one of", "megatron.core", None),
    "peft_version": ("text", None),
    "qalora_group_size": ("whole", 1, LARGEST_RANK, None),
    "revision": ("text", None),
    "task_type": ("text", None),
    # Must be off.
    "alora_invocation_tokens": ("one of", None),
    "arrow_config": ("one of", None),
    "bias": ("one of", "none"),
    "corda_config": ("one of", None),
    "ensure_weight_tying": ("one of", False, None),
    "fan_in_fan_out": ("one of", False),
    "layer_replication": ("one of", None, []),
    "loftq_config": ("one of", {}, None),
    "megatron_config": ("one of", None),
    "modules_to_save": ("one of", None, []),
    "target_parameters": ("one of", None, []),
    "trainable_token_indices": ("any",),  # rows of the embedding: of Llama and Qwen2 alone, see `_read_rows`
    "use_qalora": ("one of", False, None),
}
# The regular expressions that are run: single characters, escapes and classes, each perhaps repeated; alternatives in
# groups that are neither nested nor repeated. What such an expression can cost is known before it runs.
_CHARACTER = r"(?:[\w.-]|\\[.dw-]|\[\^?[\w.-]+\])(?:[*+?]\??)?"
_EXPRESSION = re.compile(rf"\^?(?:{_CHARACTER}|\((?:\?:)?(?:{_CHARACTER}|\|)*\)\??|\|)*\$?")
LONGEST_EXPRESSION = 1000  # characters
MOST_EXPRESSIONS = 4096
MOST_STEPS = 30_000_000  # of all expressions of a file on all layers; a second or two
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# What the method's training records beside an adapter: our config's fields there, and what it may say.
RECORDED = {
    "num_query_masks": "n_gen_q_tokens",
    "num_passage_masks": "n_gen_p_tokens",
    "num_denoise_steps": "num_denoise_steps",
    "max_length": "max_length",
    "query_length": "query_length",
    "passage_length": "passage_length",
    "cut_in_training": "cut_in_training",
    "normalize": "normalize",
}
RETRIEVER_FIELDS: dict[str, tuple[Any, ...]] = {
    "model_type": ("one of", "llada", "llada1", "dream", "llama", "qwen2"),
    "n_gen_q_tokens": ("whole", 1, 1024),
    "n_gen_p_tokens": ("whole", 1, 1024),
    "num_denoise_steps": ("whole", 1, 1024),
    "max_length": ("whole", 1, 1 << 20),
    "query_length": ("whole", 1, 1 << 20, None),
    "passage_length": ("whole", 1, 1 << 20, None),
    "cut_in_training": ("object", ("number", 0, 1), None),
    "normalize": ("flag",),
    "mask_token": ("name", None),
    "mask_token_id": ("whole", 0, 1 << 31),
    "query_prefix_ids": ("ids",),
    "query_suffix_ids": ("ids",),
    "passage_prefix_ids": ("ids",),
    "passage_suffix_ids": ("ids",),
}
# Of those, what the method's own code does not record:
OPTIONAL = ("query_length", "passage_length", "cut_in_training", "mask_token")
CHUNK_ELEMENTS = 16 * 1024 * 1024  # a merge holds at most this many weights in float32 at once (64 MiB)


def find_adapter_files(folder: Path) -> tuple[Path, Path]:
    """Return an adapter's config and weights files.

    Raises:
        FileNotFoundError: one is missing.
    """
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}; it is no LoRA adapter.")
    if not weights.is_file():
        pickled = " (adapter_model.bin is pickled and never loaded; save it as safetensors)"
        hint = pickled if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{weights} is not there{hint}.")
    return config, weights


class Adapter:
    """An adapter checked against its backbone.

    Args:
        folder: where it was read from.
        fields: adapter_config.json, held against `ADAPTER_FIELDS`.
        tensors: adapter_model.safetensors.
        linear_shapes: {our module name: (out, in)} of every linear layer of the model.
        our_name: translates an original module name into ours.
        original_name: translates back.
        embedding: [V, H] of the embedding, of which an adapter may bring rows; None where it may not.

    Attributes:
        modules: {our module name: {part: tensor}}, part being one of PARTS.
        rows: ids of tokens, and their rows [n, H] of the embedding.
        config: peft's LoraConfig with the target modules, ranks and alphas spelled out under our names.

    Raises:
        ValueError: the adapter does not fit; the message names the file and the field or key.
    """

    def __init__(
        self,
        folder: Path,
        fields: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        linear_shapes: Mapping[str, tuple[int, int]],
        our_name: Callable[[str], str],
        original_name: Callable[[str], str],
        embedding: tuple[int, ...] | None = None,
    ) -> None:
        self.folder = folder
        self.file = folder / WEIGHTS_FILE
        self._shapes = linear_shapes
        self._our_name = our_name
        self._original_name = original_name
        self._check_expressions(fields)
        tensors = dict(tensors)
        self.rows = self._read_rows(fields.get("trainable_token_indices"), tensors, embedding)
        self.modules = self._sort_out(tensors)
        self._check_targets(fields)
        self.config = self._spell_out(fields)
        self._check_shapes()

    def _check_expressions(self, fields: Mapping[str, Any]) -> None:
        """Refuse regular expressions that are broken or could take for ever, before any is run."""
        expressions = [(name, fields[name], 0) for name in _TARGETS[:2] if isinstance(fields.get(name), str)]
        for name in ("rank_pattern", "alpha_pattern"):  # peft puts `(.*\.)?` before these
            expressions += [(name, expression, 1) for expression in fields.get(name) or ()]
        longest = max((len(self._original_name(name)) for name in self._shapes), default=1)
        steps = 0
        for number, (field, expression, repeats) in enumerate(expressions):
            if len(expression) > LONGEST_EXPRESSION or not _EXPRESSION.fullmatch(expression):
                raise self._misfit(
                    field, expression, "holds a regular expression that is not read here; spell the names out"
                )
            steps += len(self._shapes) * count_steps(expression, longest, repeats)
            if steps > MOST_STEPS or number >= MOST_EXPRESSIONS:
                raise self._misfit(field, expression, "would take too long to match; spell fewer names out")
            try:
                re.compile(expression)
            except re.error as error:
                raise self._misfit(field, expression, f"holds a broken regular expression ({error})") from error
        patterns = fields.get("layers_pattern") or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not re.fullmatch(r"\w+", pattern):
                raise self._misfit("layers_pattern", pattern, "must hold plain names")

    def _misfit(self, field: str, value: Any, problem: str) -> ValueError:
        return ValueError(f"{self.folder / CONFIG_FILE}: `{field}` {problem}: {shortened(value)}.")

    def _read_rows(
        self, given: Any, tensors: dict[str, torch.Tensor], embedding: tuple[int, ...] | None
    ) -> tuple[list[int], torch.Tensor | None]:
        """Take the embedding's rows out of the tensors."""
        if given in (None, [], {}):
            return [], None
        field = "trainable_token_indices"
        if embedding is None:
            raise self._misfit(field, given, "is not supported for this backbone")
        ids: Any = given.get("embed_tokens") if isinstance(given, dict) and len(given) == 1 else given
        fits = isinstance(ids, list) and all(type(token) is int and 0 <= token < embedding[0] for token in ids)
        if not fits or len(set(ids)) < len(ids):
            raise self._misfit(field, given, f"must list token ids below {embedding[0]} of embed_tokens, each once")
        key = f"{PREFIX}{self._original_name('backbone.embed_tokens')}.{ROWS}"
        rows = tensors.pop(key, None)
        wanted = [len(ids), embedding[1]]
        if rows is None or list(rows.shape) != wanted or not torch.isfinite(rows).all():
            found = "is missing" if rows is None else f"has shape {list(rows.shape)}, or holds NaN or infinite values"
            raise ValueError(f"{self.file}: {key} {found}; `trainable_token_indices` asks for {wanted}.")
        return ids, rows

    def _sort_out(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            part = next((part for part in PARTS if key.endswith("." + part)), None)
            if part is None or not key.startswith(PREFIX):
                raise ValueError(
                    f"{self.file}: unexpected key {key:.200}; expected {PREFIX}<module>.<{'|'.join(PARTS)}>."
                )
            name = self._our_name(key[len(PREFIX) : -len(part) - 1])
            if name not in self._shapes:
                raise ValueError(f"{self.file}: key {key:.200} belongs to no linear layer of this backbone.")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.file}: {key} holds NaN or infinite values.")
            modules.setdefault(name, {})[part] = tensor
        return modules

    def _check_targets(self, fields: Mapping[str, Any]) -> None:
        """The layers that the config targets must be those that the file holds."""
        peft = import_peft()
        if not fields.get("target_modules"):
            raise self._misfit("target_modules", fields.get("target_modules"), "must name the adapted layers")
        if fields.get("layers_to_transform") is not None and isinstance(fields["target_modules"], str):
            raise self._misfit(
                "layers_to_transform", fields["layers_to_transform"], "needs `target_modules` to be a list"
            )
        if fields.get("layers_pattern") and fields.get("layers_to_transform") is None:
            raise self._misfit("layers_pattern", fields["layers_pattern"], "needs `layers_to_transform`")
        config = peft.LoraConfig(**{field: fields.get(field) for field in _TARGETS})
        for name in self._shapes:
            original = self._original_name(name)
            targeted = bool(peft.tuners.tuners_utils.check_target_module_exists(config, original))
            if targeted != (name in self.modules):
                says, holds = ("targets", "holds no") if targeted else ("does not target", "holds")
                raise ValueError(
                    f"{self.folder / CONFIG_FILE} {says} {original}, but {WEIGHTS_FILE} {holds} weights for it."
                )

    def _spell_out(self, fields: Mapping[str, Any]) -> Any:
        """Return peft's config with rank and alpha of each layer, resolved by its original name, under ours."""
        originals = {name: self._original_name(name) for name in self.modules}
        resolved = {}
        for field, everywhere in (("rank_pattern", fields.get("r", 8)), ("alpha_pattern", fields.get("lora_alpha", 8))):
            patterns = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in (fields.get(field) or {}).items()]
            resolved[field] = {
                name: next((value for pattern, value in patterns if pattern.match(original)), everywhere)
                for name, original in originals.items()
            }
        return import_peft().LoraConfig(
            target_modules=set(self.modules),
            inference_mode=True,
            init_lora_weights=False,  # the file's weights take the place of any
            **resolved,
            **{field: fields.get(field, False) for field in ("use_rslora", "use_dora", "lora_bias")},
        )

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
        if self.rows[1] is not None:
            self._put_rows(model, self.rows[1])
        if merge is False or quantised or offloaded:
            self.attach(model)
        else:
            self.merge_into(model)

    @torch.no_grad()
    def _put_rows(self, model: nn.Module, rows: torch.Tensor) -> None:
        """Put the adapter's rows into the embedding; also where the rest of it is kept apart."""
        weight = model.get_submodule("backbone.embed_tokens").weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta:
            raise ValueError(f"{self.file} brings rows of the embedding, which is offloaded; keep it in memory.")
        weight[self.rows[0]] = rows.to(weight)

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


def count_steps(expression: str, longest: int, repeats: int = 0) -> int:
    r"""Return an upper bound of the ways in which a regular expression, as `_EXPRESSION` has them, can match a name.

    Args:
        expression: the expression.
        longest: characters of the name.
        repeats: open repetitions (`*`, `+`) besides those of the expression.

    >>> count_steps(r".*\.(q_proj|v_proj)", longest=30)
    62
    """
    repeats += len(re.findall(r"[*+]", expression))  # which share the name's characters out among them
    steps = math.comb(longest + repeats, repeats) * 2 ** expression.count("?")
    for alternatives in (*re.findall(r"\(([^)]*)\)", expression), re.sub(r"\([^)]*\)", "", expression)):
        steps *= alternatives.count("|") + 1
    return steps


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


def read_recorded(
    file: Path, fields: Mapping[str, Any], tokenizer: Any, mask_id: int, render: Callable[..., tuple[str, str]]
) -> dict[str, Any]:
    """Read what the method's training recorded beside an adapter, as fields of `DiffRetrieverConfig`.

    Args:
        file: the adapter's retriever_config.json.
        fields: what it holds, held against `RETRIEVER_FIELDS`.
        tokenizer: the tokenizer that the adapter was trained with.
        mask_id: of its [MASK] token.
        render: renders a prompt (its three roles) through a tokenizer's chat template: the texts before and after.

    Returns:
        Budgets, lengths, denoising steps, normalisation, prompts and backbone type.

    Raises:
        ValueError: a field is missing, or was recorded with another tokenizer.
    """
    if missing := [name for name in RETRIEVER_FIELDS if name not in fields and name not in OPTIONAL]:
        raise ValueError(f"{file} lacks {', '.join(map(repr, missing))}.")
    recorded: dict[str, Any] = {ours: fields.get(theirs) for ours, theirs in RECORDED.items()}
    for side in ("query", "passage"):
        try:
            ids = fields[f"{side}_prefix_ids"], fields[f"{side}_suffix_ids"]
            recorded[f"{side}_prompt"] = read_prompt(tokenizer, *ids, render)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    if fields["mask_token_id"] != mask_id:
        raise ValueError(
            f"{file}: mask_token_id is {fields['mask_token_id']}, the tokenizer's is {mask_id}; they do not fit."
        )
    recorded["backbone_type"] = "llada" if fields["model_type"] == "llada1" else fields["model_type"]
    recorded["mask_token"] = fields.get("mask_token")
    return recorded


def read_prompt(
    tokenizer: Any, prefix_ids: list[int], suffix_ids: list[int], render: Callable[..., tuple[str, str]]
) -> dict[str, str]:
    """Recover the prompt from the token ids that a training run recorded.

    Args:
        tokenizer: the tokenizer of the run.
        prefix_ids: ids before the text.
        suffix_ids: ids between the text and the masks.
        render: as for `read_recorded`.

    Returns:
        The texts of the three roles.

    Raises:
        ValueError: the ids are no prompt of this tokenizer's chat template, or other ids for the same words.
    """
    system, user = "\N{SYMBOL FOR START OF HEADING}", "\N{SYMBOL FOR START OF TEXT}"
    before, after = render(tokenizer, {"system": system, "user": user + "{text}", "assistant": ""})
    prefix = tokenizer.decode(prefix_ids, clean_up_tokenization_spaces=False)
    suffix = tokenizer.decode(suffix_ids, clean_up_tokenization_spaces=False)
    opening, _, between = before.rstrip(user).partition(system)
    found = re.fullmatch(f"{re.escape(opening)}(.*){re.escape(between)}(.*)", prefix, re.DOTALL)
    user_end, closing, assistant = suffix.partition(after or "\0")
    if not found or not closing:
        raise ValueError(
            "The prompt ids recorded for the adapter do not follow the tokenizer's chat template: "
            f"prefix {prefix!r:.500}, suffix {suffix!r:.500}."
        )
    prompt = {"system": found[1], "user": found[2] + "{text}" + user_end, "assistant": assistant}
    again = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in render(tokenizer, prompt)]
    if again != [prefix_ids, suffix_ids]:
        raise ValueError(
            f"The prompt ids recorded for the adapter read as {prompt!r:.1000}, which this tokenizer turns into other "
            "ids; the adapter was trained with another tokenizer."
        )
    return prompt


def import_peft() -> Any:
    """Import peft when an adapter is first used; releases with merged weights do without it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("This release has a LoRA adapter, which needs peft: pip install peft") from error
    return peft
