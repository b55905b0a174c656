"""The metrics against hand-computed cases and plain loops that share no code with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from diffretriever.evaluation.metrics import DEFAULT_METRICS, evaluate_run, means, parse_metric
from diffretriever.evaluation.runs import read_run, write_run

Grades = dict[str, int]


def order(scores: dict[str, float]) -> list[str]:
    """Insertion sort by trec_eval's rule, on scores that float32 holds exactly."""
    placed: list[str] = []
    for passage, score in scores.items():
        before = [other for other in placed if scores[other] > score or (scores[other] == score and other > passage)]
        placed.insert(len(before), passage)
    return placed


def ndcg(ranked: list[str], grades: Grades, cutoff: int) -> float:
    gains = [max(grades.get(passage, 0), 0) for passage in ranked[:cutoff]]
    best = sorted((max(grade, 0) for grade in grades.values()), reverse=True)[:cutoff]
    ideal = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(best, 1))
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1)) / ideal if ideal else 0.0


def reciprocal_rank(ranked: list[str], grades: Grades, cutoff: int, level: int = 1) -> float:
    for rank, passage in enumerate(ranked[:cutoff], 1):
        if grades.get(passage, 0) >= level:
            return 1 / rank
    return 0.0


def recall(ranked: list[str], grades: Grades, cutoff: int, level: int = 1) -> float:
    relevant = {passage for passage, grade in grades.items() if grade >= level}
    return len(relevant & set(ranked[:cutoff])) / len(relevant) if relevant else 0.0


def average_precision(ranked: list[str], grades: Grades, level: int = 1) -> float:
    relevant = {passage for passage, grade in grades.items() if grade >= level}
    precisions = [
        sum(other in relevant for other in ranked[:rank]) / rank
        for rank, passage in enumerate(ranked, 1)
        if passage in relevant
    ]
    return sum(precisions) / len(relevant) if relevant else 0.0


LOOPS: dict[str, Callable[[list[str], Grades], float]] = {
    "nDCG@10": lambda ranked, grades: ndcg(ranked, grades, 10),
    "nDCG@3": lambda ranked, grades: ndcg(ranked, grades, 3),
    "RR@10": lambda ranked, grades: reciprocal_rank(ranked, grades, 10),
    "RR@2": lambda ranked, grades: reciprocal_rank(ranked, grades, 2),
    "RR(rel=2)@3": lambda ranked, grades: reciprocal_rank(ranked, grades, 3, level=2),
    "R@5": lambda ranked, grades: recall(ranked, grades, 5),
    "R(rel=2)@5": lambda ranked, grades: recall(ranked, grades, 5, level=2),
    "AP": average_precision,
    "AP(rel=2)": lambda ranked, grades: average_precision(ranked, grades, level=2),
}
PASSAGES = [f"p{number}" for number in range(14)]
SCORES = st.dictionaries(st.sampled_from(PASSAGES), st.sampled_from([-2.0, 0.0, 0.5, 1.0, 1.5, 3.0]))
GRADES = st.dictionaries(st.sampled_from(PASSAGES), st.integers(-1, 3), min_size=1)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), SCORES),
    st.dictionaries(st.sampled_from("q1 q2 q4".split()), GRADES, min_size=1),
)
def test_every_metric_equals_a_plain_loop(run: dict[str, dict[str, float]], qrels: dict[str, Grades]) -> None:
    found = evaluate_run(run, qrels, [parse_metric(name) for name in LOOPS])
    assert list(found) == list(LOOPS)
    for name, loop in LOOPS.items():
        expected = {query: loop(order(run.get(query, {})), grades) for query, grades in qrels.items()}
        assert found[name] == pytest.approx(expected), name
        assert list(found[name]) == list(qrels)


def test_by_hand() -> None:
    run = {"q": {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0}}
    qrels = {"q": {"b": 3, "d": 1, "z": 2}}
    found = means(evaluate_run(run, qrels, [parse_metric(name) for name in ("nDCG@10", "RR@10", "R@100", "AP")]))
    gain = 3 / math.log2(3) + 1 / math.log2(5)
    assert found["nDCG@10"] == pytest.approx(gain / (3 + 2 / math.log2(3) + 1 / 2))
    assert found["RR@10"] == 0.5
    assert found["R@100"] == pytest.approx(2 / 3)
    assert found["AP"] == pytest.approx((1 / 2 + 2 / 4) / 3)


