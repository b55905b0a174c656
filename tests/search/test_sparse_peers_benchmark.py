"""benchmarks/sparse_peers.py at a tiny size: every exact peer that is there finds what ours finds."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

pytest.importorskip("scipy")


@pytest.mark.once
def test_what_it_prints(
    load_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_benchmark("sparse_peers")
    options = ["--sizes", "300", "--num-queries", "3", "--top-k", "5", "--peers", "ours", "scipy"]
    monkeypatch.setattr(sys, "argv", ["sparse_peers.py", *options])
    module.main()
    printed = capsys.readouterr().out
    assert "300 passages of 48 terms, 3 queries" in printed
    assert re.findall(r"(\w+) .* (\S+) % of the exact 5 best", printed) == [("ours", "100.0"), ("scipy", "100.0")]
