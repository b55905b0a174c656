"""The hardware that a figure was measured on, in words, and the clocks to measure with."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch

# "cpu" is the time that the processors worked: where others use the machine, one thread takes what it would alone
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def describe(device: str | torch.device) -> str:
    """Return the processor's or GPU's name, threads and torch's version, in one line."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()
    threads = torch.get_num_threads()
    return f"{name}; {threads} thread{'s' if threads > 1 else ''}; torch {torch.__version__}"


def arithmetic_unit(dtype: torch.dtype, device: str | torch.device) -> str:
    """Return what of a processor multiplies matrices of a dtype; "" for a GPU, whose name says it."""
    if torch.device(device).type != "cpu":
        return ""
    if dtype != torch.bfloat16:
        return str(torch.backends.cpu.get_cpu_capability())
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return "AMX"
    if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "AVX512_BF16"
    return f"{torch.backends.cpu.get_cpu_capability()}, which has no products of bfloat16"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
