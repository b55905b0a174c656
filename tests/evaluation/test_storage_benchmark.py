"""benchmarks/storage.py at a tiny size: what it measures is what is there, and its file can be drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diffretriever.evaluation.plots.scaling import plot_scaling, read_points


@pytest.fixture
def storage(load_benchmark: Callable[[str], Any]) -> ModuleType:
    return load_benchmark("storage")


def test_bytes_and_latency(
    storage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = (10, 30)
    monkeypatch.setattr(storage, "SHARD", 20)
    monkeypatch.setattr(
        sys, "argv",
        ["storage.py", "--sizes", *map(str, sizes), "--hidden-size", "64", "--terms", "8", "--num-queries", "2",
         "--device", "cpu", "--scratch", str(tmp_path), "--json", str(tmp_path / "storage.json")],
    )  # fmt: skip
    storage.main()
    points, hardware = read_points(tmp_path / "storage.json")
    assert hardware
    assert [(point["num_passage_masks"], point["passages"]) for point in points] == [
        (masks, size) for masks in (1, 4, 16) for size in sizes
    ]
    for point in points:
        vectors = point["passages"] * (point["num_passage_masks"] * 64 * 2 + 8 * (4 + 2))  # float16, int32 and float16
        assert vectors < point["bytes"] < vectors + 20_000  # ids, headers, manifest
        assert point["bytes_per_passage"] == point["bytes"] / point["passages"]
        assert point["latency_ms"] > 0
    assert len(plot_scaling(points, hardware).axes) == 2
    assert f"{points[0]['bytes'] / 1e6:.1f} MB" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["storage.json"]  # the stores are gone
    assert json.loads((tmp_path / "storage.json").read_text())["hidden_size"] == 64
