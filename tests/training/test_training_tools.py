"""Mining negatives and choosing budgets."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cpu import pretend_cpu
from training_data import made_up_pairs, write_lines
from transformers import AutoModel

from diffretriever.cli.main import main
from diffretriever.data.benchmark import Benchmark
from diffretriever.data.pair_files import PairFiles
from diffretriever.encode.encode_store import encode_store
from diffretriever.evaluation.small_task import SmallTask, read_small_task
from diffretriever.search.modes import MODES
from diffretriever.training.budget import sweep, training_task
from diffretriever.training.hard_negatives import Draws, passages_of, rank_by_bm25, rank_by_release

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
    command = ["mine-negatives", "--pairs", str(pairs), "--output", str(out), "--negatives", "4", "--depth", "8"]
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


def test_negatives_come_from_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In any layout that a corpus has; a positive is none of them, though pairs and corpus write it otherwise."""
    pytest.importorskip("bm25s")
    positive = {"docid": "2", "title": "River", "text": "flows down"}
    tevatron = {"query_id": "1", "query": "river", "positive_passages": [positive], "negative_passages": []}
    pairs = write_lines(tmp_path / "pairs.jsonl", [tevatron])
    passages = [("1", "A river", "flows"), ("2", "River", "flows  down "), ("3", "", "lemon"), ("4", "", " ")]
    folder = tmp_path / "beir"
    folder.mkdir()
    write_lines(folder / "corpus.jsonl", [{"_id": i, "title": title, "text": text} for i, title, text in passages])
    table = tmp_path / "corpus.tsv"
    table.write_text("".join("\t".join(row) + "\n" for row in [("id", "title", "text"), *passages]))
    out = tmp_path / "mined.jsonl"
    command = ["mine-negatives", "--pairs", str(pairs), "--output", str(out), "--corpus"]
    for corpus in (folder, folder / "corpus.jsonl", table):
        assert main([*command, str(corpus)]) == 0
        (mined,) = lines_of(out)
        assert mined == {
            "query_id": "1", "query": "river", "positives": ["River. flows down"], "negatives": ["A river. flows"],
        }  # fmt: skip
    assert main([*command, str(write_lines(tmp_path / "bad.jsonl", [{"_id": "1", "txt": "a"}]))]) == 2
    assert "bad.jsonl, line 1: the text is missing" in capsys.readouterr().err


def test_compressed_pairs_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their unpacked copies do not stay; what is written is read again, so ids are each query's own."""
    pytest.importorskip("bm25s")
    names = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    for start, name in enumerate(names):
        records = [record | {"query_id": str(2 * start + row)} for row, record in enumerate(made_up_pairs(3))]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        name.write_bytes(gzip.compress(lines.encode()))
    out = tmp_path / "out" / "mined.jsonl"
    assert main(["mine-negatives", "--pairs", *map(str, names), "--output", str(out)]) == 2
    told = capsys.readouterr().err
    assert f"{names[1]}, line 1: its id is also that of {names[0]}, line 3; give each query of all files" in told
    assert main(["mine-negatives", "--pairs", str(names[0]), "--output", str(out)]) == 0
    assert [file.name for file in out.parent.iterdir()] == ["mined.jsonl"]
    assert main(["mine-negatives", "--pairs", str(out), "--output", str(out)]) == 0


def test_mining_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bm25s")
    pairs = write_lines(tmp_path / "pairs.jsonl", made_up_pairs(3))
    command = ["mine-negatives", "--pairs", str(pairs), "--output", str(tmp_path / "out.jsonl")]
    assert main([*command, "--depth", "5", "--negatives", "4", "--skip", "2"]) == 2
    assert "--depth 5 leaves fewer than --negatives 4 after --skip 2; raise it" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path), "--model", "not/there"]) == 2  # before the model is looked for
    assert f"Is a directory: '{tmp_path}'" in capsys.readouterr().err
    assert (
        main([*command, "--adapter", "a", "--mode", "sparse_max", "--tokens-per-batch", "64"]) == 2
    )  # BM25 would do without
    assert (
        "BM25 has no --adapter, --mode, --tokens-per-batch; say which release with --model" in capsys.readouterr().err
    )
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(SystemExit):
        main([*command, "--negatives", "none"])
    assert "expected a whole number of at least 1, got 'none'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--skip", "-1"])
    assert "expected a whole number of at least 0, got '-1'" in capsys.readouterr().err


def test_draws_keep_the_order_and_skip_the_best() -> None:
    ranked = ["p9", "p3", " p5", "p1", "p7", "p5 ", ""]
    draws = Draws(count=2, depth=4, skip=1, seed=0)
    found = draws.draw(ranked, ["p3 "], number=0)
    assert len(found) == 2
    assert [text for text in (" p5", "p1", "p7") if text in found] == found
    assert {tuple(draws.draw(ranked, ["p3"], number)) for number in range(30)} == {
        (" p5", "p1"), (" p5", "p7"), ("p1", "p7"),
    }  # fmt: skip
    assert Draws(count=2, depth=2, seed=0).draw(["p3"], ["p3"], 0) == []


