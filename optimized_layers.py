"""A retriever's layers made faster: compiled, with fewer and wider products, or recorded with all that follows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .batching import in_eval_mode
from .bidirectional_layers import HOOKS, attend, can_trim, device_of, rotate, run_layers, split_heads
from .device_copies import HostBatch, Packed
from .sparse_head import vectors_of

PLAIN_WEIGHTS = (nn.Parameter,)  # what is quantised has a class of its own


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
        query, key, value = (split_heads(part, attention.head_dim) for part in joint.split(widths, dim=-1))
        query, key = (rotate(states, *position_embeddings) for states in (query, key))
        mixed = attend(self._implementation, attention, query, key, value, attention_mask)
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


class RecordedTexts:
    """Encodes one text at a time by what was recorded: a CUDA graph for each of a few lengths.

    A text's layers, and what makes vectors of their states, are some hundred small operations, which take longer to be
    launched than to run; a graph is launched once. Its sizes are fixed, so that a text is padded to the next of
    `LENGTHS`, which changes its vectors by rounding only, and its time little: that is what reading the weights takes.
    All that it reads and leaves lies in one piece of memory each.

    Args:
        retriever: a DiffRetriever.
        compiled: whether its layers are; those in their place, `JointLayer`s, are then, too.
    """

    LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024)

    def __init__(self, retriever: Any, compiled: bool) -> None:
        self._retriever, self._compiled = retriever, compiled
        self._joint: list[JointLayer] | None = None  # None: to be made
        self._graphs: dict[Any, tuple[torch.Tensor, Packed, Any]] = {}
        self._memory: Any = None  # all graphs', as one runs at a time
        self._turn = Lock()

    def takes(self, batch: HostBatch) -> bool:
        """Whether a batch is one text for a GPU, short enough, and neither gradient nor autocast is asked for."""
        if len(batch.ids) > 1 or self._retriever.device.type != "cuda" or batch.ids.shape[1] > self.LENGTHS[-1]:
            return False
        words = 0 if batch.columns is None else len(batch.columns)
        plain = words <= self._length(batch) and not any(getattr(self._retriever, hooks) for hooks in HOOKS)
        return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")

    def forget(self) -> None:
        """Record anew: the weights are about to change their place."""
        self._graphs.clear()
        self._joint = self._memory = None

    def __call__(self, batch: HostBatch, top_k: int | None) -> Packed:
        """Return what `sparse_head.vectors_of` does of a batch on the CPU, if `takes` takes it; nothing here waits."""
        config, device = self._retriever.config, self._retriever.device
        batch = self._padded(batch)
        options = (top_k, config.normalize, config.num_denoise_steps, config.denoise_confidence)
        key = (*((name, part.shape) for name, part in batch.parts().items()), *options)
        packed = batch.in_pinned_memory()
        with self._turn, torch.cuda.device(device):
            if key not in self._graphs:
                self._graphs[key] = self._record(packed, device, top_k)
            read, left, graph = self._graphs[key]
            read.copy_(packed.memory, non_blocking=True)
            graph.replay()
            return left.at(left.memory.clone())  # the next replay writes over it

    def _length(self, batch: HostBatch) -> int:
        return next(length for length in self.LENGTHS if batch.ids.shape[1] <= length)

    def _padded(self, batch: HostBatch) -> HostBatch:
        """Return a text with the tokens, and the words of its own, that a graph's sizes ask for."""
        length = self._length(batch)
        more = (0, length - batch.ids.shape[1])
        mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
        batch = batch._replace(ids=F.pad(batch.ids, more), mask=F.pad(mask, more), packed=None)
        if batch.columns is None or batch.allowed is None:
            return batch
        more = (0, length - len(batch.columns))
        return batch._replace(columns=F.pad(batch.columns, more), allowed=F.pad(batch.allowed, more))

    def _record(self, packed: Packed, device: torch.device, top_k: int | None) -> tuple[torch.Tensor, Packed, Any]:
        """Return where a new graph reads a text, where it leaves the vectors, and the graph."""
        with torch.inference_mode(False), torch.no_grad(), in_eval_mode(self._retriever):
            if self._joint is None:
                self._joint = self._join()
            read = packed.memory.to(device, non_blocking=True)
            batch = HostBatch.of(packed.at(read))
            here, apart = torch.cuda.current_stream(), torch.cuda.Stream()
            apart.wait_stream(here)
            with torch.cuda.stream(apart):
                for _ in range(3):  # compiles what is to be compiled, and has libraries take their memory
                    Packed.of(vectors_of(self._retriever, batch, top_k, self._states))
            here.wait_stream(apart)
            self._memory = self._memory or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:  # "thread_local": the next batches may be packed in another thread
                with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                    left = Packed.of(vectors_of(self._retriever, batch, top_k, self._states))
            except RuntimeError as error:
                told = "The layers cannot be recorded as a CUDA graph (some kinds of 8-bit weights cannot)"
                raise RuntimeError(f'{told}; call optimize_for("throughput"). CUDA said: {error}') from error
        return read, left, graph

    def _join(self) -> list[JointLayer]:
        """Return what runs in the place of all layers but the last; nothing where one of them is not plain."""
        layers, implementation = self._retriever.backbone.layers[:-1], self._retriever.config._attn_implementation
        if not all(can_join(layer, implementation) for layer in layers):
            return []
        joint = [JointLayer(layer, implementation) for layer in layers]
        if self._compiled:
            _compile_each(joint)
        return joint

    def _states(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        implementation = self._retriever.config._attn_implementation
        return run_layers(self._retriever.backbone, ids, mask, positions, implementation, self._joint or ())


class BidirectionalLayers(nn.Module):
    """What of a retriever runs its backbone's layers: as they are, compiled, or recorded."""

    backbone: Any
    config: Any
    _recorded: RecordedTexts | None = None

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
                too, and on a GPU records all that a single text of up to 1,024 tokens takes there as a CUDA graph.
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
        self._recorded = RecordedTexts(self, compiled) if goal == "latency" else None

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the final states at every position, [B, L, H], with gradient."""
        return run_layers(self.backbone, input_ids, attention_mask, None, self.config._attn_implementation)

    def states_at(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """Return the final states at the positions, [B, K, H], with gradient; arguments as of `run_layers`."""
        return run_layers(self.backbone, ids, mask, positions, self.config._attn_implementation)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._recorded is not None:  # a graph reads the weights where they were
            self._recorded.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_recorded": None}  # a copy has weights, and compiled code, of its own
