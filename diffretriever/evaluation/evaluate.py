"""Evaluate a release on a benchmark: encode, search in every mode, compute metrics, test the differences."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data.benchmark import Benchmark, note_unknown_passages, read_benchmark
from ..data.corpus import read_corpus
from ..encode.encode_store import encode_store
from ..search.modes import FUSED, MODES
from ..search.searcher import Searcher
from ..store.compression import CODEBOOK_FILE, open_store
from ..store.identity import check_searchable, describe_model
from ..store.plan import Plan
from ..store.store import Store
from .bm25 import BM25
from .comparisons import BM25_ROW, compare, pairs_of
from .hybrid import EVEN, WEIGHTS, best_weight, choose_weight, fused_runs, index_of, modes_to_fuse, tuned_name
from .metrics import DEFAULT_METRICS, PerQuery, evaluate_run, parse_metric
from .report import Evaluation
from .runs import Run, cut, without_own_id
from .searching import median_ms, query_latency, search_modes, search_weights, spread


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Args:
        modes: scoring modes.
        metrics: names, see `parse_metric`.
        fusion_weight: the dense scores' share in the fusion modes.
        depth: passages a query, in the runs and in the metrics.
        bm25: also evaluate BM25, alone and fused with `bm25_with`.
        bm25_with: modes to fuse with BM25; None takes multi_dense and fusion_multi_sparse_max.
        tune_split: a split on which to choose the weights of the fusion modes and of the fusions with BM25; they become
            rows of their own. None reports `fusion_weight` and, with BM25, 0.5 alone.
        baseline: the rows of another evaluation, for the mark †; see `pairs_of`.
        correction: of the significance tests, "bonferroni" or "holm".
        latency: time so many single queries; 0 times none.
        progress: draw progress bars.
    """

    modes: Sequence[str] = MODES
    metrics: Sequence[str] = DEFAULT_METRICS
    fusion_weight: float = 0.5
    depth: int = 1000
    bm25: bool = False
    bm25_with: Sequence[str] | None = None
    tune_split: str | None = None
    baseline: Mapping[str, PerQuery] | None = field(default=None, repr=False)
    correction: str = "bonferroni"
    latency: int = 0
    progress: bool = False

    def measures(self, relevance_level: int = 1) -> list[Any]:
        """Return the metrics.

        Raises:
            ValueError: an option is wrong; the message says which.
        """
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"scoring mode {mode!r} is not known; the modes are {', '.join(MODES)}.")
        if self.depth < 1 or self.latency < 0:
            raise ValueError(f"the depth must be at least 1 and the latency at least 0: {self.depth}, {self.latency}.")
        if not 0.0 <= self.fusion_weight <= 1.0:
            raise ValueError(f"the fusion weight must lie between 0 and 1, got {self.fusion_weight}.")
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


def evaluate(
    model: Any, benchmark: Benchmark, store: Any, options: Options | None = None, title: str = ""
) -> tuple[Evaluation, dict[str, Run]]:
    """Evaluate every mode on a benchmark whose corpus is encoded.

    Args:
        model: from `AutoModel.from_pretrained`; encodes the queries.
        benchmark: from `read_benchmark`.
        store: the encoded corpus, or anything else that a `Searcher` takes and that has `ids()`.
        options: None takes the defaults.
        title: of the table.

    Returns:
        The evaluation, and {row: run}, as it was evaluated.

    Raises:
        ValueError: an option is wrong, or corpus and judgements do not belong together.
    """
    options = options or Options()
    measures = options.measures(benchmark.relevance_level)
    tuning = _tuning_split(benchmark, options)
    notes = benchmark.notes + note_unknown_passages(benchmark, set(store.ids()))
    searcher = Searcher(store)
    runs = _search(model, searcher, benchmark, options.modes, options)
    latency = {}
    if options.latency:
        latency = query_latency(model, searcher, benchmark.queries, options.modes, options.depth, options.latency)
    if tuning is not None:
        tuned, said = _tuned_rows(model, searcher, benchmark, tuning, options, measures[0])
        runs |= tuned
        notes += said
    if options.bm25:
        index = index_of(read_corpus(benchmark.folder))
        lexical, said = _bm25_rows(model, searcher, index, benchmark, tuning, runs, options, measures[0])
        runs |= lexical
        notes += said
        if options.latency:
            texts = spread(benchmark.queries, options.latency)
            latency[BM25_ROW] = median_ms(lambda text: index.search({"query": text}, options.depth), texts)
    rows = {name: evaluate_run(run, benchmark.qrels, measures) for name, run in runs.items()}
    if len(benchmark.queries) < 2:
        return Evaluation(title, rows, latency, notes=[*notes, "One query: no significance tests."]), runs
    comparisons = compare(rows, pairs_of(rows, options.baseline), options.correction)
    return Evaluation(title, rows, latency, comparisons, options.correction, notes), runs


def _tuning_split(benchmark: Benchmark, options: Options) -> Benchmark | None:
    if options.tune_split is None:
        return None
    return read_benchmark(benchmark.folder, options.tune_split, benchmark.relevance_level)


