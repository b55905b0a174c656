"""What to evaluate, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.benchmark import Benchmark
from ..model.scoring import check_mode, fusion_weight_of
from ..search.modes import FUSED, MODES
from .comparisons import check_comparable
from .hybrid import modes_to_fuse
from .metrics import DEFAULT_METRICS, PerQuery, parse_metric


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Args:
        modes: scoring modes.
        metrics: names, see `parse_metric`.
        fusion_weight: the dense scores' share in the fusion modes; None is the model's own, else half.
        fusion: how these fuse, see `Searcher`; "runs" is that of the paper's tables.
        depth: passages a query, in the runs and in the metrics.
        bm25: also evaluate BM25, alone and fused with `bm25_with`.
        bm25_with: modes to fuse with BM25; None takes multi_dense and fusion_multi_sparse_max.
        tune_split: a split on which to choose the weights of the fusion modes and of the fusions with BM25; they become
            rows of their own. None reports `fusion_weight` and, with BM25, half alone.
        baseline: the rows of the single-vector evaluation, for the mark †; see `pairs_of`.
        counterpart: those of the matched autoregressive method, for the mark ‡.
        correction: of the significance tests, "bonferroni" or "holm".
        latency: time so many single queries; 0 times none.
        progress: draw progress bars.
    """

    modes: Sequence[str] = MODES
    metrics: Sequence[str] = DEFAULT_METRICS
    fusion_weight: float | None = None
    fusion: str = "exact"
    depth: int = 1000
    bm25: bool = False
    bm25_with: Sequence[str] | None = None
    tune_split: str | None = None
    baseline: Mapping[str, PerQuery] | None = field(default=None, repr=False)
    counterpart: Mapping[str, PerQuery] | None = field(default=None, repr=False)
    correction: str = "bonferroni"
    latency: int = 0
    progress: bool = False

    def measures(self, relevance_level: int = 1) -> list[Any]:
        """Return the metrics.

        Raises:
            ValueError: an option is wrong; the message says which.
        """
        for mode in self.modes:
            check_mode(mode)
        fusion_weight_of(None, self.fusion_weight)
        if self.fusion_weight is not None and not FUSED.keys() & set(self.modes):
            raise ValueError(
                f"--fusion-weight is for the fusion modes, and there is none: the modes are {', '.join(self.modes)}."
            )
        if self.depth < 1 or self.latency < 0:
            raise ValueError(f"the depth must be at least 1 and the latency at least 0: {self.depth}, {self.latency}.")
        if not self.modes or not self.metrics:
            raise ValueError("an evaluation needs at least one mode and one metric.")
        if self.bm25:
            modes_to_fuse(self.modes, self.bm25_with)
        elif self.bm25_with:
            raise ValueError("--bm25-with belongs to --bm25; give that as well.")
        elif self.tune_split and not FUSED.keys() & set(self.modes):
            raise ValueError(
                f"--tune-split chooses weights of fusions, and there is none: the modes are {', '.join(self.modes)}. "
                "Add a fusion mode or --bm25."
            )
        measures = [parse_metric(name, relevance_level) for name in self.metrics]
        for measure in measures:
            if measure.params.get("cutoff", 0) > self.depth:
                raise ValueError(
                    f"{measure} needs rankings of {measure['cutoff']} passages; the depth is {self.depth}."
                )
        return measures

    def check(self, benchmark: Benchmark) -> list[Any]:
        """Return the metrics, with the benchmark's relevance level.

        Args:
            benchmark: what is to be evaluated.

        Raises:
            ValueError: an option is wrong, or an evaluation to compare with has other modes, metrics or queries.
        """
        measures = self.measures(benchmark.relevance_level)
        names = [str(measure) for measure in measures]
        for name, rows in (("baseline", self.baseline), ("counterpart", self.counterpart)):
            if rows is not None:
                check_comparable(name, rows, self.modes, names, benchmark.queries)
        return measures
