"""Metrics, one definition of each: trec_eval's, through ir_measures with pytrec_eval as the only provider.

ir_measures would choose another provider for RR@10, with other rules for ties; here a reciprocal rank with a cutoff is
trec_eval's reciprocal rank of the run cut to that depth (in trec_eval itself: `-M 10 -m recip_rank`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..data.qrels import LARGEST_GRADE
from ..files.install import install_hint
from .runs import cut

Qrels = Mapping[str, Mapping[str, int]]
PerQuery = dict[str, dict[str, float]]  # metric -> query id -> value

DEFAULT_METRICS = ("nDCG@10", "RR@10", "R@100", "R@1000", "AP")
# what the field also calls them, in lower case -> ir_measures' name
NAMES = {"ndcg": "nDCG", "rr": "RR", "mrr": "RR", "r": "R", "recall": "R", "ap": "AP", "map": "AP", "p": "P"}
NAMES |= {"precision": "P", "success": "Success"}
NEEDS_CUTOFF = ("R", "P", "Success")
FORM = re.compile(r"(?P<name>[A-Za-z]+)(?:\(rel=(?P<rel>[0-9]{1,20})\))?(?:@(?P<cutoff>[0-9]{1,20}))?")


def parse_metric(text: str, relevance_level: int = 1) -> Any:
    """Read a metric's name.

    Args:
        text: as ir_measures writes it, `nDCG@10`, `RR@10`, `R(rel=2)@100`, `AP`, or as the field calls it, `MRR@10`,
            `Recall@100`, `MAP`.
        relevance_level: the least grade that counts as relevant in the binary metrics (all but nDCG), where the name
            does not say. TREC Deep Learning uses 2.

    Returns:
        An ir_measures measure; `str` of it is the name used everywhere.

    Raises:
        ValueError: no such metric, or a cutoff or relevance level that is not between 1 and a million.
        ImportError: ir_measures is not installed.

    >>> parse_metric("MRR@10"), parse_metric("MAP", relevance_level=2)
    (RR@10, AP(rel=2))
    """
    measures = _ir_measures()
    found = FORM.fullmatch(text.strip())
    name = NAMES.get(found["name"].lower()) if found else None
    if found is None or name is None:
        raise ValueError(
            f"metric {text!r} is not known; the metrics are nDCG@k, RR@k (MRR@k), R@k (Recall@k), AP (MAP), P@k and "
            "Success@k, all but nDCG also as e.g. R(rel=2)@100."
        )
    settings = {}
    if found["cutoff"] is not None:
        settings["cutoff"] = _in_range(int(found["cutoff"]), text, "its cutoff")
    elif name in NEEDS_CUTOFF:
        raise ValueError(f"metric {text!r} needs a cutoff, e.g. {name}@100.")
    if name != "nDCG":
        level = _in_range(relevance_level if found["rel"] is None else int(found["rel"]), text, "rel")
        settings |= {} if level == 1 else {"rel": level}
    elif found["rel"] is not None:
        raise ValueError(f"metric {text!r}: nDCG uses the grades themselves, so it takes no `rel`.")
    measure = getattr(measures, name)
    return measure(**settings) if settings else measure


def _in_range(number: int, text: str, what: str) -> int:
    if not 1 <= number <= LARGEST_GRADE:
        raise ValueError(f"metric {text!r}: {what} must lie between 1 and {LARGEST_GRADE:,}.")
    return number


def _ir_measures() -> Any:
    for package in ("ir_measures", "pytrec_eval"):
        if find_spec(package) is None:
            raise ImportError(f"metrics need {package}: {install_hint('retrieval')}")
    return import_module("ir_measures")


def evaluate_run(run: Mapping[str, Mapping[str, float]], qrels: Qrels, metrics: Sequence[Any]) -> PerQuery:
    """Compute metrics for every query that has judgements; one that the run leaves out scores 0, as trec_eval -c does.

    Args:
        run: {query id: {passage id: score}}; see `runs` for its order.
        qrels: {query id: {passage id: grade}}. Unjudged passages count as grade 0; below 0 counts as 0.
        metrics: from `parse_metric`.

    Returns:
        {metric name: {query id: value}}, queries in the order of the qrels.

    Raises:
        ValueError: there are no judgements, or a grade is beyond a million.

    >>> evaluate_run({"q": {"a": 2.0, "b": 1.0}}, {"q": {"b": 1}}, [parse_metric("RR@10")])
    {'RR@10': {'q': 0.5}}
    """
    if not any(qrels.values()):
        raise ValueError("the qrels hold no judgement, so there is nothing to evaluate.")
    if (largest := max(grade for grades in qrels.values() for grade in grades.values())) > LARGEST_GRADE:
        raise ValueError(
            f"the qrels hold the grade {largest}; the largest that pytrec_eval is given is {LARGEST_GRADE:,}."
        )
    measures = _ir_measures()
    cut_off = {metric: metric.NAME == "RR" and "cutoff" in metric.params for metric in metrics}
    found = _pytrec_eval(run, qrels, [metric for metric in metrics if not cut_off[metric]])
    for metric in metrics:
        if cut_off[metric]:
            whole = measures.RR(rel=metric["rel"])
            found[metric] = _pytrec_eval(cut(run, metric["cutoff"]), qrels, [whole])[whole]
    return {str(metric): {query: found[metric][query] for query in qrels} for metric in metrics}


def _pytrec_eval(run: Mapping[str, Mapping[str, float]], qrels: Qrels, metrics: Sequence[Any]) -> dict[Any, Any]:
    """Return {metric: {query id: value}}."""
    provider = _ir_measures().providers.registry["pytrec_eval"]
    found: dict[Any, dict[str, float]] = {metric: {} for metric in metrics}
    for one in provider.iter_calc(list(metrics), qrels, run) if metrics else ():
        found[one.measure][one.query_id] = one.value
    return found


def means(values: PerQuery) -> dict[str, float]:
    """Average each metric over its queries.

    >>> means({"RR@10": {"a": 1.0, "b": 0.5}})
    {'RR@10': 0.75}
    """
    return {metric: math.fsum(queries.values()) / len(queries) for metric, queries in values.items()}
