"""Marks and tables from made-up values."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from diffretriever.evaluation.comparisons import check_comparable, compare, pairs_of
from diffretriever.evaluation.metrics import PerQuery
from diffretriever.evaluation.report import Evaluation, read_per_query, to_markdown, to_terminal
from diffretriever.files.durable import write_json


def values(mean: float, seed: int, metric: str = "nDCG@10") -> PerQuery:
    numbers = random.Random(seed)
    return {metric: {f"q{number}": mean + numbers.uniform(-0.1, 0.1) for number in range(50)}}


ROWS = {
    "single_dense": values(0.4, 1),
    "multi_dense": values(0.5, 2),
    "fusion_single_sparse_max": values(0.6, 3),
    "fusion_multi_sparse_max": values(0.6, 4),
    "bm25": values(0.55, 5),
}


def evaluation(correction: str = "bonferroni", earlier: dict[str, PerQuery] | None = None) -> Evaluation:
    comparisons = compare(ROWS, pairs_of(ROWS, earlier), correction)
    return Evaluation("model on data", ROWS, {"bm25": 0.32}, comparisons, correction, ["something."])


def test_pairs_are_the_counterparts_and_bm25() -> None:
    pairs = [(pair.row, pair.mark, pair.baseline) for pair in pairs_of(ROWS)]
    assert pairs == [
        ("multi_dense", "†", "single_dense"),
        ("fusion_multi_sparse_max", "†", "fusion_single_sparse_max"),
        ("single_dense", "‡", "bm25"),
        ("multi_dense", "‡", "bm25"),
        ("fusion_single_sparse_max", "‡", "bm25"),
        ("fusion_multi_sparse_max", "‡", "bm25"),
    ]
    earlier = {"multi_dense": values(0.1, 9)}
    assert [(pair.row, pair.mark) for pair in pairs_of({"multi_dense": ROWS["multi_dense"]}, earlier)] == [
        ("multi_dense", "†")
    ]


def test_only_better_rows_earn_marks() -> None:
    lines = {line.split()[0]: line.split()[1] for line in to_terminal(evaluation()).splitlines() if "0." in line[:40]}
    assert lines["multi_dense"].endswith("†")  # better than single_dense, worse than bm25
    assert lines["fusion_single_sparse_max"].endswith("‡")
    assert lines["fusion_multi_sparse_max"].endswith("‡")
    assert "†" not in lines["fusion_multi_sparse_max"]
    assert "†" not in lines["single_dense"]
    assert "‡" not in lines["single_dense"]


def test_the_correction_counts_a_metrics_tests() -> None:
    plain = compare(ROWS, pairs_of(ROWS), "bonferroni")
    assert len(plain) == 6
    for found in plain:
        assert found.corrected == min(1.0, 6 * found.test.p)
    assert all(a.corrected <= b.corrected for a, b in zip(compare(ROWS, pairs_of(ROWS), "holm"), plain, strict=True))
    with pytest.raises(ValueError, match="correction 'none' is not known; it is one of bonferroni, holm"):
        compare(ROWS, [], "none")


def test_marks_against_the_single_vector_and_the_counterpart() -> None:
    """As in Table 2: two other evaluations, each compared mode by mode; BM25's own row is nobody's."""
    single = {"multi_dense": values(0.3, 7), "fusion_multi_sparse_max": values(0.7, 8), "bm25": values(0.1, 9)}
    counterpart = {"multi_dense": values(0.6, 10), "fusion_multi_sparse_max": values(0.4, 11), "bm25": values(0.1, 9)}
    comparisons = compare(ROWS, pairs_of(ROWS, single, counterpart))
    assert [(found.row, found.mark, found.better) for found in comparisons] == [
        ("multi_dense", "†", True),
        ("fusion_multi_sparse_max", "†", False),
        ("multi_dense", "‡", False),
        ("fusion_multi_sparse_max", "‡", True),
    ]
    table = to_terminal(Evaluation("t", ROWS, comparisons=comparisons))
    legend = "† better than the same mode of the baseline, ‡ better than the same mode of the counterpart: paired"
    assert legend in table
    assert "over 4 tests a metric" in table
    assert {(pair.mark, pair.baseline) for pair in pairs_of(ROWS, single)} >= {("‡", "bm25")}


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"sparse_max": values(0.1, 9)}, "the counterpart has none of the modes multi_dense, bm25, only sparse_max"),
        ({"multi_dense": values(0.1, 9, "RR@10")}, "multi_dense of the counterpart has no nDCG@10, only RR@10; evalu"),
        (
            {"multi_dense": {"nDCG@10": {"q0": 0.5, "other": 0.5}}},
            "with multi_dense of the counterpart needs the same queries",
        ),
    ],
)
def test_an_evaluation_that_does_not_compare_is_refused(theirs: dict[str, PerQuery], words: str) -> None:
    queries = ROWS["bm25"]["nDCG@10"]
    with pytest.raises(ValueError, match=re.escape(words)):
        check_comparable("counterpart", theirs, ["multi_dense", "bm25"], ["nDCG@10"], queries)


def test_the_terminals_table() -> None:
    lines = to_terminal(evaluation()).splitlines()
    assert lines[0] == "model on data"
    assert lines[2].split() == ["mode", "nDCG@10", "ms", "/", "query"]
    column = lines[2].index("nDCG@10")
    assert all(line[column : column + 2] == "0." for line in lines[3:8])  # aligned
    assert lines[7].split() == ["bm25", f"{sum(ROWS['bm25']['nDCG@10'].values()) / 50:.3f}", "0.3"]
    assert lines[9] == (
        "† better than its single-vector counterpart, ‡ better than bm25: paired two-sided t-test, p < 0.05 after "
        "Bonferroni's correction over 6 tests a metric."
    )
    assert lines[11] == "Note: something."
    assert not any(line.endswith(" ") for line in lines)


def test_markdown_has_the_tests() -> None:
    text = to_markdown(evaluation("holm"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| mode | nDCG@10 | ms / query |"
    assert rows[1] == "|---|---|---|"
    assert len({line.count("|") for line in rows[:7]}) == 1
    assert rows[7] == "| better? | than | metric | difference | t | p | p corrected |"
    assert len(rows) == 9 + 6
    assert "Holm's correction" in text


def test_without_tests_there_is_no_legend() -> None:
    plain = Evaluation("t", {"single_dense": ROWS["single_dense"]})
    assert "†" not in to_terminal(plain) + to_markdown(plain)
    assert list(plain.figures()) == ["single_dense"]


def test_json_reads_back(tmp_path: Path) -> None:
    write_json(tmp_path / "values.json", ROWS)
    assert read_per_query(tmp_path / "values.json") == ROWS


@pytest.mark.parametrize("content", [{}, {"m": {}}, {"m": {"AP": {}}}, {"m": {"AP": {"q": "x"}}}, {"m": {"AP": 0.1}}])
def test_a_file_that_is_no_per_query_file_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "values.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"values\.json: expected \{mode: \{metric: \{query id: number\}\}\}"):
        read_per_query(tmp_path / "values.json")


def test_a_file_without_an_object_is_refused(tmp_path: Path) -> None:
    for text, words in (
        ("[]", "expected a JSON object, got list"),
        ('{\n"m":', "line 2, column 5"),
        ("é", "not valid JSON"),
    ):
        (tmp_path / "values.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"values\.json: .*{words}"):
            read_per_query(tmp_path / "values.json")
