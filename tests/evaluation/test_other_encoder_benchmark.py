"""benchmarks/other_encoder.py: what it says of a small encoder is what a plain loop over its vectors finds."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from small_benchmark import CORPUS, QUERIES, qrels_of, write_benchmark
from small_encoder import save_encoder

TEXTS = {name: f"{title}. {text}" if title else text for name, (title, text) in CORPUS.items()}


def ndcg(ranked: list[str], grades: dict[str, int]) -> float:
    gain = sum(grades.get(name, 0) / math.log2(place + 2) for place, name in enumerate(ranked[:10]))
    return gain / sum(grade / math.log2(place + 2) for place, grade in enumerate(sorted(grades.values(), reverse=True)))


@pytest.mark.once
def test_what_it_finds(
    load_benchmark: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = save_encoder(tmp_path / "encoder", " ".join([*TEXTS.values(), *QUERIES.values()]).split(), seed=3)
    data, file = write_benchmark(tmp_path / "data"), tmp_path / "queries.json"
    arguments = ["--model", str(encoder), "--data", str(data), "--bm25", "--per-query", str(file)]
    monkeypatch.setattr(sys, "argv", ["other_encoder.py", *arguments])
    load_benchmark("other_encoder").main()
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert list(found) == ["dense", "bm25", "dense+bm25@0.5"]
    model, qrels = SentenceTransformer(str(encoder), device="cpu"), qrels_of("test")
    vectors = dict(zip(TEXTS, model.encode(list(TEXTS.values()), normalize_embeddings=True), strict=True))
    for query, grades in qrels.items():
        asked = model.encode(QUERIES[query], normalize_embeddings=True)
        others = [name for name in TEXTS if name != query]  # in BEIR a passage of the query's id is the query itself
        ranked = sorted(others, key=lambda name: -float(asked @ vectors[name]))
        assert found["dense"]["nDCG@10"][query] == pytest.approx(ndcg(ranked, grades)), query
    for name, figures in found.items():
        mean = sum(figures["nDCG@10"].values()) / len(qrels)
        assert f"  {name:15s} nDCG@10 {mean:.4f}" in printed
