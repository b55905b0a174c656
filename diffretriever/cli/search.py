"""The sub-command `diffretriever search`: questions to passages, printed."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..search.modes import CANDIDATES, FUSED, FUSIONS, MODES
from ..store.manifest import MANIFEST_FILE
from .arguments import add_command, add_fusion_options, add_qdrant_options, collection_of, count
from .console import check_questions, json_line, read_questions
from .display import result_lines
from .exit_status import DONE
from .load_model import (
    CHOSEN_AT_THE_START,
    RELEASE,
    add_model_options,
    add_server_options,
    check_encoder,
    check_model,
    choose_modes,
    flags_of,
    load_encoder,
    ready_for_questions,
)
from .parser import LAST_VERSION

if TYPE_CHECKING:
    from ..evaluation.runs import Run
    from ..search.results import Hit, Results
    from ..search.searcher import Searcher

DENSE = "multi_dense"  # what every store can be searched by
QUERIES_AT_ONCE = 4096  # of a file
QDRANT_ALONE, FUSED_ALONE = ("collection", "timeout"), ("fusion", "fusion_weight", "candidates")
STDOUT, FLAG = "-", "--json"  # what --json says: its value for standard output, and nothing


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    parser = add_command(commands, "search", "find passages for a question", run_search)
    parser.add_argument("question", nargs="*", help="one or more questions")
    where = "for example cuda (default: the model on the first GPU, else the CPU; exact search on the CPU)"
    add_model_options(parser, f"{RELEASE}; the one that encoded the store", where, default=None)
    add_server_options(parser)
    parser.add_argument("--num-query-masks", type=int, help="K of the questions (default: the model's)")
    parser.add_argument("--store", type=Path, help="the passages: a folder of `diffretriever encode` or `compress`")
    add_qdrant_options(parser, required=False)
    asked = "a store of queries to search for, instead of questions; with --server, a file or BEIR folder of queries"
    parser.add_argument("--queries", type=Path, help=asked)
    parser.add_argument("--run-file", type=Path, help="write a TREC run there (with --queries)")
    told = "scoring mode (default: the one that the release recommends; multi_dense for a store of queries)"
    parser.add_argument("--mode", choices=MODES, help=told)
    parser.add_argument("--top-k", type=count, default=10, help="passages a question (default: %(default)s)")
    parser.add_argument("--candidates", type=count, help=f"of each side, in the fusion modes (default: {CANDIDATES})")
    add_fusion_options(parser)
    parser.set_defaults(fusion=None)  # so that one that was given is known
    parser.add_argument("--interactive", action="store_true", help="keep the model loaded; a question a line")
    told = "write one JSON object a question there, a line each; - prints them in place of the passages"
    parser.add_argument("--json", nargs="?", const=FLAG, metavar="FILE", help=told)
    parser.add_argument("--in-memory", action="store_true", help="copy the vectors to the device's memory first")


def run_search(options: argparse.Namespace) -> int:
    """Run `diffretriever search`.

    Raises:
        ValueError: options that do not go together, or a model that is not the store's.
    """
    from ..files.durable import check_place
    from ..model.scoring import fusion_weight_of

    _as_flag(options)
    _check(options)
    fusion_weight_of(None, options.fusion_weight)  # a wrong one is said before the model is loaded
    if options.json not in (None, STDOUT):
        check_place(Path(options.json))
    queries = _queries(options) if options.queries else None
    searcher = _searcher(options)
    if queries is not None:
        return _write_run((_search_texts if options.server else _search_store)(searcher, queries, options), options)
    model = _model(searcher, options)
    answers: list[dict[str, Any]] = []
    try:
        for question in _questions(options):
            answers.append(_answer(searcher, model, question, options))
    except BaseException:
        if answers:  # a first question that fails costs no earlier file
            _write_answers(answers, options)
        raise
    _write_answers(answers, options)
    return DONE


def _as_flag(options: argparse.Namespace) -> None:
    """Let --json without a file mean what it did, also where it took the question for its file."""
    asked = bool(options.question) or options.interactive or options.queries is not None
    if options.json is FLAG or (options.json not in (None, STDOUT) and not asked):
        options.question = options.question if options.json is FLAG else [options.json]
        options.json = STDOUT
        told = f"--json takes a file now, {STDOUT} for standard output; without one it works until {LAST_VERSION}"
        print(f"diffretriever search: {told}", file=sys.stderr)


def _check(options: argparse.Namespace) -> None:
    if (options.store is None) == (options.qdrant is None):
        raise ValueError("say where the passages are: --store FOLDER or --qdrant LOCATION, one of them.")
    if options.store is not None and (wrong := flags_of({name: getattr(options, name) for name in QDRANT_ALONE})):
        raise ValueError(f"{', '.join(wrong)}: for a Qdrant collection, and --store is none; leave it out.")
    if options.mode is not None:
        _check_fused(options)
    if options.in_memory and options.store is None:
        raise ValueError("--in-memory is for a store; Qdrant keeps its vectors where its collection says.")
    ways = [bool(options.question), options.interactive, options.queries is not None]
    if sum(ways) != 1:
        raise ValueError('ask one way: "a question", --interactive or --queries STORE.')
    check_questions(options.question)
    if options.queries is not None and options.run_file is None:
        raise ValueError("--queries needs --run-file FILE, where the results go.")
    if options.queries is not None and options.json is not None:
        raise ValueError("--json is for questions; what is found for --queries goes to --run-file.")
    if options.run_file is not None and options.queries is None:
        raise ValueError("--run-file needs --queries STORE, for the queries' ids.")
    if options.queries is None and options.model is None and options.server is None:
        raise ValueError("questions need --model, the release that encoded the passages, or --server, which serves it.")
    if options.queries is not None and (options.queries / MANIFEST_FILE).is_file():
        names = ("server", "model", *CHOSEN_AT_THE_START, "num_query_masks")
        if wrong := flags_of({name: getattr(options, name) for name in names}):
            raise ValueError(f"{options.queries} is a store, whose queries are encoded; leave out {', '.join(wrong)}.")


def _check_fused(options: argparse.Namespace) -> None:
    """Refuse what would be passed over in a mode of one side."""
    given = flags_of({name: getattr(options, name) for name in FUSED_ALONE})
    if given and options.mode not in FUSED:
        raise ValueError(
            f"{', '.join(given)}: for the fusion modes, and {options.mode} has one side; leave it out, or give --mode "
            f"{next(reversed(FUSED))}."
        )


def _queries(options: argparse.Namespace) -> Any:
    """Return the queries of a run, a store or, for a server, texts; refuse ids that its file cannot hold."""
    from ..data.corpus import read_queries
    from ..evaluation.runs import check_run_ids
    from ..files.durable import check_place
    from ..store.compression import open_store
    from ..store.identity import check_sides

    check_place(options.run_file)
    if options.server:
        texts = list(read_queries(options.queries))
        check_run_ids((query.id for query in texts), "query")
        return texts
    store = open_store(options.queries)
    check_sides(None, store, _place(options))
    check_run_ids(store.ids(), "query")
    return store


def _searcher(options: argparse.Namespace) -> Searcher:
    from ..evaluation.runs import check_run_ids
    from ..search.qdrant.engine import QdrantEngine
    from ..search.searcher import Searcher
    from ..store.compression import open_store

    fusion = options.fusion or FUSIONS[0]
    if options.qdrant is not None:
        collection, timeout = collection_of(options)
        return Searcher(QdrantEngine(options.qdrant, collection, timeout=timeout), fusion=fusion)
    store = open_store(options.store)
    if options.run_file is not None:
        ids = (name for shard in store.shards() for name in shard.file.strings("ids"))  # which `shard.ids` would keep
        check_run_ids(ids, "passage")
    device = None if options.device == "auto" else options.device  # which spreads a model
    return Searcher(store, fusion=fusion, device=device, in_memory=options.in_memory)


def _model(searcher: Searcher, options: argparse.Namespace) -> Any:
    """Load the model, or find the server's, and refuse one that did not encode the passages."""
    from ..model.scoring import fusion_weight_of

    if options.server is None:
        choose_modes(check_model(options), [options.mode] if options.mode else None)
    model = load_encoder(options, num_query_masks=options.num_query_masks)
    options.mode = options.mode or getattr(model.config, "default_mode", DENSE)
    _check_fused(options)
    options.fusion_weight = fusion_weight_of(model.config, options.fusion_weight)
    if searcher.engine.settings is not None:
        check_encoder(model, searcher.engine.settings, _place(options))
    return ready_for_questions(model)


