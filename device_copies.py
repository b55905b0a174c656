"""What goes up to an accelerator and comes back, each in one copy: a copy's start takes longer than its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


def runs_apart(device: torch.device) -> bool:
    """Whether the host need not wait for what it has a device do: CUDA's (and ROCm's) queue work and copies."""
    return device.type == "cuda"


class Packed(dict[str, torch.Tensor]):
    """Tensors by name that lie side by side in one piece of memory.

    Args:
        memory: uint8 [N], on any device.
        layout: name, dtype and shape of each, those of the most bytes an element first, so that all are aligned.

    >>> packed = Packed.of({"truth": torch.tensor([True, False]), "ids": torch.tensor([[7, 8]])})
    >>> packed.memory.shape, list(packed)
    (torch.Size([18]), ['ids', 'truth'])
    >>> packed.at(packed.memory.clone())["ids"]
    tensor([[7, 8]])
    """

    def __init__(self, memory: torch.Tensor, layout: Sequence[tuple[str, torch.dtype, torch.Size]]) -> None:
        super().__init__()
        self.memory, self._layout, begin = memory, layout, 0
        for name, dtype, shape in layout:
            end = begin + shape.numel() * dtype.itemsize
            self[name] = memory[begin:end].view(dtype).view(shape)
            begin = end

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Packed:
        """Copy tensors of one device into one piece of its memory."""
        ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
        memory = torch.cat([values.flatten().view(torch.uint8) for _, values in ordered])
        return cls(memory, [(name, values.dtype, values.shape) for name, values in ordered])

    def at(self, memory: torch.Tensor) -> Packed:
        """Return the tensors of another piece of memory with the same layout."""
        return Packed(memory, self._layout)


class HostBatch(NamedTuple):
    """All that a device needs to know of B texts, on the CPU.

    Args:
        ids: int64 [B, L], padded.
        mask: int64 [B, L], 1 for real tokens; None when no row is padded.
        positions: int64 [B, K], where the masks are.
        exists: bool [B, K], as `batching.existing_masks`; None where all rows have K.
        columns, allowed: int64 [C] and bool [B, C], as `sparse_head.content_columns`; None for the whole vocabulary.
        packed: the same once more, in pinned memory, from which a device copies by itself; None where it is not yet.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor
    exists: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    packed: Packed | None = None

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor]) -> HostBatch:
        """Put together what `parts` returned, wherever it lies now."""
        mask, exists, columns, allowed = (parts.get(name) for name in ("mask", "exists", "columns", "allowed"))
        return cls(parts["ids"], mask, parts["positions"], exists, columns, allowed)

    def parts(self) -> dict[str, torch.Tensor]:
        """Return what is there, by name."""
        return {name: part for name, part in zip(self._fields[:-1], self[:-1], strict=True) if part is not None}

    def in_pinned_memory(self) -> Packed:
        """Return `packed`, made here where it is not yet."""
        if self.packed is not None:
            return self.packed
        packed = Packed.of(self.parts())
        return packed.at(packed.memory.pin_memory())

    def pinned(self) -> HostBatch:
        """Return it with `packed`."""
        return self._replace(packed=self.in_pinned_memory())

    def on(self, device: torch.device) -> HostBatch:
        """Return it on a device; the copy to one that runs apart is only begun."""
        if not runs_apart(device):
            return HostBatch.of({name: part.to(device) for name, part in self.parts().items()})
        packed = self.in_pinned_memory()
        return HostBatch.of(packed.at(packed.memory.to(device, non_blocking=True)))
