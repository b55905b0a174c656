"""benchmarks/gpu.py at its tiny size, on a CPU: every row that a GPU would have is there; one that fails stops none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.once]


@pytest.fixture
def benchmark(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("gpu")


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, file: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run it without torch.compile; returns the exit code and what it wrote."""
    words = ["gpu.py", "--tiny", "--no-compile", "--device", "cpu", "--json", str(file), *options]
    monkeypatch.setattr(sys, "argv", words)
    return benchmark.main(), json.loads(file.read_text())


def test_every_row(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, content = run(benchmark, monkeypatch, tmp_path / "gpu.json")
    assert (status, content["left_out"], content["limits"]["from"]) == (0, [], "measured")
    rows = {shape: [row for row in content["rows"] if row["shape"] == shape] for shape in ("LLaDA-8B", "Dream-7B")}
    for shape, budgets in (("LLaDA-8B", (4, 1, 16)), ("Dream-7B", (4,))):
        encoding = [row for row in rows[shape] if row["kind"] == "encoding"]
        loaded = {(row["masks"], row["sparse"]) for row in encoding if row["way"] == "as loaded"}
        assert loaded == {(masks, sparse) for masks in budgets for sparse in (False, True)}
        assert encoding[-1]["way"] == "plain, head everywhere"
        assert all(row["tokens_per_second"] > 0 and row["share_of_peak"] > 0 for row in encoding)
        queries = [row for row in rows[shape] if row["kind"] == "one query"]
        assert [(row["way"], row["masks"]) for row in queries] == [
            *(("as loaded", masks) for masks in budgets),
            ("recorded", 4),
        ]
        assert all(0 < row["p50_ms"] <= row["p99_ms"] and row["limit_ms"] > 0 for row in queries)
    (words,) = (row for row in rows["LLaDA-8B"] if row["kind"] == "one query by words")
    assert {(ratio["words"], ratio["masks"]) for ratio in words["ratios"]} >= {(4, 4), (20, 4)}
    assert "PromptReps of 20 / 4 masks" in capsys.readouterr().out


def test_a_row_that_fails_says_why_and_the_others_go_on(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(benchmark, "plain_way", fail)
    monkeypatch.setattr(benchmark, "systems_of", fail)
    status, content = run(benchmark, monkeypatch, tmp_path / "gpu.json", "--shape", "LLaDA-8B")
    failed = {row["way"]: row["failed"] for row in content["rows"] if "failed" in row}
    assert status == 1
    assert failed["plain, head everywhere"] == "RuntimeError: CUDA out of memory"
    assert content["rows"][-1]["way"] == "recorded"
    assert "FAILED: RuntimeError: CUDA out of memory" in capsys.readouterr().out


def test_when_the_time_is_over_rows_are_left_out(benchmark: Any, tmp_path: Path) -> None:
    options = benchmark.argparse.Namespace(seconds=0.0, device="cpu", dtype=None, json=tmp_path / "gpu.json")
    account = benchmark.Account(options, {"flops": 1.0, "bytes": 1.0})
    assert not account.add("encoding", "LLaDA-8B", "as loaded", lambda row: row.update(ran=True))
    assert account.content["rows"] == []
    assert account.content["left_out"] == [{"kind": "encoding", "shape": "LLaDA-8B", "way": "as loaded"}]
