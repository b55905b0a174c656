"""What makes transformers' causal layers bidirectional, and their last layer cheap when only the masks are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaModel, PreTrainedModel, Qwen2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, eager_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # torch's, on a module
PLAIN_WEIGHTS = (nn.Parameter,)  # what is quantised has a class of its own


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
    joint: Sequence[JointLayer] = (),
) -> torch.Tensor:
    """Run a backbone of `build_backbone` once, with gradient.

    Args:
        backbone: the LlamaModel or Qwen2Model.
        input_ids: int64 [B, L].
        attention_mask: int64 [B, L], 1 for real tokens; None when no row is padded.
        positions: int64 [B, K], whose final states to return; None for all.
        implementation: of the attention, as for `attention_bias`.
        joint: what runs in the place of as many of the first layers.

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
    for layer in (*joint, *layers[len(joint) :]):
        hidden = layer(hidden, attention_mask=bias, position_ids=position_ids, position_embeddings=rotation)
    if positions is not None and can_trim(last, implementation):
        hidden = trimmed_layer(last, hidden, positions, rotation, bias, implementation)  # [B, K, H]
    else:
        hidden = last(hidden, attention_mask=bias, position_ids=position_ids, position_embeddings=rotation)
        hidden = hidden if positions is None else rows_at(hidden, positions)
    return backbone.norm(hidden)


def compile_layers(retriever: nn.Module) -> None:
    """Let torch.compile fuse what surrounds each layer's products; texts of any length share one compiled code."""
    stacks = (part for name, part in retriever.named_modules() if name.endswith("layers"))
    _compile_each(next(stacks).children())


def _compile_each(layers: Iterable[nn.Module]) -> None:
    # With `dynamic` torch would let floats vary, too: a norm's epsilon, say, be computed on the host at each call.
    torch._dynamo.config.specialize_float = True
    for layer in layers:
        layer.compile(dynamic=True)


