"""Oracles and correlations against plain loops, and what is no sweep."""

from __future__ import annotations

import json
import math
import random
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffretriever.cli.main import main
from diffretriever.evaluation.budget_analysis import best_query_budgets, correlations, oracles

BUDGETS = (1, 2, 4)


def made_up_sweep(seed: int, queries: int = 12) -> dict[str, Any]:
    """A file of select-budget, as its format says; scores of few values, so that they tie."""
    rng = random.Random(seed)
    names = [f"q{number}" for number in range(queries)]
    grid = [
        {
            "num_query_masks": k_q,
            "num_passage_masks": k_p,
            "per_query": {mode: {name: rng.choice([0.0, 0.5, 1.0]) for name in names} for mode in ("dense", "fused")},
        }
        for k_q in BUDGETS
        for k_p in BUDGETS
    ]
    features = {name: {"length": rng.randint(2, 9), "entropy": rng.uniform(1, 3)} for name in names}
    choice = {"num_query_masks": 2, "num_passage_masks": 4}
    return {"metric": "nDCG@10", "grid": grid, "choice": choice, "query_features": features}


def analysis_of(tmp_path: Path, *sweeps: dict[str, Any], masks: tuple[str, ...] = ()) -> Any:
    files = [tmp_path / f"{number}.json" for number in range(len(sweeps))]
    for file, sweep in zip(files, sweeps, strict=True):
        file.write_text(json.dumps(sweep))
    out = tmp_path / "analysis.json"
    assert main(["analyze-budget", "--input", *map(str, files), "--json", str(out), *masks]) == 0
    return json.loads(out.read_text())


def test_the_oracles_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = made_up_sweep(1)
    found = analysis_of(tmp_path, sweep)
    printed = capsys.readouterr().out
    assert (found["queries"], found["num_query_masks"], found["num_passage_masks"]) == (12, 2, 4)
    for mode in ("dense", "fused"):
        cells = {
            (cell["num_query_masks"], cell["num_passage_masks"]): cell["per_query"][mode] for cell in sweep["grid"]
        }
        expected = dict.fromkeys(("fixed", "k_q", "k_p", "joint"), 0.0)
        for query in sweep["query_features"]:
            expected["fixed"] += cells[2, 4][query] / 12
            expected["k_q"] += max(cells[k_q, 4][query] for k_q in BUDGETS) / 12
            expected["k_p"] += max(cells[2, k_p][query] for k_p in BUDGETS) / 12
            expected["joint"] += max(row[query] for row in cells.values()) / 12
        assert found["modes"][mode]["oracles"] == pytest.approx(expected)
        level = [query for query in cells[1, 4] if cells[1, 4][query] == cells[2, 4][query] == cells[4, 4][query]]
        assert found["modes"][mode]["indifferent"] == len(level)
        row = next(line for line in printed.splitlines() if line.startswith(mode))
        assert row.split()[1:] == [f"{value:.4f}" for value in expected.values()]
    assert printed.startswith("fixed: K_q=2, K_p=4; nDCG@10 of 12 queries")


def test_files_are_pooled_and_the_fixed_budget_given(tmp_path: Path) -> None:
    sweeps = made_up_sweep(1), made_up_sweep(2)
    masks = ("--num-query-masks", "1", "--num-passage-masks", "1")
    each = [analysis_of(tmp_path, sweep, masks=masks)["modes"]["dense"]["oracles"] for sweep in sweeps]
    found = analysis_of(tmp_path, *sweeps, masks=masks)
    assert found["queries"] == 24  # queries of the same name in two files are two
    both = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
    assert found["modes"]["dense"]["oracles"] == pytest.approx(both)


PAIRS = st.lists(st.tuples(st.sampled_from(BUDGETS), st.integers(1, 6)), min_size=2, max_size=12)


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


