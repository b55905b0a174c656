"""What each query would gain from a budget of its own (paper §6.3), from the JSON of `diffretriever select-budget`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.install import install_hint
from ..files.lines import read_object
from ..model.query_budgets import FEATURES

Budget = tuple[int, int]  # (K_q, K_p)


@dataclass(frozen=True)
class Sweep:
    """Every query's score under every budget.

    Args:
        metric: of the scores.
        choice: the budget that was chosen for all queries.
        scores: {"dense", "sparse" or "fused": {budget: {query id: score}}}.
        features: {query id: {"length": tokens, "entropy": bits a token}}.
    """

    metric: str
    choice: Budget
    scores: dict[str, dict[Budget, dict[str, float]]]
    features: dict[str, dict[str, float]]


def read_sweep(path: str | Path) -> Sweep:
    """Read what `diffretriever select-budget` wrote.

    Args:
        path: JSON.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, one without each query's scores, or cells with different queries.
    """
    return sweep_of(read_object(path), path)


def sweep_of(content: Mapping[str, Any], path: str | Path) -> Sweep:
    """Return what `diffretriever select-budget` found as a `Sweep`; `path` is for messages, errors as `read_sweep`."""
    try:
        cells = {_budget(cell): cell["per_query"] for cell in content["grid"]}
        modes = list(next(iter(cells.values())))
        scores = {mode: {budget: dict(cell[mode]) for budget, cell in cells.items()} for mode in modes}
        sweep = Sweep(str(content["metric"]), _budget(content["choice"]), scores, content["query_features"])
        queries = sweep.features.keys()
        whole = queries and all(row.keys() == queries for grid in scores.values() for row in grid.values())
        numbers = [value for grid in scores.values() for row in grid.values() for value in row.values()]
        numbers += [features[name] for features in sweep.features.values() for name in FEATURES]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{path}: expected each query's scores and features, as `diffretriever select-budget` writes them, but "
            f"found none or another form ({error}); run select-budget again."
        ) from error
    if not whole or not all(isinstance(value, (int, float)) for value in numbers):
        raise ValueError(f"{path}: every budget needs a number for each query that has features, and for no other.")
    return sweep


def _budget(cell: Mapping[str, Any]) -> Budget:
    return int(cell["num_query_masks"]), int(cell["num_passage_masks"])


def pool(sweeps: Sequence[Sweep]) -> Sweep:
    """Join the queries of several sweeps, e.g. of several benchmarks; the choice is the first one's.

    Raises:
        ValueError: they have other metrics, modes or budgets.
    """
    first = sweeps[0]
    if any((one.metric, _grid(one)) != (first.metric, _grid(first)) for one in sweeps):
        raise ValueError("the files differ in metric, modes or budgets; sweep all of them over the same budgets.")

    def name(number: int, query: str) -> str:
        return query if len(sweeps) == 1 else f"{number}:{query}"

    scores = {
        mode: {
            budget: {
                name(number, query): value
                for number, one in enumerate(sweeps)
                for query, value in one.scores[mode][budget].items()
            }
            for budget in grid
        }
        for mode, grid in first.scores.items()
    }
    features = {
        name(number, query): values for number, one in enumerate(sweeps) for query, values in one.features.items()
    }
    return Sweep(first.metric, first.choice, scores, features)


def _grid(sweep: Sweep) -> dict[str, set[Budget]]:
    return {mode: set(grid) for mode, grid in sweep.scores.items()}


def oracles(grid: Mapping[Budget, Mapping[str, float]], fixed: Budget) -> dict[str, float]:
    """Return what the best budget of each query would give; upper bounds, as they use the judgements (paper Fig. 6).

    Args:
        grid: {budget: {query id: score}}.
        fixed: the budget of all queries.

    Returns:
        The means of "fixed", of the best K_q with K_p fixed ("k_q"), the best K_p with K_q fixed ("k_p"), and both
        ("joint").

    >>> grid = {(1, 1): {"a": 0.0, "b": 1.0}, (4, 1): {"a": 0.5, "b": 0.0}, (1, 4): {"a": 0.0, "b": 0.5}}
    >>> oracles(grid, fixed=(4, 1))
    {'fixed': 0.25, 'k_q': 0.75, 'k_p': 0.25, 'joint': 0.75}
    """
    chosen = {
        "fixed": [fixed],
        "k_q": [budget for budget in grid if budget[1] == fixed[1]],
        "k_p": [budget for budget in grid if budget[0] == fixed[0]],
        "joint": list(grid),
    }
    queries = grid[fixed]
    return {
        name: math.fsum(max(grid[budget][query] for budget in budgets) for query in queries) / len(queries)
        for name, budgets in chosen.items()
    }


def best_query_budgets(grid: Mapping[Budget, Mapping[str, float]], num_passage_masks: int) -> dict[str, int]:
    """Return {query id: the K_q with its best score at this K_p}; of equal ones the least.

    >>> best_query_budgets({(1, 4): {"a": 0.2, "b": 0.5}, (2, 4): {"a": 0.3, "b": 0.5}}, num_passage_masks=4)
    {'a': 2, 'b': 1}
    """
    rows = {k_q: row for (k_q, k_p), row in sorted(grid.items()) if k_p == num_passage_masks}
    return {query: max(rows, key=lambda k_q: rows[k_q][query]) for query in next(iter(rows.values()))}


def correlations(best: Mapping[str, int], features: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Correlate each query's best K_q with what is known of it (paper Fig. 7), by scipy.

    Args:
        best: from `best_query_budgets`.
        features: {query id: {"length", "entropy"}}.

    Returns:
        {feature: {"spearman", "spearman_p", "kendall", "kendall_p"}}, Kendall's being tau-b; None where one of the two
        is the same for all queries.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import kendalltau, spearmanr
    except ImportError as error:
        raise ImportError(f"correlations need scipy: {install_hint('retrieval')}") from error
    found: dict[str, Any] = {}
    for feature in FEATURES:
        pairs = [(k_q, features[query][feature]) for query, k_q in best.items()]
        sides = list(zip(*pairs, strict=True))
        constant = any(len(set(side)) < 2 for side in sides)
        found[feature] = {}
        for name, test in (("spearman", spearmanr), ("kendall", kendalltau)):
            result = None if constant else test(*sides)
            found[feature][name] = None if result is None else float(result.statistic)
            found[feature][f"{name}_p"] = None if result is None else float(result.pvalue)
    return found


def analyze(sweep: Sweep, fixed: Budget | None = None) -> dict[str, Any]:
    """Compare the fixed budget with the oracles, and ask whether a query's best K_q can be foreseen.

    Args:
        sweep: from `read_sweep`.
        fixed: the budget of all queries; None takes the sweep's choice.

    Returns:
        {"metric", "queries", "num_query_masks", "num_passage_masks", "modes": {mode: {"oracles", "correlations",
        "indifferent"}}}; `indifferent` counts the queries that score the same with every K_q.

    Raises:
        ValueError: the fixed budget was not tried.
    """
    fixed = fixed or sweep.choice
    modes: dict[str, Any] = {}
    for mode, grid in sweep.scores.items():
        if fixed not in grid:
            tried = ", ".join(f"{k_q}/{k_p}" for k_q, k_p in sorted(grid))
            raise ValueError(f"K_q/K_p = {fixed[0]}/{fixed[1]} was not tried, only {tried}.")
        row = [scores for budget, scores in grid.items() if budget[1] == fixed[1]]
        modes[mode] = {
            "oracles": oracles(grid, fixed),
            "correlations": correlations(best_query_budgets(grid, fixed[1]), sweep.features),
            "indifferent": sum(len({scores[query] for scores in row}) == 1 for query in sweep.features),
        }
    sizes = {"queries": len(sweep.features), "num_query_masks": fixed[0], "num_passage_masks": fixed[1]}
    return {"metric": sweep.metric, **sizes, "modes": modes}


def to_text(analysis: Mapping[str, Any]) -> str:
    """Return an analysis as two tables for the terminal."""
    lines = [f"{analysis['metric']} of {analysis['queries']} queries"]
    lines.append(f"{'':<8}{'fixed':>10}{'best K_q':>10}{'best K_p':>10}{'best both':>10}")
    for mode, found in analysis["modes"].items():
        lines.append(f"{mode:<8}" + "".join(f"{value:10.4f}" for value in found["oracles"].values()))
    lines += ["", "a query's best K_q against its length in tokens and its entropy in bits"]
    columns = [f"{feature} {name}" for feature in FEATURES for name in ("Spearman", "Kendall")]
    lines.append(f"{'':<8}" + "".join(f"{column:>18}" for column in columns) + f"{'indifferent':>14}")
    for mode, found in analysis["modes"].items():
        cells = [
            _correlation(found["correlations"][feature], name)
            for feature in FEATURES
            for name in ("spearman", "kendall")
        ]
        lines.append(f"{mode:<8}" + "".join(f"{cell:>18}" for cell in cells) + f"{found['indifferent']:>14}")
    tried = {mode: found["table"] for mode, found in analysis["modes"].items() if "table" in found}
    lines += ["", "K_q by a table of length and entropy, learned on other queries"] if tried else []
    for mode, found in tried.items():
        used = ", ".join(f"{count} with {k_q}" for k_q, count in found["budgets"].items())
        lines.append(f"{mode:<8}{found['score']:10.4f}  {found['difference']:+.4f} (p={found['p']:.1g}); {used}")
    return "\n".join(lines)


def _correlation(found: Mapping[str, Any], name: str) -> str:
    value = found[name]
    return "-" if value is None else f"{value:+.3f} (p={found[name + '_p']:.1g})"