def _search(
    model: Any,
    searcher: Searcher,
    benchmark: Benchmark,
    modes: Sequence[str],
    options: Options,
    fusion_weight: float | None = None,
) -> dict[str, Run]:
    """Search a benchmark's queries in some modes, under its rule for own ids."""
    weight = options.fusion_weight if fusion_weight is None else fusion_weight
    extra = 0 if benchmark.own_ids_count else 1
    runs = search_modes(model, searcher, benchmark.queries, modes, options.depth + extra, weight, options.progress)
    return {mode: _evaluated(run, benchmark, options.depth) for mode, run in runs.items()}


def _evaluated(run: Run, benchmark: Benchmark, depth: int) -> Run:
    return cut(run if benchmark.own_ids_count else without_own_id(run), depth)


def _tuned_rows(
    model: Any, searcher: Searcher, benchmark: Benchmark, tuning: Benchmark, options: Options, metric: Any
) -> tuple[dict[str, Run], list[str]]:
    """Return the runs of the fusion modes at the weights that are best on `tuning`, and how those were chosen."""
    found, notes = {}, []
    for mode, figures in _weight_figures(model, searcher, tuning, options, metric).items():
        weight = choose_weight(figures)
        notes.append(f"{mode}: {metric} on split {options.tune_split} is best at the dense weight {weight:g}.")
        if weight != options.fusion_weight:
            found[tuned_name(mode, weight)] = _search(model, searcher, benchmark, [mode], options, weight)[mode]
    return found, notes


def _weight_figures(
    model: Any, searcher: Searcher, tuning: Benchmark, options: Options, metric: Any
) -> dict[str, dict[float, float]]:
    """Return {fusion mode: {weight: the metric's mean}} on the tuning split."""
    modes = [mode for mode in options.modes if mode in FUSED]
    if not modes:
        return {}
    extra = 0 if tuning.own_ids_count else 1
    top_k = metric.params.get("cutoff", options.depth)  # what the metric does not see need not be ranked
    values: dict[str, dict[float, list[float]]] = {mode: {weight: [] for weight in WEIGHTS} for mode in modes}
    for mode, weight, run in search_weights(
        model, searcher, tuning.queries, modes, WEIGHTS, top_k + extra, options.depth + extra
    ):
        qrels = {query: tuning.qrels[query] for query in run}
        found = evaluate_run(_evaluated(run, tuning, top_k), qrels, [metric])[str(metric)]
        values[mode][weight] += found.values()
    return {mode: {weight: fmean(one) for weight, one in weights.items()} for mode, weights in values.items()}


def _bm25_rows(
    model: Any,
    searcher: Searcher,
    index: BM25,
    benchmark: Benchmark,
    tuning: Benchmark | None,
    runs: Mapping[str, Run],
    options: Options,
    metric: Any,
) -> tuple[dict[str, Run], list[str]]:
    """Return the runs of BM25, alone and fused with ours, and how the weights were chosen."""

    def bm25_run(asked: Benchmark) -> Run:
        return _evaluated(index.search(asked.queries, options.depth + 1), asked, options.depth)

    found, notes = bm25_run(benchmark), []
    fused = modes_to_fuse(options.modes, options.bm25_with)
    weights = {mode: [EVEN] for mode in fused}
    if tuning is not None:
        ours, theirs = _search(model, searcher, tuning, fused, options), bm25_run(tuning)
        for mode in fused:
            weight = best_weight(ours[mode], theirs, tuning.qrels, metric, options.depth)
            weights[mode] = list(dict.fromkeys([EVEN, weight]))
            notes.append(f"{mode} with BM25: {metric} on split {options.tune_split} is best at the weight {weight:g}.")
    return {BM25_ROW: found} | fused_runs(runs, found, weights, options.depth), notes


@contextmanager
def encoded_corpus(
    model: Any, benchmark: Benchmark, folder: Path | None = None, dtype: str | None = None, progress: bool = False
) -> Iterator[Store]:
    """Encode the benchmark's corpus, resume a store that was begun, or check and reuse one that is there.

    A compressed store (`diffretriever compress`) is taken as it is; only its model is compared.

    Args:
        model: encodes.
        benchmark: says where the corpus is.
        folder: of the store; None makes a temporary one, which is gone afterwards.
        dtype: of the stored vectors; None takes the store's, or float16.
        progress: draw a bar.

    Yields:
        The store.

    Raises:
        ValueError: the store was made by another model or from another corpus; the message names the difference.
    """
    with tempfile.TemporaryDirectory(prefix="diffretriever-") if folder is None else nullcontext(folder) as place:
        if (Path(place) / CODEBOOK_FILE).is_file():
            yield _compressed(model, Path(place))
            return
        begun = Plan.read(Path(place)) if Path(place).is_dir() else None
        chosen = dtype or (begun.settings.dtype if begun else "float16")
        yield encode_store(model, benchmark.folder, place, dtype=chosen, show_progress_bar=progress)


def _compressed(model: Any, folder: Path) -> Store:
    store = open_store(folder)
    queries = describe_model(model, is_query=True, dtype=store.manifest.dtype)
    check_searchable(store.manifest, queries, str(folder))
    return store
