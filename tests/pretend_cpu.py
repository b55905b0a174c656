"""A CPU that multiplies bfloat16 faster than float32, or one that does not: the default dtype goes by it."""

from __future__ import annotations

import pytest
import torch

UNITS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def pretend_cpu(patch: pytest.MonkeyPatch, *units: str) -> None:
    """Pretend that the CPU has these units of UNITS and no others."""
    for name in UNITS:
        patch.setattr(torch.cpu, name, lambda name=name: name in units, raising=False)
