"""The sub-command `diffretriever evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..search.modes import MODES
from ..store.manifest import STORE_DTYPES
from .arguments import add_command, add_fusion_options
from .exit_status import DONE
from .load_model import (
    add_batch_option,
    add_length_options,
    add_mask_options,
    add_model_options,
    check_model,
    choose_modes,
    lengths_of,
    load_model,
)

MODE_NAMES = ", ".join(MODES)
DESCRIPTION = """Evaluate a release on a benchmark in BEIR's or MS MARCO's layout, in all scoring modes.

The corpus is encoded once; with --store into a folder that is kept, resumed after an interruption and reused.
Metrics are trec_eval's. Marks (paired two-sided t-test, p < 0.05 after correction), as in the paper's Table 2: † better
than the same mode in --baseline, the same method's single-vector release; ‡ better than the same mode in --counterpart,
the matched autoregressive method. Without these files † compares modes of the table, and ‡ means better than BM25."""


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(commands, "evaluate", "evaluate a release on a benchmark", run_evaluate, DESCRIPTION)
    _what(parser)
    _how(parser)
    _results(parser)


def _what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is evaluated")
    add_model_options(group)
    add_mask_options(group)
    add_length_options(group)
    group.add_argument("--data", required=True, type=Path, help="folder in BEIR's or MS MARCO's layout")
    group.add_argument("--split", default="test", help="BEIR: a file of qrels/; MS MARCO: dev, dl19, dl20")
    group.add_argument("--store", type=Path, help="folder for the encoded corpus (default: a temporary one)")
    group.add_argument("--dtype", choices=STORE_DTYPES, help="of the stored vectors (default: the store's, or float16)")
    add_batch_option(group)


def _how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--modes", nargs="+", choices=MODES, metavar="MODE", help=f"default: all that the method has, of {MODE_NAMES}"
    )
    add_fusion_options(group)
    group.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help="as ir_measures has them (default: nDCG@10 RR@10 R@100 R@1000 AP)",
    )
    group.add_argument(
        "--relevance-level", type=int, help="least grade that is relevant (default: 2 for dl19 and dl20, else 1)"
    )
    group.add_argument("--depth", type=int, default=1000, help="passages a query (default: 1000)")
    group.add_argument("--bm25", action="store_true", help="also BM25, alone and fused with ours (weight 0.5)")
    group.add_argument(
        "--bm25-with",
        nargs="+",
        choices=MODES,
        metavar="MODE",
        help="modes to fuse with BM25 (default: the multi ones)",
    )
    group.add_argument("--tune-split", metavar="SPLIT", help="choose the weights of the fusions on this split")
    group.add_argument("--baseline", type=Path, metavar="FILE", help="for †: a --per-query file, the single vector's")
    group.add_argument("--counterpart", type=Path, metavar="FILE", help="for ‡: one of the autoregressive counterpart")
    group.add_argument("--correction", choices=("bonferroni", "holm"), default="bonferroni", help="of the tests")
    group.add_argument("--latency", type=int, default=0, metavar="N", help="time N single queries in each mode")


def _results(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results, beside the table on stdout")
    group.add_argument("--json", type=Path, metavar="FILE", help="{mode: {metric: value}}")
    group.add_argument("--markdown", type=Path, metavar="FILE", help="the table and the tests behind its marks")
    group.add_argument("--per-query", type=Path, metavar="FILE", help="JSON, {mode: {metric: {query id: value}}}")
    group.add_argument("--run-folder", type=Path, metavar="FOLDER", help="a TREC run file for each row")
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def run_evaluate(options: argparse.Namespace) -> int:
    """Run `diffretriever evaluate`."""
    if options.store:
        options.again = f"What is encoded is kept in {options.store}; run again to go on."
    _evaluate(options)
    return DONE


def _evaluate(options: argparse.Namespace) -> None:
    from ..data.benchmark import read_benchmark
    from ..evaluation.evaluate import Options, encoded_corpus, evaluate
    from ..evaluation.metrics import DEFAULT_METRICS
    from ..evaluation.report import read_per_query, to_terminal

    how = Options(
        modes=choose_modes(check_model(options), options.modes),
        metrics=tuple(dict.fromkeys(options.metrics or DEFAULT_METRICS)),
        fusion_weight=options.fusion_weight,
        fusion=options.fusion,
        depth=options.depth,
        bm25=options.bm25,
        bm25_with=options.bm25_with,
        tune_split=options.tune_split,
        baseline=read_per_query(options.baseline) if options.baseline else None,
        counterpart=read_per_query(options.counterpart) if options.counterpart else None,
        correction=options.correction,
        latency=options.latency,
        progress=not options.quiet,
    )
    how.measures()  # wrong options and data are said before a large model is loaded
    benchmark = read_benchmark(options.data, options.split, options.relevance_level)
    how.check(benchmark)
    if options.tune_split:
        read_benchmark(options.data, options.tune_split)
    _check_places(options, benchmark)
    model = load_model(
        options,
        num_query_masks=options.num_query_masks,
        num_passage_masks=options.num_passage_masks,
        **lengths_of(options),
    )
    given = (options.store, options.dtype, how.progress, options.tokens_per_batch)
    with encoded_corpus(model, options.data, *given) as store:
        sizes = f"{len(benchmark.queries):,} queries, {len(store):,} passages"
        title = f"{options.model} on {options.data}, split {options.split}: {sizes}"
        evaluation, runs = evaluate(model, benchmark, store, how, title)
    try:
        _write(options, evaluation, runs)
    finally:
        print(to_terminal(evaluation), end="")


def _check_places(options: argparse.Namespace, benchmark: Any) -> None:
    """Raise for files that could not be written when all is done."""
    from ..data.corpus import read_corpus
    from ..evaluation.runs import check_run_ids
    from ..files.durable import check_place

    for place in (
        options.json,
        options.markdown,
        options.per_query,
        options.run_folder and options.run_folder / "run.trec",
    ):
        if place:
            check_place(place)
    if options.run_folder:
        check_run_ids(benchmark.queries, "query")
        check_run_ids((passage.id for passage in read_corpus(options.data)), "passage")


def _write(options: argparse.Namespace, evaluation: Any, runs: Mapping[str, Any]) -> None:
    """Write the files that were asked for."""
    from ..evaluation.report import to_markdown
    from ..evaluation.runs import write_run
    from ..files.durable import write_json, write_text

    if options.per_query:
        write_json(options.per_query, evaluation.rows)
    if options.json:
        write_json(options.json, evaluation.figures())
    if options.markdown:
        write_text(options.markdown, to_markdown(evaluation))
    if options.run_folder:  # last, as ids that a run file cannot hold are an error
        for name, found in runs.items():
            write_run(options.run_folder / f"{name}.trec", found, name)
