"""benchmarks/approximate.py at a tiny size: exact indexes find all, and made passages lie around the real ones."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffretriever.store.store import ShardContents, write_store

pytest.importorskip("qdrant_edge")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is not there yet, in memory where that can be: the engine forces much to the disk."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path))
    yield folder / "made"
    shutil.rmtree(folder)


@pytest.mark.once
def test_what_it_prints(
    load_benchmark: Callable[[str], ModuleType],
    tmp_path: Path,
    scratch: Path,
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
    fast = ["--num-queries", "3", "--rounds", "1", "--scratch", str(scratch)]
    monkeypatch.setattr(sys, "argv", ["approximate.py", *arguments, *fast])
    module.main()
    printed = capsys.readouterr().out
    assert "150 passages, K_p 2, H 16; 3 queries, K_q 2" in printed
    assert [float(found) >= 0.98 for found in re.findall(r"recall@100 (\S+)", printed)] == [True] * 4
    made = torch.cat(list(module.passages(real.half(), 150, 0.5))).float()
    assert torch.equal(made[:30], real.half().float())
    nearest = torch.einsum("pkh,rkh->prk", made[30:], made[:30]).amax(dim=1)
    assert nearest.mean() == pytest.approx(0.89, abs=0.03)


@pytest.mark.once
def test_a_made_store_is_taken_again_for_the_same_passages_alone(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = load_benchmark("approximate")
    real = torch.nn.functional.normalize(torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    kept = [
        module.made_store(tmp_path, vectors, 6, noise) for vectors, noise in ((real, 0.5), (real, 1.0), (-real, 0.5))
    ]
    assert len({store.folder for store in kept}) == 3
    before = sorted(tmp_path.rglob("*"))
    assert module.made_store(tmp_path, real, 6, 0.5).folder == kept[0].folder
    assert sorted(tmp_path.rglob("*")) == before
