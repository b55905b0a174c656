"""The script that builds DATA/debian, on made-up package lists."""

from __future__ import annotations

import json
import lzma
import runpy
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import ROOT

from diffretriever.data.benchmark import read_benchmark

main: Any = runpy.run_path(str(ROOT / "examples" / "debian_benchmark.py"))["main"]


@pytest.fixture
def lists(tmp_path: Path) -> list[str]:
    """Ten sources of two packages each, one with a version of its own, and what is to be left out."""
    names = [f"tool{source}{kind}" for source in range(10) for kind in ("", "-doc")]
    packages = [f"Package: {name}\nSource: {name[:5]} (1.0)\nSection: utils\n" for name in names]
    words = " {name} sorts\n  files by name.\n .\n It is one of many tools here.\n"
    told = [f"Package: {name}\nDescription-en: what {name} does\n" + words.format(name=name) for name in names]
    told += [
        "Package: short\nDescription-en: a short one\n Too short.\n",
        "Package: gone\nDescription-en: x\n" + " word" * 9,
    ]
    (tmp_path / "Packages").write_text("\n".join([*packages, "Package: short\n"]))
    (tmp_path / "Translation-en.xz").write_bytes(lzma.compress("\n".join(told).encode()))
    return ["--packages", str(tmp_path / "Packages"), "--translations", str(tmp_path / "Translation-en.xz")]


def test_built_from_lists(lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "debian"
    main([*lists, "--output", str(out), "--test", "3", "--dev", "2", "--passages", "8"])
    assert "8 passages, 5 queries, 5 training pairs" in capsys.readouterr().out
    corpus = {line["_id"]: line["text"] for line in map(json.loads, (out / "corpus.jsonl").open())}
    queries = {line["_id"]: line["text"] for line in map(json.loads, (out / "queries.jsonl").open())}
    pairs = list(map(json.loads, (out / "train_pairs.jsonl").open()))
    assert len(corpus) == 8
    assert all(text == f"{name} sorts files by name. It is one of many tools here." for name, text in corpus.items())
    assert all(text == f"what {name[2:]} does" for name, text in queries.items())
    asked = {name[2:7] for name in queries}
    assert len(asked) == 5
    assert {pair["source"] for pair in pairs}.isdisjoint(asked)
    assert all(pair["in_corpus"] == (pair["_id"] in corpus) for pair in pairs)
    for split, count in (("test", 3), ("dev", 2)):
        read = read_benchmark(out, split)
        assert len(read.qrels) == count
        assert all(answers == {query[2:]: 1} for query, answers in read.qrels.items())


def test_too_few_sources(lists: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="10 sources are too few"):
        main([*lists, "--output", str(tmp_path / "debian")])
