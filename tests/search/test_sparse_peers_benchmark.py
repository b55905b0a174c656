"""benchmarks/sparse_peers.py at a tiny size: every exact peer that is there finds what ours finds."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
from checkpoint_folders import ROOT

pytest.importorskip("scipy")


@pytest.mark.once
def test_what_it_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script
    spec = importlib.util.spec_from_file_location("sparse_peers", ROOT / "benchmarks" / "sparse_peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = ["--sizes", "300", "--num-queries", "3", "--top-k", "5", "--peers", "ours", "scipy"]
    monkeypatch.setattr(sys, "argv", ["sparse_peers.py", *options])
    module.main()
    printed = capsys.readouterr().out
    assert "300 passages of 48 terms, 3 queries" in printed
    assert re.findall(r"(\w+) .* (\S+) % of the exact 5 best", printed) == [("ours", "100.0"), ("scipy", "100.0")]
