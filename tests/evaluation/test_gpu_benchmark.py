"""benchmarks/gpu.py at its tiny size, on a CPU: every row that a GPU would have is there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.once
def test_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--device", "cpu", "--json", str(tmp_path / "gpu.json")])
    module.main()
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["limits"]["from"] == "measured"
    assert not content["cut_short"]
    rows = content["rows"]
    for shape in ("LLaDA-8B", "Dream-7B"):
        encoding = [row for row in rows if row["kind"] == "encoding" and row["shape"] == shape]
        ours = {(row["masks"], row["sparse"]) for row in encoding if row["way"] == "ours"}
        assert ours == {(masks, sparse) for masks in (1, 4, 16) for sparse in (False, True)}
        assert [row["way"] for row in encoding][6:] == ["plain, head everywhere"]
        assert all(row["tokens_per_second"] > 0 and row["share_of_peak"] > 0 for row in encoding)
        queries = [row for row in rows if row["kind"] == "one query" and row["shape"] == shape]
        assert [row["masks"] for row in queries] == [1, 4, 16]
        assert all(0 < row["p50_ms"] <= row["p99_ms"] and row["limit_ms"] > 0 for row in queries)
    pairs = {(row["words"], row["masks"]) for row in rows if row["kind"] == "words / masks"}
    assert pairs >= {(4, 4), (20, 4)}
    assert "PromptReps of 20 / 4 masks" in capsys.readouterr().out
