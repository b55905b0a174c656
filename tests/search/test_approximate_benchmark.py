"""benchmarks/approximate.py at a tiny size: exact indexes find all, and made passages lie around the real ones."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffretriever.store.store import ShardContents, write_store

pytest.importorskip("qdrant_edge")


@pytest.mark.once
def test_what_it_prints(
    load_benchmark: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = load_benchmark("approximate")
    real = torch.nn.functional.normalize(torch.randn(30, 2, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    for name, side in (("store", "passage"), ("queries", "query")):
        shard = ShardContents([f"{name} {row}" for row in range(30)], real, torch.zeros(30, 1), torch.zeros(30, 1))
        write_store(tmp_path / name, [shard], {"dtype": "float32", "side": side})
    arguments = ["--store", "store", "--queries", "queries", "--sizes", "150", "--indexes", "plain", "scalar"]
    monkeypatch.chdir(tmp_path)
    memory = ["--scratch", "/dev/shm"] if os.path.isdir("/dev/shm") else []  # the engine forces much to the disk
    monkeypatch.setattr(sys, "argv", ["approximate.py", *arguments, "--num-queries", "3", "--rounds", "1", *memory])
    module.main()
    printed = capsys.readouterr().out
    assert "150 passages, K_p 2, H 16; 3 queries, K_q 2" in printed
    assert [float(found) >= 0.98 for found in re.findall(r"recall@100 (\S+)", printed)] == [True] * 4
    made = torch.cat(list(module.passages(real.half(), 150, 0.5))).float()
    assert torch.equal(made[:30], real.half().float())
    nearest = torch.einsum("pkh,rkh->prk", made[30:], made[:30]).amax(dim=1)
    assert nearest.mean() == pytest.approx(0.89, abs=0.03)