class JointLayer(nn.Module):
    """A decoder layer whose products of the same states are one: query, key and value; gate and up.

    Of one text's rows a product of 4,096 columns keeps a part of a GPU's processors busy, one of 12,288 all.

    Args:
        layer: what `can_join` of a LlamaDecoderLayer or Qwen2DecoderLayer. Its weights become views of the joint ones,
            so that no memory is taken.
        implementation: of the attention, sdpa or eager.
    """

    def __init__(self, layer: Any, implementation: str) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: its weights are the backbone's
        self._implementation = implementation
        self._attention, self._mlp = (_joined(parts) for parts in _parts_of_one_product(layer))

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        """Return the layer's output [B, L, H]; arguments as transformers'."""
        [layer] = self._layer
        attention, mlp = layer.self_attn, layer.mlp
        joint = F.linear(layer.input_layernorm(hidden), *self._attention)
        widths = [part.out_features for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        query, key, value = (_heads(part, attention.head_dim) for part in joint.split(widths, dim=-1))
        query, key = (_rotate(states, *position_embeddings) for states in (query, key))
        mixed = _attend(self._implementation, attention, query, key, value, attention_mask)
        states = hidden + attention.o_proj(mixed)
        gate, up = F.linear(layer.post_attention_layernorm(states), *self._mlp).chunk(2, dim=-1)
        return states + mlp.down_proj(mlp.act_fn(gate) * up)


def can_join(layer: Any, implementation: str) -> bool:
    """Whether `JointLayer` may stand in for a layer: as `can_trim`, and its products plain ones, of one kind each."""
    hooked = any(getattr(part, hooks) for part in layer.modules() for hooks in HOOKS)
    alike = True
    for parts in _parts_of_one_product(layer):
        plain = all(type(part) is nn.Linear and type(part.weight) in PLAIN_WEIGHTS for part in parts)
        alike &= plain and len({(part.weight.dtype, part.weight.device, part.bias is None) for part in parts}) == 1
    return alike and not hooked and can_trim(layer, implementation)


def _parts_of_one_product(layer: Any) -> list[list[Any]]:
    attention, mlp = layer.self_attn, layer.mlp
    return [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]


@torch.no_grad()
def _joined(parts: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put weights into one [sum of the columns, H], and biases into one, of which those of the layers become views."""

    def join(values: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat([value.detach() for value in values])
        for value, rows in zip(values, whole.split([len(value) for value in values]), strict=True):
            value.data = rows
        return whole

    biases = [part.bias for part in parts if part.bias is not None]
    return join([part.weight for part in parts]), join(biases) if biases else None


class RecordedLayers:
    """Runs one text at a time through layers that were recorded: a CUDA graph for each of a few lengths.

    A text's layers are some hundred small operations, which take longer to be launched than to run; a graph is launched
    once. Its sizes are fixed, so that a text is padded to the next of `LENGTHS`, which changes its vectors by rounding
    only, and its time little: that is what reading the weights takes.

    Args:
        retriever: whose layers to run.
        compiled: whether its layers are; those in their place, `JointLayer`s, are then, too.
    """

    LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024)

    def __init__(self, retriever: BidirectionalLayers, compiled: bool) -> None:
        self._retriever, self._compiled = retriever, compiled
        self._joint: list[JointLayer] | None = None  # None: to be made
        self._graphs: dict[tuple[int, int], tuple[list[torch.Tensor], torch.Tensor, Any]] = {}
        self._memory: Any = None  # all graphs', as one runs at a time
        self._turn = Lock()

    def takes(self, ids: torch.Tensor) -> bool:
        """Whether ids [B, L] are one text on a GPU, short enough, and neither gradient nor autocast is asked for."""
        fits = ids.device.type == "cuda" and len(ids) == 1 and ids.shape[1] <= self.LENGTHS[-1]
        return fits and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")

    def forget(self) -> None:
        """Record anew: the weights are about to change their place."""
        self._graphs.clear()
        self._joint = self._memory = None

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """Return the states at the positions, [1, K, H]; arguments as of `run_layers`, if `takes` takes the ids."""
        length = next(length for length in self.LENGTHS if ids.shape[1] <= length)
        padding = (0, length - ids.shape[1])
        mask = torch.ones_like(ids) if mask is None else mask
        inputs = [F.pad(ids, padding), F.pad(mask, padding), positions.to(ids.device)]
        key = (length, positions.shape[1])
        with self._turn, torch.cuda.device(ids.device):
            if key not in self._graphs:
                self._graphs[key] = self._record(inputs)
            held, states, graph = self._graphs[key]
            for place, values in zip(held, inputs, strict=True):
                place.copy_(values)
            graph.replay()
            return states.clone()  # the next replay writes over them

    def _record(self, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor, Any]:
        """Return where a new graph reads its inputs, where it leaves its states, and the graph."""
        with torch.inference_mode(False), torch.no_grad():
            if self._joint is None:
                self._joint = self._join()
            held = [values.clone() for values in inputs]
            here, apart = torch.cuda.current_stream(), torch.cuda.Stream()
            apart.wait_stream(here)
            with torch.cuda.stream(apart):
                for _ in range(3):  # compiles what is to be compiled, and has libraries take their memory
                    self._run(*held)
            here.wait_stream(apart)
            self._memory = self._memory or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:  # "thread_local": the next batches may be packed in another thread
                with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                    states = self._run(*held)
            except RuntimeError as error:
                told = "The layers cannot be recorded as a CUDA graph (some kinds of 8-bit weights cannot)"
                raise RuntimeError(f'{told}; call optimize_for("throughput"). CUDA said: {error}') from error
        return held, states, graph

    def _join(self) -> list[JointLayer]:
        """Return what runs in the place of all layers but the last; nothing where one of them is not plain."""
        layers, implementation = self._retriever.backbone.layers[:-1], self._retriever.config._attn_implementation
        if not all(can_join(layer, implementation) for layer in layers):
            return []
        joint = [JointLayer(layer, implementation) for layer in layers]
        if self._compiled:
            _compile_each(joint)
        return joint

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        implementation = self._retriever.config._attn_implementation
        return run_layers(self._retriever.backbone, ids, mask, positions, implementation, self._joint or ())


class BidirectionalLayers(nn.Module):
    """What of a retriever runs its backbone's layers: as they are, compiled, or recorded."""

    backbone: Any
    config: Any
    _recorded: RecordedLayers | None = None

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding, [V, H]."""
        return self.backbone.embed_tokens

    @property
    def device(self) -> torch.device:
        """Where token ids belong: where the embedding runs, which is not where the weights of an offloaded one are."""
        return device_of(self.backbone.embed_tokens)

    def optimize_for(self, goal: str, compiled: bool = True) -> None:
        """Make the layers faster, once all weights are where they stay; the first texts of each kind then take longer.

        Args:
            goal: "throughput" has torch.compile write code for the layers, for batches of any size. "latency" does,
                too, and on a GPU records them as CUDA graphs, which run each single text of up to 1,024 tokens.
            compiled: False leaves torch.compile out, which needs a C++ compiler on a CPU, and Triton on a GPU.

        Raises:
            ValueError: another goal, or a model whose parts are moved for each text, or quantised at load.
        """
        if goal not in ("throughput", "latency"):
            raise ValueError(f'`goal` must be "throughput" or "latency", got {goal!r:.80}.')
        if getattr(self, "hf_quantizer", None) is not None or any(hasattr(part, "_hf_hook") for part in self.modules()):
            raise ValueError(
                "optimize_for needs a model on one device, not quantised at load; load it without device_map."
            )
        if compiled:
            compile_layers(self)
        self._recorded = RecordedLayers(self, compiled) if goal == "latency" else None

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the final states at every position, [B, L, H], with gradient."""
        return self._run_layers(input_ids, attention_mask, None)

    def states_at(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """Return the final states at the positions, [B, K, H], with gradient; arguments as of `run_layers`."""
        run = self._recorded if self._recorded is not None and self._recorded.takes(ids) else self._run_layers
        return run(ids, mask, positions)

    def _run_layers(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
        return run_layers(self.backbone, ids, mask, positions, self.config._attn_implementation)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._recorded is not None:  # a graph reads the weights where they were
            self._recorded.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_recorded": None}  # a copy has weights, and compiled code, of its own


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
    query = _heads(attention.q_proj(rows_at(normed, positions)), attention.head_dim)  # [B, heads, K, D]
    key = _heads(attention.k_proj(normed), attention.head_dim)  # [B, kv heads, L, D]
    value = _heads(attention.v_proj(normed), attention.head_dim)
    query = _rotate(query, rows_at(cos, positions), rows_at(sin, positions))
    key = _rotate(key, cos, sin)
    mixed = _attend(implementation, attention, query, key, value, bias)
    states = rows_at(hidden, positions) + attention.o_proj(mixed)
    return states + layer.mlp(layer.post_attention_layernorm(states))


def _attend(
    implementation: str,
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return transformers' attention of states [B, heads, N, D], its heads side by side: [B, N, heads * D]."""
    attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    dropout = attention.attention_dropout if attention.training else 0.0
    mixed, _ = attend(attention, query, key, value, bias, dropout=dropout, scaling=attention.scaling)
    return mixed.flatten(2)


def rows_at(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick positions [B, K] out of states [B, L, N]; returns [B, K, N]."""
    positions = positions.to(states.device)
    return states.expand(len(positions), -1, -1).gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def _heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
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
