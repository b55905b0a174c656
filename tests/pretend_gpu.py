"""A pretended GPU: tensors that say "cuda" and compute on the CPU, and an account of where the host waits for them.

What a real one refuses is refused: operations across devices. What would make the host wait is counted: reading a
value, sizes that depend on values, blocking copies. A copy to the host that does not block holds NaN (or zeros) until
its event has been waited for; a copy from the host that does not block must be of pinned memory. A graph that is
recorded runs its operations again, on the tensors that it saw; what would make the host wait is refused meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU = torch.device("cuda", 0)
VALUE_READING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_dim", "equal")


class Remote(torch.Tensor):
    """A tensor on the pretended GPU; `held` is what it holds."""

    held: torch.Tensor
    gpu: PretendGPU

    @staticmethod
    def __new__(cls, held: torch.Tensor, gpu: PretendGPU) -> Remote:
        made: Any = torch.Tensor._make_wrapper_subclass
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return made(cls, held.shape, **layout, device=GPU)

    def __init__(self, held: torch.Tensor, gpu: PretendGPU) -> None:
        self.held, self.gpu = held, gpu

    # torch's own of these six would ask CUDA which GPU is in use, or refuse
    def tolist(self) -> Any:
        self.gpu.waits["tolist"] += 1
        return self.held.tolist()

    def nonzero(self, **options: Any) -> Any:
        self.gpu.waits["nonzero"] += 1
        return Remote(self.held.nonzero(**options), self.gpu)

    def contiguous(self, **options: Any) -> Any:  # type: ignore[override]
        return self if self.held.is_contiguous(**options) else self.clone(memory_format=torch.contiguous_format)

    def copy_(self, values: Any, non_blocking: bool = False) -> Remote:
        if not isinstance(values, Remote):
            self.gpu.count_up(values, non_blocking)
        source = getattr(values, "held", values)
        self.gpu.now_and_at_replays(lambda: self.held.copy_(source))
        return self

    def __getitem__(self, index: Any) -> Remote:
        index = self.gpu.index(index)
        return Remote(self.gpu.now_and_at_replays(lambda: self.held[index]), self.gpu)

    def __setitem__(self, index: Any, value: Any) -> None:
        index, value = self.gpu.index(index), getattr(value, "held", value)
        self.gpu.now_and_at_replays(lambda: self.held.__setitem__(index, value))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        flat = tree_flatten((args, kwargs or {}))[0]
        gpu = next(value.gpu for value in flat if isinstance(value, Remote))
        return gpu.run(func, args, kwargs or {})


class PretendGPU(TorchDispatchMode):
    """Runs operations, and counts under their names those for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()  # up and down
        self.events = 0  # that were waited for
        self.on_the_way: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.graph: PretendGraph | None = None  # that is being recorded
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation where its tensors are."""
        name = func.overloadpacket.__name__
        flat, spec = tree_flatten((tuple(args), dict(kwargs)))
        remote = any(isinstance(value, Remote) for value in flat)
        device = kwargs.get("device")
        if name == "_to_copy" and device is not None and (torch.device(device).type == "cuda") != remote:
            return self.copy(args[0], kwargs)
        if not remote and not (device is not None and torch.device(device).type == "cuda"):
            return func(*args, **kwargs)
        if name == "copy_" and isinstance(args[1], Remote) and not isinstance(args[0], Remote):
            return args[0].copy_(self.copy(args[1], {}))
        for value in flat:
            if isinstance(value, torch.Tensor) and not isinstance(value, Remote) and value.dim():
                raise RuntimeError(f"{name}: expected all tensors on one device, found cuda:0 and cpu.")
        if name in VALUE_READING or name.startswith("_unique"):
            self.waits[name] += 1
        local = [value.held if isinstance(value, Remote) else value for value in flat]
        local = [torch.device("cpu") if value == GPU or value == torch.device("cuda") else value for value in local]
        inner_args, inner_kwargs = tree_unflatten(local, spec)
        found = self.now_and_at_replays(lambda: func(*inner_args, **inner_kwargs))
        if func._schema.is_mutable:  # in place: the tensor that was given
            return args[0]
        return tree_map(lambda value: Remote(value, self) if isinstance(value, torch.Tensor) else value, found)

    def now_and_at_replays(self, step: Callable[[], Any]) -> Any:
        """Take a step, which a graph that is being recorded takes again."""
        found = step()
        if self.graph is not None:
            self.graph.record(step, found)
        return found

    def index(self, index: Any) -> Any:
        """Return an index for the CPU; those of the host are copied, and those that say which are counted out."""
        flat, spec = tree_flatten(index)
        for value in flat:
            if isinstance(value, torch.Tensor):
                if not isinstance(value, Remote):
                    self.waits["index of the host's"] += 1
                if value.dtype == torch.bool:
                    self.waits["index by truth"] += 1
        return tree_unflatten([value.held if isinstance(value, Remote) else value for value in flat], spec)

    def count_up(self, source: torch.Tensor, apart: bool) -> None:
        """Count a copy to the GPU, and whether the host waits for it."""
        self.copies["up"] += 1
        if not (apart and getattr(source, "is_pinned_here", False)):
            self.waits["copy to the GPU"] += 1

    def copy(self, source: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """Copy between host and GPU."""
        apart = options.get("non_blocking", False)
        if not isinstance(source, Remote):
            self.count_up(source, apart)
            return Remote(source.clone(), self)
        self.copies["down"] += 1
        if not apart:
            self.waits["copy to the host"] += 1
            return source.held.clone()
        arriving = torch.zeros_like(source.held)
        if arriving.is_floating_point():
            arriving.fill_(torch.nan)
        self.on_the_way.append((arriving, source.held))
        return arriving

    def wait_stream(self, stream: Any) -> None:
        """Do nothing: there is one stream."""

    def record_event(self) -> Any:
        """Return what is waited for until all copies so far have arrived."""
        copies, self.on_the_way = self.on_the_way, []

        def synchronize() -> None:
            self.events += 1
            for arriving, values in copies:
                arriving.copy_(values)

        return mock.Mock(synchronize=synchronize)

    def move(self, module: nn.Module) -> None:
        """Put a module's weights and buffers on the GPU."""
        for part in module.modules():
            for name, weight in list(part._parameters.items()):
                if weight is not None:
                    part._parameters[name] = nn.Parameter(Remote(weight.detach(), self), requires_grad=False)
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[name] = Remote(buffer, self)


