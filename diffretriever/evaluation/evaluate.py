"""Evaluate a release on a benchmark: rankings, the field's metrics, tests of the differences, a table."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..data.benchmark import Benchmark, note_unknown_passages, read_benchmark
from ..data.corpus import read_corpus
from ..encode.cut_texts import TrainedCut
from ..encode.encode_store import encode_store
from ..search.modes import FUSED
from ..search.searcher import Searcher
from ..store.compression import CODEBOOK_FILE, open_store
from ..store.identity import check_searchable, describe_model
from ..store.manifest import MANIFEST_FILE, Manifest
from ..store.plan import Plan
from ..store.store import Store
from .comparisons import compare, pairs_of
from .hybrid import EVEN_FUSION, index_of
from .metrics import evaluate_run
from .options import Options
from .report import Evaluation
from .runs import Run
from .systems import Systems, Weights


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
    measures = options.check(benchmark)
    notes = benchmark.notes + note_unknown_passages(benchmark, set(store.ids()))
    bm25 = index_of(read_corpus(benchmark.folder)) if options.bm25 else None
    systems, weights = Systems(model, Searcher(store, fusion=options.fusion), bm25, options), Weights()
    notes += _notes_on_cuts(model, benchmark)
    if options.fusion == "runs" and FUSED.keys() & set(options.modes):
        notes.append("The fusion modes fuse the two sides' rankings alone, as the paper's tables do.")
    if systems.fusion_weight != EVEN_FUSION and FUSED.keys() & set(options.modes):
        notes.append(f"The fusion modes have the dense weight {systems.fusion_weight:g}.")
    if options.tune_split is not None:
        tuning = read_benchmark(benchmark.folder, options.tune_split, benchmark.relevance_level)
        weights = systems.choose_weights(tuning, measures[0])
        notes += weights.notes(measures[0], options.tune_split)
    runs = systems.rank(benchmark, weights)
    rows = {name: evaluate_run(run, benchmark.qrels, measures) for name, run in runs.items()}
    latency, comparisons = systems.latency(benchmark.queries), []
    if len(benchmark.queries) < 2:
        notes.append("One query: no significance tests.")
    else:
        pairs = pairs_of(rows, options.baseline, options.counterpart)
        comparisons = compare(rows, pairs, options.correction)
    return Evaluation(title, rows, latency, comparisons, options.correction, notes), runs


def _notes_on_cuts(model: Any, benchmark: Benchmark) -> list[str]:
    """Say where queries are cut more often than in training; encoding the corpus says it of passages."""
    trained = TrainedCut.of(model, is_query=True)
    if trained is None:
        return []
    prepared = model.texts.prepare(list(benchmark.queries.values()), True, content_filter=False)
    warning = trained.warning(sum(text.cut for text in prepared), len(prepared))
    return [] if warning is None else [warning]


@contextmanager
def encoded_corpus(
    model: Any,
    source: str | Path,
    folder: Path | None = None,
    dtype: str | None = None,
    progress: bool = False,
    tokens_per_batch: int | None = None,
) -> Iterator[Store]:
    """Encode a corpus, resume a store that was begun, or check and reuse one that is there.

    A store that is there keeps the options that it was encoded with (`--no-texts`, `--no-content-filter`,
    `--sparse-top-k`). One that `diffretriever compress` or `import-vectors` made is taken as it is; only its model is
    compared.

    Args:
        model: encodes.
        source: what `read_corpus` reads, e.g. a benchmark's folder.
        folder: of the store; None makes a temporary one, which is gone afterwards.
        dtype: of the stored vectors; None takes the store's, or float16.
        progress: draw a bar.
        tokens_per_batch: as for `encode_store`.

    Yields:
        The store.

    Raises:
        ValueError: the store was made by another model, from another corpus or with another dtype; the message names
            the difference.
    """
    with tempfile.TemporaryDirectory(prefix="diffretriever-") if folder is None else nullcontext(folder) as place:
        if _is_from_elsewhere(Path(place)):
            yield _as_it_is(model, Path(place), dtype)
            return
        begun = Plan.read(Path(place)) if Path(place).is_dir() else None
        options: dict[str, Any] = {"dtype": "float16"}
        if begun is not None:
            options = {"dtype": begun.settings.dtype, "sparse_top_k": begun.settings.sparse_top_k or None}
            options |= {name: begun.settings.options.get(name, True) for name in ("content_filter", "keep_texts")}
        if dtype is not None:
            options["dtype"] = dtype
        options["tokens_per_batch"] = tokens_per_batch
        yield encode_store(model, source, place, show_progress_bar=progress, **options)


def _is_from_elsewhere(folder: Path) -> bool:
    """Return whether a store is there that was not encoded from a corpus, so that it can only be taken as it is."""
    if (folder / CODEBOOK_FILE).is_file():
        return True
    return (folder / MANIFEST_FILE).is_file() and "shard_size" not in Manifest.read(folder).options


def _as_it_is(model: Any, folder: Path, dtype: str | None) -> Store:
    store = open_store(folder)
    if dtype not in (None, store.manifest.dtype):
        raise ValueError(f"{folder}: the store there has dtype {store.manifest.dtype}, not {dtype}; leave --dtype out.")
    queries = describe_model(model, is_query=True, dtype=store.manifest.dtype)
    check_searchable(store.manifest, queries, str(folder))
    return store
