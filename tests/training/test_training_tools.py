"""Mining negatives, choosing budgets, and the mean-pooled baseline."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_data import made_up_pairs, write_lines
from training_runs import arguments, weights, write_recipe
from transformers import AutoModel

from diffretriever.cli.main import main
from diffretriever.publishing import build as building
from diffretriever.training import budget
from diffretriever.training.hard_negatives import Bm25Ranker, ReleaseRanker, choose_negatives
from diffretriever.training.mean_pooling import encode_mean

PARITY = Path(__file__).parents[1] / "parity"
TEXTS = ["river mountain engine", "kernel window " * 40, "", "garden"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ mining


def test_negatives_share_words_and_are_no_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bm25s")
    records: list[dict[str, Any]] = made_up_pairs(30)
    records[4]["positives"] = [records[4].pop("positive"), records[5]["positive"]]
    records[0]["query_id"] = "seven"
    pairs = write_lines(tmp_path / "pairs.jsonl", records)
    out = tmp_path / "mined.jsonl"
    command = ["mine-negatives", "--pairs", str(pairs), "--out", str(out), "--negatives", "4", "--depth", "8"]
    assert main(command) == 0
    assert "30 queries" in capsys.readouterr().out
    mined = lines_of(out)
    passages = {text for record in records for text in record.get("positives", [record.get("positive")])}
    assert mined[0]["query_id"] == "seven"
    for before, after in zip(records, mined, strict=True):
        assert after["query"] == before["query"]
        assert after["positives"] == before.get("positives", [before.get("positive")])
        assert 1 <= len(set(after["negatives"])) == len(after["negatives"]) <= 4
        for text in after["negatives"]:
            assert text in passages
            assert text not in after["positives"]
            assert set(text.split()) & set(before["query"].split())
    first = out.read_bytes()
    assert main(command) == 0
    assert out.read_bytes() == first
    assert main([*command, "--seed", "1"]) == 0
    assert out.read_bytes() != first


def test_negatives_come_from_a_corpus(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    pairs = write_lines(tmp_path / "pairs.jsonl", [{"query": "river", "positive": "a river"}])
    corpus = [{"_id": 1, "title": "River", "text": "flows"}, {"text": "a river"}, {"text": "lemon"}, {"text": ""}]
    out = tmp_path / "mined.jsonl"
    command = ["mine-negatives", "--pairs", str(pairs), "--out", str(out), "--corpus"]
    assert main([*command, str(write_lines(tmp_path / "corpus.jsonl", corpus))]) == 0
    assert lines_of(out)[0]["negatives"] == ["River flows"]
    assert main([*command, str(write_lines(tmp_path / "bad.jsonl", [{"txt": "a"}]))]) == 2


def test_mining_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bm25s")
    pairs = write_lines(tmp_path / "pairs.jsonl", made_up_pairs(3))
    command = ["mine-negatives", "--pairs", str(pairs), "--out", str(tmp_path / "out.jsonl")]
    assert main([*command, "--depth", "5", "--negatives", "4", "--skip", "2"]) == 2
    assert "--depth 5 leaves fewer than --negatives 4 after --skip 2; raise it" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(SystemExit):
        main([*command, "--negatives", "none"])
    assert "expected a whole number of at least 1, got 'none'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--skip", "-1"])
    assert "expected a whole number of at least 0, got '-1'" in capsys.readouterr().err


def test_draws_keep_the_order_and_skip_the_best() -> None:
    passages = [f"p{number}" for number in range(10)]
    found = choose_negatives([9, 3, 5, 1, 7], passages, ["p3"], count=2, skip=1, rng=random.Random(0))
    assert len(found) == 2
    assert [text for text in ("p5", "p1", "p7") if text in found] == found
    assert choose_negatives([3], passages, ["p3"], 2, 0, random.Random(0)) == []


@pytest.mark.parametrize("mode", ["multi_dense", "single_dense", "sparse_max"])
def test_a_release_ranks_as_its_scores_do(
    mode: str, load_release: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_release("tiny-llada", "llada-q4p4")
    passages = [record["positive"] for record in made_up_pairs(23)]
    queries = [record["query"] for record in made_up_pairs(23)[:5]]
    monkeypatch.setattr("diffretriever.training.hard_negatives.PASSAGE_BLOCK", 4)
    found = ReleaseRanker(model, passages, mode).top(queries, 6)
    scores = model.score(model.encode_texts(queries, True), model.encode_texts(passages, False), mode)
    for row, numbers in zip(scores, found, strict=True):
        assert torch.allclose(row[numbers], row.sort(descending=True).values[:6], atol=1e-5)
        assert len(set(numbers)) == 6


def test_bm25_leaves_out_what_shares_no_word() -> None:
    pytest.importorskip("bm25s")
    found = Bm25Ranker(["a river flows", "lemon tree", "river river bank", "window"]).top(["rivers", "castle"], 3)
    assert sorted(found[0]) == [0, 2]  # stemmed
    assert found[1] == []


# ------------------------------------------------------------------------------------------------ budgets


def test_the_grid_is_what_single_releases_give(
    build_release: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each cell against a release that is loaded with that budget, and scored by the contract."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # the command's default is then float32
    pairs = write_lines(tmp_path / "pairs.jsonl", made_up_pairs(12, negatives=1))
    out, release = tmp_path / "budget.json", build_release("tiny-dream")
    command = ["select-budget", "--model", str(release), "--pairs", str(pairs), "--out", str(out)]
    assert main([*command, "--queries", "6", "--passages", "30", "--budgets", "1", "3"]) == 0
    found = json.loads(out.read_text())
    cells = [(cell["num_query_masks"], cell["num_passage_masks"]) for cell in found["grid"]]
    assert cells == [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert found["choice"] == max(found["grid"], key=lambda cell: cell["fused"])
    assert (found["queries"], found["passages"], found["metric"]) == (6, 18, "nDCG@10")
    printed = capsys.readouterr().out
    assert "K_p=1" in printed
    assert f"choice: K_q={found['choice']['num_query_masks']}" in printed
    files = budget.PairFiles([pairs])
    benchmark = budget.training_benchmark(files, 6, 30, seed=42)
    for cell in found["grid"]:
        masks = {name: cell[name] for name in ("num_query_masks", "num_passage_masks")}
        model = AutoModel.from_pretrained(release, trust_remote_code=True, torch_dtype=torch.float32, **masks)
        sides = model.encode_texts(benchmark.queries, True), model.encode_texts(benchmark.passages, False)
        for mode, name in (("multi_dense", "dense"), ("sparse_max", "sparse"), ("fusion_multi_sparse_max", "fused")):
            expected = loop_ndcg(model.score(*sides, mode), benchmark)
            assert cell[name] == pytest.approx(expected, abs=1e-5), (cell, name)


def loop_ndcg(scores: torch.Tensor, benchmark: budget.Benchmark) -> float:
    """One relevant passage a query: 1 / log2(rank + 1) within the first ten."""
    total = 0.0
    for row, judged in zip(scores, benchmark.qrels.values(), strict=True):
        (name,) = judged
        order = row.sort(descending=True, stable=True).indices.tolist()
        rank = [benchmark.passage_ids[place] for place in order].index(name) + 1
        total += 1 / float(torch.log2(torch.tensor(rank + 1.0))) if rank <= 10 else 0.0
    return total / len(scores)


def test_each_side_is_encoded_once_a_budget(monkeypatch: pytest.MonkeyPatch, load_release: Callable[..., Any]) -> None:
    model = load_release("tiny-llada", max_length=120)
    calls: list[tuple[bool, int]] = []
    original = budget.encode_with

    def counted(model: Any, texts: Any, is_query: bool, masks: int) -> Any:
        calls.append((is_query, masks))
        return original(model, texts, is_query, masks)

    monkeypatch.setattr(budget, "encode_with", counted)
    texts = [record["positive"] for record in made_up_pairs(3)]
    benchmark = budget.Benchmark(["0"], ["river"], ["0", "1", "2"], texts, {"0": {"1": 1}})
    assert len(budget.sweep(model, benchmark, (1, 2, 4))) == 9
    assert sorted(calls) == [(side, masks) for side in (False, True) for masks in (1, 2, 4)]


def test_budget_errors(build_release: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", made_up_pairs(4))
    command = ["select-budget", "--pairs", str(pairs), "--out", str(tmp_path / "b.json"), "--model"]
    assert main([*command, str(build_release("tiny-llada"))]) == 2
    assert "--queries 500 is more than the 4 queries of " in capsys.readouterr().err
    assert main([*command, str(build_release("tiny-llada", "llada-single")), "--queries", "2"]) == 2
    assert "has fixed prompts, so it was made for one budget" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ mean pooling


@torch.no_grad()
def test_mean_vectors_against_a_loop(load_release: Callable[..., Any]) -> None:
    model = load_release("tiny-dream")
    found = encode_mean(model, TEXTS, is_query=False, batch_size=3)
    assert found.shape == (4, 1, model.config.hidden_size)
    room = model.config.max_length - sum(len(part) for part in (
        model.texts.layouts[False].prefix, model.texts.layouts[False].suffix))  # fmt: skip
    for text, vector in zip(TEXTS, found, strict=True):
        ids = [*model.tokenizer(text, add_special_tokens=False)["input_ids"][:room], model.texts.end_of_text_id]
        states = model.hidden_states(torch.tensor([ids]))[0]
        torch.testing.assert_close(vector[0], F.normalize(states.mean(dim=0), dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_the_baseline_trains_and_has_its_row(
    kind: str, build_release: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, release, out = made_up_pairs(24), build_release(f"tiny-{kind}"), tmp_path / "out"
    recipe = write_recipe(tmp_path / "r.yaml", pooling="mean", sparse_weight=0.0, max_steps=12, learning_rate=5e-3)
    assert main(arguments(recipe, release, write_lines(tmp_path / "p.jsonl", records), out)) == 0
    assert not [name for name in weights(out) if ".transformer.ff_out." in name or "lm_head" in name]
    assert not (out / "retriever_config.json").exists()
    data = tmp_path / "beir"
    (data / "qrels").mkdir(parents=True)
    write_lines(data / "corpus.jsonl", [{"_id": f"p{n}", "text": r["positive"]} for n, r in enumerate(records)])
    write_lines(data / "queries.jsonl", [{"_id": f"q{n}", "text": r["query"]} for n, r in enumerate(records)])
    judged = "".join(f"q{n}\tp{n}\t1\n" for n in range(24))
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    command = ["evaluate-mean-pooling", "--model", str(release), "--data", str(data)]
    figures = []
    for number, more in enumerate(([], ["--adapter", str(out)])):
        file, run = tmp_path / f"{number}.json", tmp_path / f"{number}.run"
        assert main([*command, *more, "--max-length", "140", "--json", str(file), "--run", str(run)]) == 0
        figures.append(json.loads(file.read_text()))
        assert len(run.read_text().splitlines()) == 24 * 24
    assert figures[1]["ndcg@10"] > figures[0]["ndcg@10"]
    assert "24 queries, 24 passages" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"retriever_config.json is not there"):
        building.build(str(PARITY / "backbones" / f"tiny-{kind}"), tmp_path / "built", str(out))


def test_a_masked_adapter_is_no_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate-mean-pooling", "--model", "x", "--data", "y", "--adapter", str(tmp_path)]
    assert main(command) == 2
    assert "run.json is not there; expected the output folder of `diffretriever train`" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"pooling": "masks"}}))
    assert main(command) == 2
    assert "was trained with pooling: masks; build a release of it with publish.py instead" in capsys.readouterr().err