def test_equals_pytrec_eval_called_directly() -> None:
    run = {"q": {f"p{number}": 1.0 / (number + 1) for number in range(30)}}
    qrels = {"q": {"p3": 1, "p12": 2, "p29": 1}}
    direct = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "map", "recip_rank"}).evaluate(run)[
        "q"
    ]
    found = means(evaluate_run(run, qrels, [parse_metric(name) for name in ("nDCG@10", "R@100", "AP", "RR")]))
    assert list(found.values()) == [direct["ndcg_cut_10"], direct["recall_100"], direct["map"], direct["recip_rank"]]


def test_a_reciprocal_rank_past_the_cutoff_is_zero() -> None:
    run = {"q": {f"p{number:02}": float(-number) for number in range(12)}}
    metrics = [parse_metric("RR@10"), parse_metric("RR@11"), parse_metric("RR")]
    found = evaluate_run(run, {"q": {"p10": 1}}, metrics)
    assert found == {"RR@10": {"q": 0.0}, "RR@11": {"q": pytest.approx(1 / 11)}, "RR": {"q": pytest.approx(1 / 11)}}


def test_equal_scores_do_not_depend_on_the_order_of_the_run() -> None:
    qrels, metrics = {"q": {"b": 1}}, [parse_metric(name) for name in DEFAULT_METRICS]
    one = evaluate_run({"q": {"a": 1.0, "b": 1.0, "c": 1.0}}, qrels, metrics)
    assert one == evaluate_run({"q": {"c": 1.0, "b": 1.0, "a": 1.0}}, qrels, metrics)
    assert one["RR@10"] == {"q": 0.5}  # c, b, a


def test_a_run_file_gives_the_same_figures(tmp_path: Path) -> None:
    run = {"q": {f"p{number}": 1 / 3 + number * 1e-8 for number in range(12)}, "r": {"p1": 0.1, "p2": 0.7}}
    qrels = {"q": {"p1": 1, "p7": 2}, "r": {"p1": 1}}
    metrics = [parse_metric(name) for name in DEFAULT_METRICS]
    write_run(tmp_path / "run.trec", run, "tag")
    assert evaluate_run(read_run(tmp_path / "run.trec"), qrels, metrics) == evaluate_run(run, qrels, metrics)


@pytest.mark.parametrize(
    ("text", "level", "name"),
    [
        ("nDCG@10", 2, "nDCG@10"),
        ("ndcg", 1, "nDCG"),
        ("MRR@10", 1, "RR@10"),
        ("MRR@10", 2, "RR(rel=2)@10"),
        ("recall@1000", 2, "R(rel=2)@1000"),
        ("MAP", 1, "AP"),
        ("map", 2, "AP(rel=2)"),
        ("AP(rel=1)", 2, "AP"),
        ("Success@5", 1, "Success@5"),
        (" P@10 ", 1, "P@10"),
    ],
)
def test_names(text: str, level: int, name: str) -> None:
    assert str(parse_metric(text, level)) == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nDGC@10", "metric 'nDGC@10' is not known; the metrics are nDCG@k"),
        ("", "metric '' is not known"),
        ("nDCG@ten", "is not known"),
        ("Recall", "metric 'Recall' needs a cutoff, e.g. R@100"),
        ("RR@0", "its cutoff must lie between 1 and 1,000,000"),
        ("RR@9999999999", "its cutoff must lie between 1 and 1,000,000"),
        ("AP(rel=0)", "rel must lie between 1 and 1,000,000"),
        ("AP(rel=9999999999)", "rel must lie between 1 and 1,000,000"),
        ("nDCG(rel=2)@10", "nDCG uses the grades themselves"),
    ],
)
def test_a_wrong_name_is_said(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="metric") as error:
        parse_metric(text)
    assert words in str(error.value)


@pytest.mark.parametrize("qrels", [{}, {"q": {}}])
def test_empty_qrels_are_refused(qrels: dict[str, Grades]) -> None:
    with pytest.raises(ValueError, match="the qrels hold no judgement"):
        evaluate_run({"q": {"a": 1.0}}, qrels, [parse_metric("AP")])


def test_what_pytrec_eval_would_not_survive() -> None:
    """It takes memory for every grade up to the largest."""
    with pytest.raises(ValueError, match=r"the qrels hold the grade 4611686018427387904; the largest .* 1,000,000"):
        evaluate_run({"q": {"a": 1.0}}, {"q": {"a": 2**62}}, [parse_metric("nDCG@10")])
    with pytest.raises(ValueError, match="rel must lie between 1 and 1,000,000"):
        parse_metric("AP", relevance_level=2**31)