class PretendGraph:
    """A CUDA graph: operations whose results go where they went when it was recorded."""

    def __init__(self) -> None:
        self.steps: list[tuple[Callable[[], Any], list[torch.Tensor]]] = []
        self.gpu: PretendGPU | None = None
        self.waits: Counter[str] = Counter()  # before it was recorded

    def record(self, step: Callable[[], Any], found: Any) -> None:
        assert self.gpu is not None
        if self.gpu.waits != self.waits:
            raise RuntimeError(f"The host waits for the GPU while a graph is recorded: {self.gpu.waits - self.waits}.")
        self.steps.append((step, [value for value in tree_flatten(found)[0] if isinstance(value, torch.Tensor)]))

    @contextmanager
    def recorded(self, gpu: PretendGPU) -> Iterator[None]:
        gpu.graph, self.gpu, self.waits = self, gpu, gpu.waits.copy()
        try:
            yield
        finally:
            gpu.graph = None

    def replay(self) -> None:
        assert self.gpu is not None
        self.gpu.replays += 1
        for step, places in self.steps:
            found = [value for value in tree_flatten(step())[0] if isinstance(value, torch.Tensor)]
            for place, values in zip(places, found, strict=True):
                if place is not values and place.data_ptr() != values.data_ptr():
                    place.copy_(values)


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.is_pinned_here = True  # type: ignore[attr-defined]
    return tensor


@contextmanager
def pretended_gpu() -> Iterator[PretendGPU]:
    """Pretend that there is a GPU."""
    gpu = PretendGPU()
    stream: Callable[..., Any] = lambda device=None: gpu  # noqa: E731
    recording: Callable[..., Any] = lambda graph, **options: graph.recorded(gpu)  # noqa: E731
    with (
        mock.patch("torch.cuda.Stream", mock.MagicMock()),
        mock.patch("torch.cuda.stream", mock.MagicMock()),
        mock.patch("torch.cuda.device", mock.MagicMock()),
        mock.patch("torch.cuda.graph_pool_handle"),
        mock.patch("torch.cuda.CUDAGraph", PretendGraph),
        mock.patch("torch.cuda.graph", recording),
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.cuda.current_stream", stream),
        mock.patch("torch.Tensor.pin_memory", _pin),
        gpu,
    ):
        yield gpu
