"""What is compared: our modes and BM25, alone and fused, at the weights that were given and those chosen on a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.benchmark import Benchmark
from ..model.scoring import fusion_weight_of
from ..search.modes import FUSED
from ..search.searcher import Searcher
from .bm25 import BM25
from .comparisons import BM25_ROW
from .hybrid import EVEN_FUSION, fuse_runs, fused_name, modes_to_fuse, tune_bm25, tune_modes, tuned_name
from .options import Options
from .runs import Run
from .searching import judged_part, median_ms, query_latency, reach, search_benchmark, spread


@dataclass(frozen=True)
class Weights:
    """Weights that were chosen on another split.

    Args:
        modes: {fusion mode: the dense scores' share}.
        bm25: {mode: its share beside BM25}.
    """

    modes: dict[str, float] = field(default_factory=dict)
    bm25: dict[str, float] = field(default_factory=dict)

    def notes(self, metric: Any, split: str) -> list[str]:
        """Say by which metric and on which split they were chosen, a line each."""
        best = f"{metric} on split {split} is best at the"
        notes = [f"{mode}: {best} dense weight {weight:g}." for mode, weight in self.modes.items()]
        return notes + [f"{mode} with BM25: {best} weight {weight:g}." for mode, weight in self.bm25.items()]


@dataclass(frozen=True)
class Systems:
    """A release over an encoded corpus and, if asked for, BM25 over its texts.

    Args:
        model: encodes the queries.
        searcher: over the corpus.
        bm25: None leaves it out.
        options: how to evaluate.
    """

    model: Any
    searcher: Searcher
    bm25: BM25 | None
    options: Options

    @property
    def fusion_weight(self) -> float:
        """The dense scores' share in the fusion modes: what was asked for, else the model's own, else half."""
        return fusion_weight_of(self.model.config, self.options.fusion_weight)

    def choose_weights(self, tuning: Benchmark, metric: Any) -> Weights:
        """Choose the weights of all fusions: those with the best mean of a metric on a split kept for this.

        Args:
            tuning: the split.
            metric: from `parse_metric`.
        """
        fusions, depth = [mode for mode in self.options.modes if mode in FUSED], self.options.depth
        modes = tune_modes(self.model, self.searcher, tuning, fusions, metric, depth)
        if self.bm25 is None:
            return Weights(modes)
        ours = self._rank(tuning, {mode: (mode, self.fusion_weight) for mode in self._beside_bm25()})
        theirs = self._rank_bm25(self.bm25, tuning)
        bm25 = {mode: tune_bm25(run, theirs, tuning.qrels, metric, depth) for mode, run in ours.items()}
        return Weights(modes, bm25)

    def rank(self, benchmark: Benchmark, weights: Weights) -> dict[str, Run]:
        """Return {row of the table: run}: the modes, those at chosen weights, BM25, our modes fused with it."""
        given = self.fusion_weight
        rows = {mode: (mode, given) for mode in self.options.modes}
        rows |= {tuned_name(mode, best): (mode, best) for mode, best in weights.modes.items() if best != given}
        runs = self._rank(benchmark, rows)
        if self.bm25 is None:
            return runs
        runs[BM25_ROW] = self._rank_bm25(self.bm25, benchmark)
        for mode in self._beside_bm25():
            for weight in dict.fromkeys([EVEN_FUSION, weights.bm25.get(mode, EVEN_FUSION)]):
                fused = fuse_runs(runs[mode], runs[BM25_ROW], weight, self.options.depth)
                runs[fused_name(mode, weight)] = fused
        return runs

    def latency(self, queries: Mapping[str, str]) -> dict[str, float]:
        """Return {mode or BM25: median milliseconds of a single query}; {} where none is to be timed."""
        count, depth = self.options.latency, self.options.depth
        if not count:
            return {}
        found = query_latency(self.model, self.searcher, queries, self.options.modes, depth, count)
        if self.bm25 is not None:
            index = self.bm25
            found[BM25_ROW] = median_ms(lambda text: index.rank([text], depth), spread(queries, count))
        return found

    def _beside_bm25(self) -> list[str]:
        return modes_to_fuse(self.options.modes, self.options.bm25_with)

    def _rank(self, benchmark: Benchmark, rows: Mapping[str, tuple[str, float]]) -> dict[str, Run]:
        options = self.options
        return search_benchmark(self.model, self.searcher, benchmark, rows, options.depth, options.progress)

    def _rank_bm25(self, index: BM25, benchmark: Benchmark) -> Run:
        depth = self.options.depth
        return judged_part(index.search(benchmark.queries, reach(benchmark, depth)), benchmark, depth)
