"""The table of the small releases, from made-up evaluations."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import fresh
import pytest

pytest.importorskip("ir_measures")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "small_releases.py"
QUERIES = [f"q{number}" for number in range(40)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty queries, each with one judged passage."""
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    passages = [{"_id": f"p-{q}", "text": " ".join(["x"] * (40 if n % 2 else 29))} for n, q in enumerate(QUERIES)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": q, "text": "x"}) + "\n" for q in QUERIES))
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\tp-{q}\t1" for q in QUERIES)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write(folder: Path, row: str, seed: int, **levels: float) -> None:
    """Write an evaluation whose modes have these means; every second query lies above, every other below."""
    values = {
        mode: {"nDCG@10": {q: level + (0.1 if number % 2 else -0.1) for number, q in enumerate(QUERIES)}}
        for mode, level in levels.items()
    }
    (folder / f"{row}.{seed}.toy.queries.json").write_text(json.dumps(values))


def run(results: Path, data: Path) -> subprocess.CompletedProcess[str]:
    return fresh.run([SCRIPT, "--input", results, "--data", f"toy={data}"])


def test_means_spread_and_claims(tmp_path: Path, data: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    write(results, "llada-zero-single", 0, single_dense=0.5, sparse_max=0.6, bm25=0.65)
    for seed, dense in ((42, 0.49), (43, 0.52), (44, 0.52)):
        tuned = {"fusion_single_sparse_max@0.4": 0.74} if seed == 42 else {}  # of 43 and 44 the weight 0.5 is the best
        fused = {"fusion_single_sparse_max": 0.71, **tuned}
        write(results, "llada-single", seed, single_dense=dense, sparse_max=0.7, bm25=0.65, **fused)
    write(results, "llada-mean", 42, single_dense=0.5, multi_dense=0.5)

    found = run(results, data)
    assert found.returncode == 0, found.stderr
    rows = [line.strip("| ").split(" | ") for line in found.stdout.splitlines() if line.startswith("| ")]
    made = {row[1]: row for row in rows}
    assert made["`diffretriever-llada-tiny-single`"][2] == "0.510 (0.490-0.520)"
    assert made["`diffretriever-llada-tiny-single`"][3] == "0.700 (0.700-0.700)"
    assert made["`diffretriever-llada-tiny-single`"][4:6] == ["0.710 (0.710-0.710)", "0.720 (0.710-0.740)"]
    assert made["LLaDA, fine-tuned, mean pooling (DiffEmbed)"][2] == "0.500"
    claims = {row[0]: row[1:] for row in rows}
    assert claims["llada, single, dense: fine-tuned > zero-shot"] == ["+0.010", "0", "2 of 3"]
    assert claims["llada, single, sparse: fine-tuned > zero-shot"] == ["+0.100", "0", "3 of 3"]
    assert claims["llada, single: fused > BM25"] == ["+0.060", "0", "3 of 3"]
    assert claims["llada, single: fused, tuned > BM25"] == ["+0.070", "0", "3 of 3"]
    assert not any("fused + BM25" in claim or "multi" in claim for claim in claims)  # nothing was measured there


def test_groups_by_the_length_of_what_is_to_be_found(tmp_path: Path, data: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    write(results, "llada-zero-single", 0, single_dense=0.5, sparse_max=0.6, bm25=0.65)
    for seed, dense in ((42, 0.4), (43, 0.6)):
        write(results, "llada-single", seed, single_dense=dense)
    found = run(results, data)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-5:] == [
        "| | 0 to 29 (20) | 30 to 59 (20) | 60 to 89 (0) | 90 and more (0) |",
        "|---|---|---|---|---|",
        "| BM25 | 0.550 | 0.750 |  |  |",
        "| LLaDA, zero-shot, K = 1, sparse | 0.500 | 0.700 |  |  |",
        "| `diffretriever-llada-tiny-single`, dense | 0.400 | 0.600 |  |  |",
    ]


def test_an_empty_folder_is_named(tmp_path: Path, data: Path) -> None:
    found = run(tmp_path, data)
    assert found.returncode == 1
    assert (
        f"FileNotFoundError: {tmp_path}: no ROW.SEED.toy.queries.json of `diffretriever evaluate --bm25`"
        in found.stderr
    )
