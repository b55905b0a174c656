"""nDCG@10 along the way of a training, against plain loops and against `evaluate`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffretriever.data.benchmark import read_benchmark
from diffretriever.encode.encode_store import encode_store
from diffretriever.evaluation.evaluate import Options, evaluate
from diffretriever.evaluation.metrics import means
from diffretriever.evaluation.small_task import NAMES, SmallTask, read_small_task

GRADES = {"q0": {"p1": 2, "p4": 1}, "q1": {"p0": 1, "p3": 0}, "q2": {"p2": 0}}  # q2: nothing relevant


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "qrels").mkdir()
    passages = [{"_id": f"p{n}", "text": f"passage {n}"} for n in range(40)] + [{"_id": "q1", "text": "query 1"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    queries = [{"_id": f"q{n}", "text": f"query {n}"} for n in range(4)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    lines = [f"{query}\t{passage}\t{grade}\n" for query, row in GRADES.items() for passage, grade in row.items()]
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return tmp_path


def encode(texts: Sequence[str], is_query: bool) -> dict[str, torch.Tensor]:
    """Vectors that follow from the text alone."""
    rows = []
    for text in texts:
        generator = torch.Generator().manual_seed(sum(map(ord, text)) + 1000 * is_query)
        rows.append(torch.randn(1, 6, generator=generator))
    hidden = torch.nn.functional.normalize(torch.stack(rows), dim=-1)  # [N, 1, H]
    values, indices = hidden[:, 0].abs().sort(dim=1, descending=True)
    return {"repr_hidden": hidden, "sparse_indices": indices[:, :3], "sparse_values": values[:, :3]}


def expected(task: SmallTask, dense: bool) -> float:
    names = list(task.passages)
    queries, passages = encode(["query 0", "query 1", "query 2"], True), encode(list(task.passages.values()), False)
    total = 0.0
    for row, query in enumerate(GRADES):
        scores = {}
        for column, name in enumerate(names):
            if dense:
                scores[name] = float(queries["repr_hidden"][row, 0] @ passages["repr_hidden"][column, 0])
            else:
                sides = [
                    dict(zip(side["sparse_indices"][n].tolist(), side["sparse_values"][n].tolist(), strict=True))
                    for side, n in ((queries, row), (passages, column))
                ]
                scores[name] = sum(value * sides[1].get(term, 0.0) for term, value in sides[0].items())
        scores.pop(query, None)  # BEIR's rule: the query itself is no answer
        best = sorted(scores, key=lambda name: -scores[name])[:10]
        best = [name for name in best if dense or scores[name] > 0]
        gains = [GRADES[query].get(name, 0) / math.log2(rank + 2) for rank, name in enumerate(best)]
        ideal = [grade / math.log2(rank + 2) for rank, grade in enumerate(sorted(GRADES[query].values(), reverse=True))]
        total += sum(gains) / sum(ideal) if sum(ideal) else 0.0
    return total / 3


@pytest.mark.parametrize("limit", [None, 20, 3])
def test_figures_against_loops(folder: Path, limit: int | None) -> None:
    task = read_small_task(folder, "dev", limit)
    figures = task.evaluate(encode)
    assert figures["dense"] == pytest.approx(expected(task, dense=True), abs=1e-6)
    assert figures["sparse"] == pytest.approx(expected(task, dense=False), abs=1e-6)
    assert 0 < figures["fused"] < 1


def test_figures_are_those_of_evaluate(folder: Path, load_release: Callable[..., Any], tmp_path: Path) -> None:
    model = load_release("tiny-llada", "llada-q4p4")
    found = read_small_task(folder, "dev").evaluate(model.encode_texts)
    store = encode_store(model, folder, tmp_path / "store", dtype="float32")
    options = Options(modes=list(NAMES.values()), metrics=["nDCG@10"])
    evaluation, _ = evaluate(model, read_benchmark(folder, "dev"), store, options)
    for name, mode in NAMES.items():
        assert found[name] == pytest.approx(means(evaluation.rows[mode])["nDCG@10"], abs=1e-6), name


def test_the_fusions_weight(folder: Path) -> None:
    task = read_small_task(folder, "dev")
    found = {weight: replace(task, fusion_weight=weight).evaluate(encode) for weight in (None, 0.0, 0.5, 1.0)}
    assert found[None] == found[0.5]
    assert found[1.0]["fused"] == pytest.approx(found[1.0]["dense"])
    assert found[0.0]["fused"] == pytest.approx(found[0.0]["sparse"])


def test_a_corpus_of_another_benchmark(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text('{"_id": "x", "text": "y"}\n')
    with pytest.raises(ValueError, match="the corpus holds none of the 5 passages judged in split 'dev'"):
        read_small_task(folder, "dev", 3)


def test_an_id_that_occurs_twice_is_refused(folder: Path) -> None:
    with (folder / "corpus.jsonl").open("a") as stream:
        stream.write('{"_id": "p39", "text": "another"}\n')
    with pytest.raises(ValueError, match=r"corpus.jsonl, line 42: the id 'p39' is already that of .*line 40"):
        read_small_task(folder, "dev", 50)


def test_judged_passages_stay_whatever_the_limit(folder: Path) -> None:
    judged = {"p0", "p1", "p2", "p3", "p4"}
    assert set(read_small_task(folder, "dev", 3).passages) == judged
    assert set(read_small_task(folder, "dev", 7).passages) == judged | {"p5", "p6"}
    assert len(read_small_task(folder, "dev").passages) == 41
