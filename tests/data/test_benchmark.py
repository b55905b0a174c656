"""Benchmarks in BEIR's and MS MARCO's layouts; what does not fit together is counted or refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from diffretriever.data.benchmark import note_unknown_passages, read_benchmark


def write_beir(folder: Path, qrels: str, split: str = "test", queries: int = 3) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"_id": f"q{number}", "text": f"text {number}"}) for number in range(queries)]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "corpus.jsonl").write_text('{"_id": "a", "title": "", "text": "A"}\n')
    (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    return folder


def write_ms_marco(folder: Path) -> Path:
    (folder / "collection.tsv").write_text("10\tone\n11\ttwo\n")
    (folder / "queries.dev.small.tsv").write_text("7\twhat is one\n8\twhat is two\n")
    (folder / "qrels.dev.small.tsv").write_text("7\t0\t10\t1\n")
    with gzip.open(folder / "msmarco-test2019-queries.tsv.gz", "wt") as out:
        out.write("20\tgraded\n21\tnot judged\n")
    (folder / "2019qrels-pass.txt").write_text("20 Q0 10 3\n20 Q0 11 1\n")
    return folder


def test_only_the_splits_queries_are_kept(tmp_path: Path) -> None:
    benchmark = read_benchmark(write_beir(tmp_path, "q2\ta\t1\nq0\tb\t2\nq0\tc\t0\n"), "test")
    assert benchmark.queries == {"q2": "text 2", "q0": "text 0"}
    assert benchmark.qrels == {"q2": {"a": 1}, "q0": {"b": 2, "c": 0}}
    assert (benchmark.relevance_level, benchmark.own_ids_count) == (1, False)
    assert benchmark.notes == ["1 queries have no judgement in this split: not searched."]


def test_ms_marco_and_trec_deep_learning(tmp_path: Path) -> None:
    folder = write_ms_marco(tmp_path)
    dev = read_benchmark(folder, "dev")
    assert (dev.queries, dev.qrels) == ({"7": "what is one"}, {"7": {"10": 1}})
    assert (dev.relevance_level, dev.own_ids_count) == (1, True)
    graded = read_benchmark(folder, "dl19")
    assert (graded.queries, graded.qrels) == ({"20": "graded"}, {"20": {"10": 3, "11": 1}})
    assert graded.relevance_level == 2
    assert graded.notes == ["1 queries have no judgement in this split: not searched."]
    assert read_benchmark(folder, "dl19", relevance_level=1).relevance_level == 1


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    write_beir(tmp_path, "q0\ta\t1\n", "dev")
    write_beir(tmp_path, "q0\ta\t1\n", "test")
    with pytest.raises(FileNotFoundError, match=r"no split 'train'; the splits there are: dev, test\."):
        read_benchmark(tmp_path, "train")
    (tmp_path / "marco").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no split 'dl20'; the splits there are: dev, dl19\."):
        read_benchmark(write_ms_marco(tmp_path / "marco"), "dl20")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"the splits there are: none\."):
        read_benchmark(tmp_path / "empty", "test")


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        read_benchmark(tmp_path / "absent", "test")
    (write_beir(tmp_path, "q0\ta\t1\n") / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="holds no queries file"):
        read_benchmark(tmp_path, "test")


def test_empty_qrels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test\.tsv: no judgements"):
        read_benchmark(write_beir(tmp_path, ""), "test")


def test_a_malformed_judgement_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test\.tsv, line 3: the grade must be a whole number"):
        read_benchmark(write_beir(tmp_path, "q0\ta\t1\nq1\ta\tyes\n"), "test")


def test_judged_queries_without_text_are_counted(tmp_path: Path) -> None:
    benchmark = read_benchmark(write_beir(tmp_path, "q0\ta\t1\nx1\ta\t1\nx2\ta\t1\nq1\ta\t1\nq2\ta\t1\n"), "test")
    assert list(benchmark.qrels) == ["q0", "q1", "q2"]
    assert benchmark.notes == ["2 of 5 judged queries have no text, e.g. 'x1': left out."]
    with pytest.raises(ValueError, match="none of the 1 queries judged in"):
        read_benchmark(write_beir(tmp_path, "x1\ta\t1\n"), "test")


def test_queries_without_a_relevant_passage_and_high_grades_are_said(tmp_path: Path) -> None:
    benchmark = read_benchmark(write_beir(tmp_path, "q0\ta\t0\nq1\ta\t3\nq2\ta\t1\n"), "test")
    assert benchmark.notes == [
        "1 queries have no passage of grade 1 or more: they score 0 in binary metrics.",
        "Grades reach 3 or more; for TREC Deep Learning's rule give --relevance-level 2.",
    ]


def test_judged_passages_that_the_corpus_lacks_are_counted(tmp_path: Path) -> None:
    benchmark = read_benchmark(write_beir(tmp_path, "q0\ta\t1\nq1\tz\t1\nq2\ty\t1\n"), "test")
    assert note_unknown_passages(benchmark, {"a", "z", "y"}) == []
    assert note_unknown_passages(benchmark, {"a", "b"}) == [
        "2 of 3 judged passages are not in the corpus, e.g. 'y': they count as not found."
    ]
    with pytest.raises(
        ValueError, match=r"the corpus holds none of the 3 passages judged in split 'test' \(e\.g\. 'a'"
    ):
        note_unknown_passages(benchmark, {"b"})


def test_a_level_below_1_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relevance level must lie between 1 and 1,000,000, got 0"):
        read_benchmark(write_beir(tmp_path, "q0\ta\t1\n"), "test", relevance_level=0)


def test_a_judged_passage_with_the_querys_own_id_is_said(tmp_path: Path) -> None:
    benchmark = read_benchmark(write_beir(tmp_path, "q0\tq0\t1\nq1\tq1\t0\nq2\ta\t1\n"), "test")
    assert [note for note in benchmark.notes if "own id" in note] == [
        "1 queries are judged to be answered by the passage with their own id, e.g. 'q0': as in BEIR, it is left "
        "out of their rankings and counts as not found."
    ]