@pytest.mark.parametrize(("mode", "weight"), [*((mode, None) for mode in MODES), (MODES[-1], 0.95)])
def test_a_release_ranks_as_its_scores_do(
    mode: str, weight: float | None, load_release: Callable[..., Any], tmp_path: Path
) -> None:
    model = load_release("tiny-llada", "llada-q4p4", recommended_fusion_weight=weight)
    records = made_up_pairs(23)
    queries, passages = [record["query"] for record in records[:5]], [record["positive"] for record in records]
    with passages_of(PairFiles([write_lines(tmp_path / "pairs.jsonl", records)])) as corpus:
        store = encode_store(model, corpus, tmp_path / "store", dtype="float32", shard_size=4)
    found = rank_by_release(model, store, mode)(queries, 6)
    scores = model.score(model.encode_texts(queries, True), model.encode_texts(passages, False), mode)
    for row, texts in zip(scores, found, strict=True):
        numbers = [passages.index(text) for text in texts]
        assert torch.allclose(row[numbers], row.sort(descending=True).values[:6], atol=1e-5)
        assert len(set(numbers)) == 6


@pytest.mark.parametrize("mode", ["multi_dense", "fusion_single_sparse_max"])
def test_mining_with_a_release(
    mode: str, build_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every passage is encoded once, however many blocks of queries there are; with --store never again."""
    release, pairs = build_release("tiny-llada", "llada-q4p4"), write_lines(tmp_path / "p.jsonl", made_up_pairs(12))
    monkeypatch.setattr("diffretriever.training.hard_negatives.BLOCK", 5)
    counted: list[int] = []

    def load(*args: Any, **options: Any) -> Any:
        model = AutoModel.from_pretrained(release, trust_remote_code=True, torch_dtype=torch.float32)
        model.backbone.embed_tokens.register_forward_hook(lambda _, inputs, __: counted.append(len(inputs[0])))
        return model

    monkeypatch.setattr("diffretriever.cli.mine_negatives.load_model", load)
    command = ["mine-negatives", "--pairs", str(pairs), "--model", str(release), "--mode", mode, "--negatives", "3"]
    written = []
    for number, more in enumerate(([], ["--store", str(tmp_path / "store")], ["--store", str(tmp_path / "store")])):
        out = tmp_path / f"{number}.jsonl"
        assert main([*command, "--output", str(out), *more]) == 0
        written.append(out.read_bytes())
    assert sum(counted) == 2 * 12 + 3 * 12  # the passages of two stores, and each time the queries
    assert written[0] == written[1] == written[2]
    for line in lines_of(tmp_path / "0.jsonl"):
        assert len(set(line["negatives"]) - set(line["positives"])) == 3


def test_a_store_without_texts_is_no_corpus(load_release: Callable[..., Any], tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "a river"}])
    model = load_release("tiny-llada", "llada-q4p4")
    store = encode_store(model, corpus, tmp_path / "store", keep_texts=False)
    with pytest.raises(ValueError, match="the store keeps no texts to draw negatives from; encode the corpus without"):
        rank_by_release(model, store, "multi_dense")


def test_bm25_leaves_out_what_shares_no_word(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    texts = ["a river flows", "lemon tree", "river river bank", "window", "a river flows"]
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"_id": str(n), "text": text} for n, text in enumerate(texts)])
    rivers, castle = rank_by_bm25(corpus)(["rivers", "castle"], 3)
    assert sorted(rivers) == ["a river flows", "river river bank"]  # stemmed, and each text once
    assert castle == []


# ------------------------------------------------------------------------------------------------ budgets


def test_the_grid_is_what_single_releases_give(
    build_release: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each cell against a release that is loaded with that budget, and scored by the contract."""
    pretend_cpu(monkeypatch)  # the command's default is then float32
    pairs = write_lines(tmp_path / "pairs.jsonl", made_up_pairs(12, negatives=1))
    packed = tmp_path / "pairs.jsonl.xz"
    packed.write_bytes(lzma.compress(pairs.read_bytes()))
    out, release = tmp_path / "out" / "budget.json", build_release("tiny-dream")
    command = ["select-budget", "--model", str(release), "--pairs", str(packed), "--output", str(out)]
    assert main([*command, "--num-queries", "6", "--num-passages", "30", "--budgets", "1", "3"]) == 0
    assert [file.name for file in out.parent.iterdir()] == ["budget.json"]  # nothing unpacked is left
    found = json.loads(out.read_text())
    cells = [(cell["num_query_masks"], cell["num_passage_masks"]) for cell in found["grid"]]
    assert cells == [(1, 1), (1, 3), (3, 1), (3, 3)]
    best = max(found["grid"], key=lambda cell: cell["fused"])
    assert found["choice"].items() == {name: best[name] for name in best if name != "per_query"}.items()
    assert (found["queries"], found["passages"], found["metric"]) == (6, 18, "nDCG@10")
    printed = capsys.readouterr().out
    assert "K_p=1" in printed
    assert f"choice: K_q={found['choice']['num_query_masks']}" in printed
    task = training_task(PairFiles([pairs]), 6, 30, seed=42)
    for cell in found["grid"]:
        masks = {name: cell[name] for name in ("num_query_masks", "num_passage_masks")}
        model = AutoModel.from_pretrained(release, trust_remote_code=True, torch_dtype=torch.float32, **masks)
        sides = [model.encode_texts(list(task.benchmark.queries.values()), True)]
        sides += [model.encode_texts(list(task.passages.values()), False)]
        for mode, name in (("multi_dense", "dense"), ("sparse_max", "sparse"), ("fusion_multi_sparse_max", "fused")):
            expected = loop_ndcg(model.score(*sides, mode), task)
            assert cell["per_query"][name] == pytest.approx(expected, abs=1e-5), (cell, name)
            assert cell[name] == pytest.approx(sum(expected.values()) / 6, abs=1e-5), (cell, name)
    for query, text in task.benchmark.queries.items():
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        entropy = -sum(ids.count(token) / len(ids) * math.log2(ids.count(token) / len(ids)) for token in set(ids))
        assert found["query_features"][query] == {"length": len(ids), "entropy": pytest.approx(entropy)}
    assert main(["analyze-budget", "--input", str(out), "--num-query-masks", "3", "--json", str(out)]) == 0
    fused = json.loads(out.read_text())["modes"]["fused"]["oracles"]
    assert fused["joint"] >= max(cell["fused"] for cell in found["grid"]) >= fused["fixed"]


def loop_ndcg(scores: torch.Tensor, task: SmallTask) -> dict[str, float]:
    """One relevant passage a query: 1 / log2(rank + 1) within the first ten."""
    found, names = {}, list(task.passages)
    for row, (query, judged) in zip(scores, task.benchmark.qrels.items(), strict=True):
        (name,) = judged
        order = row.sort(descending=True, stable=True).indices.tolist()
        rank = [names[place] for place in order].index(name) + 1
        found[query] = 1 / math.log2(rank + 1) if rank <= 10 else 0.0
    return found


def test_each_side_is_encoded_once_a_budget(load_release: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_release("tiny-llada", max_length=120)
    calls: list[tuple[bool, int]] = []
    encode_texts = model.encode_texts

    def counted(texts: list[str], is_query: bool) -> Any:
        calls.append((is_query, model.config.num_masks(is_query)))
        return encode_texts(texts, is_query)

    monkeypatch.setattr(model, "encode_texts", counted)
    passages = {str(n): record["positive"] for n, record in enumerate(made_up_pairs(3))}
    task = SmallTask(Benchmark(Path("pairs.jsonl"), "train", {"0": "river"}, {"0": {"1": 1}}, 1), passages)
    assert len(sweep(model, task, (1, 2, 4))) == 9
    assert sorted(calls) == [(side, masks) for side in (False, True) for masks in (1, 2, 4)]
    assert (model.config.num_query_masks, model.config.num_passage_masks) == (1, 1)  # as they were


def test_budget_errors(build_release: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", made_up_pairs(4))
    command = ["select-budget", "--pairs", str(pairs), "--output", str(tmp_path / "b.json"), "--model"]
    assert main([*command, str(build_release("tiny-llada"))]) == 2
    assert "--num-queries 500 is more than the 4 queries of " in capsys.readouterr().err
    assert main([*command, str(build_release("tiny-llada", "llada-single")), "--num-queries", "2"]) == 2
    assert "has fixed prompts, so it was made for one budget" in capsys.readouterr().err
    given = ["select-budget", "--output", str(tmp_path / "b.json"), "--model", str(build_release("tiny-llada"))]
    assert main([*given, "--data", str(tmp_path), "--num-queries", "2"]) == 2
    assert "--num-queries draws from --pairs; of a benchmark (--data), the whole split" in capsys.readouterr().err
    assert main([*command, str(build_release("tiny-llada")), "--split", "dev"]) == 2
    assert "--split is of a benchmark (--data); --pairs are taken as they are" in capsys.readouterr().err


def test_budgets_on_a_benchmark(
    build_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cpu(monkeypatch)
    folder, records = tmp_path / "data", made_up_pairs(10)
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [{"_id": f"p{n}", "text": row["positive"]} for n, row in enumerate(records)])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": row["query"]} for n, row in enumerate(records)])
    (folder / "qrels" / "dev.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\tp{n}\t1\n" for n in range(3))
    )
    given = ["--data", str(folder), "--split", "dev", "--output", str(tmp_path / "b.json"), "--budgets", "1"]
    assert main(["select-budget", "--model", str(build_release("tiny-llada")), *given, "--fusion", "runs"]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert (found["fusion"], found["queries"], found["passages"]) == ("runs", 3, 10)
    model = AutoModel.from_pretrained(build_release("tiny-llada"), trust_remote_code=True, torch_dtype=torch.float32)
    task = replace(read_small_task(folder, "dev"), fusion="runs")
    assert found["grid"][0]["fused"] == pytest.approx(task.evaluate(model.encode_texts)["fused"])
