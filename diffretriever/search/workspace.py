"""Memory that the blocks of a search share."""

from __future__ import annotations

import math

import torch


class Workspace:
    """Memory that is used again for each block, so that none is mapped and faulted in anew."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a float32 tensor of this shape; what `name` held before is overwritten."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # what is made in that mode can be written in it alone
                held = self._held[name] = torch.empty(size, dtype=torch.float32, device=self._device)
        return held[:size].view(shape)