def _place(options: argparse.Namespace) -> str:
    return str(options.store or f"{options.qdrant}, collection {collection_of(options)[0]!r}")


def _questions(options: argparse.Namespace) -> Iterator[str]:
    """Return the questions, from the command line or a line each from standard input."""
    return read_questions(_place(options)) if options.interactive else iter(options.question)


def _answer(searcher: Searcher, model: Any, question: str, options: argparse.Namespace) -> dict[str, Any]:
    """Search and print; return the answer as --json has it."""
    query = searcher.encode(model, [question], [options.mode])
    hits = _results(searcher, query, options)[0]
    texts = searcher.engine.texts([hit.position for hit in hits])
    answer = _as_json(question, options.mode, hits, texts)
    if options.json == STDOUT:
        print(json_line(answer), flush=True)
        return answer
    columns = shutil.get_terminal_size().columns
    if len(options.question) > 1:
        print(question)
    for rank, (hit, text) in enumerate(zip(hits, texts, strict=True), start=1):
        print("\n".join(result_lines(rank, hit.score, hit.id, text, columns)))
    if not hits:
        print("no passage found")
    sys.stdout.flush()
    return answer


def _write_answers(answers: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write what --json asks for into its file, where it names one."""
    from ..files.durable import write_text

    if options.json not in (None, STDOUT):
        write_text(Path(options.json), "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))


def _as_json(question: str, mode: str, hits: list[Hit], texts: list[str | None]) -> dict[str, Any]:
    rows = [
        {"rank": rank, "id": hit.id, "score": hit.score, "text": text}
        for rank, (hit, text) in enumerate(zip(hits, texts, strict=True), start=1)
    ]
    return {"query": question, "mode": mode, "hits": rows}


def _search_store(searcher: Searcher, queries: Any, options: argparse.Namespace) -> Run:
    options.mode = options.mode or DENSE
    _check_fused(options)
    return _results(searcher, queries, options).run()


def _search_texts(searcher: Searcher, queries: Any, options: argparse.Namespace) -> Run:
    """Search for queries that a server encodes, some thousand at a time."""
    model = _model(searcher, options)
    run: Run = {}
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[first : first + QUERIES_AT_ONCE]
        encoded = searcher.encode(model, [query.text for query in part], [options.mode])
        run |= _results(searcher, encoded, options).run([query.id for query in part])
    return run


def _results(searcher: Searcher, queries: Any, options: argparse.Namespace) -> Results:
    return searcher.search(
        queries,
        options.mode,
        options.top_k,
        candidates=options.candidates or CANDIDATES,
        fusion_weight=options.fusion_weight,
    )


def _write_run(run: Run, options: argparse.Namespace) -> int:
    from ..evaluation.runs import write_run

    write_run(options.run_file, run, tag=f"diffretriever-{options.mode}")
    print(f"{options.run_file}: {len(run)} queries")
    return DONE