@settings(deadline=None)
@given(PAIRS)
def test_correlations_are_those_of_their_definitions(pairs: list[tuple[int, int]]) -> None:
    best = {str(number): k_q for number, (k_q, _) in enumerate(pairs)}
    features = {str(number): {"length": length, "entropy": 1.0} for number, (_, length) in enumerate(pairs)}
    found = correlations(best, features)
    assert found["entropy"] == dict.fromkeys(("spearman", "spearman_p", "kendall", "kendall_p"))  # all the same
    x, y = ([float(value) for value in side] for side in zip(*pairs, strict=True))
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert found["length"]["spearman"] is None
        return
    a, b = ranks(x), ranks(y)
    mean = (len(x) + 1) / 2
    products = [sum((p - mean) * (q - mean) for p, q in zip(*both, strict=True)) for both in ((a, b), (a, a), (b, b))]
    assert found["length"]["spearman"] == pytest.approx(products[0] / math.sqrt(products[1] * products[2]))
    signs = [(_sign(x[i] - x[j]), _sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    agreeing, of_x, of_y = (sum(s * t for s, t in signs), sum(s * s for s, _ in signs), sum(t * t for _, t in signs))
    assert found["length"]["kendall"] == pytest.approx(agreeing / math.sqrt(of_x * of_y))
    assert 0 <= found["length"]["kendall_p"] <= 1


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def test_of_equal_budgets_the_least_is_the_best() -> None:
    grid = {(4, 2): {"a": 0.5}, (1, 2): {"a": 0.5}, (2, 2): {"a": 0.4}, (8, 1): {"a": 1.0}}
    assert best_query_budgets(grid, 2) == {"a": 1}
    assert oracles(grid, (2, 2)) == {"fixed": 0.4, "k_q": 0.5, "k_p": 0.4, "joint": 1.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_features": None}, "run select-budget again"),
        ({"grid": [{"num_query_masks": 1, "num_passage_masks": 1, "fused": 0.5}]}, "('per_query'); run select-budget"),
        ({"query_features": {"q0": {"length": 3, "entropy": 1.0}}}, "a number for each query that has features"),
        ({"choice": {"num_query_masks": 3, "num_passage_masks": 1}}, "K_q/K_p = 3/1 was not tried, only 1/1, 1/2, "),
    ],
)
def test_what_is_no_sweep(
    change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.json").write_text(json.dumps(made_up_sweep(3) | change))
    assert main(["analyze-budget", "--input", str(tmp_path / "s.json")]) == 2
    assert re.search(re.escape(words), capsys.readouterr().err)


def test_a_table_learned_on_other_queries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to 5 tokens one mask is best, above it four; a third of the training queries has up to 4 tokens, or 7."""
    training, other = made_up_sweep(1, queries=90), made_up_sweep(2, queries=30)
    for sweep in (training, other):
        for number, features in enumerate(sweep["query_features"].values()):
            features |= {"length": 2 + number % 9, "entropy": 1.0}
    for cell in training["grid"]:
        for query, features in training["query_features"].items():
            best = 1 if features["length"] <= 5 else 4
            cell["per_query"]["dense"][query] = float(cell["num_query_masks"] == best)
    (tmp_path / "training.json").write_text(json.dumps(training))
    found = analysis_of(tmp_path, other, masks=("--learn", str(tmp_path / "training.json")))["modes"]["dense"]["table"]
    cells = {(cell["num_query_masks"], cell["num_passage_masks"]): cell["per_query"]["dense"] for cell in other["grid"]}
    chosen = {query: 1 if values["length"] <= 4 else 4 for query, values in other["query_features"].items()}
    expected = sum(cells[k_q, 4][query] for query, k_q in chosen.items()) / 30
    assert found["score"] == pytest.approx(expected)
    assert found["difference"] == pytest.approx(expected - sum(cells[2, 4].values()) / 30)
    assert found["budgets"] == {"1": 12, "4": 18}
    assert f"{expected:.4f}  {found['difference']:+.4f} (p=" in capsys.readouterr().out
    few = made_up_sweep(3, queries=5)
    (tmp_path / "training.json").write_text(json.dumps(few))
    table = analysis_of(tmp_path, other, masks=("--learn", str(tmp_path / "training.json")))["modes"]["dense"]["table"]
    assert table["budgets"] == {"2": 30}  # too few to learn of: the fixed budget


def test_files_of_other_budgets_are_not_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = made_up_sweep(3), made_up_sweep(4)
    other["grid"] = other["grid"][:-1]
    for name, sweep in (("one", one), ("other", other)):
        (tmp_path / name).write_text(json.dumps(sweep))
    assert main(["analyze-budget", "--input", str(tmp_path / "one"), str(tmp_path / "other")]) == 2
    assert "the files differ in metric, modes or budgets" in capsys.readouterr().err
