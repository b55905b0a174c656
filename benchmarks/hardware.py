"""The hardware that a figure was measured on, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def describe(device: str | torch.device) -> str:
    """Return the processor's or GPU's name, threads and torch's version, in one line."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()
    return f"{name}; {torch.get_num_threads()} thread(s); torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
