"""The sub-command `diffretriever demo`: ask a text file, and see why each passage is found."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_command, add_weight_option, count, count_or_none
from .console import check_questions, read_questions
from .display import explanation_lines
from .exit_status import DONE
from .load_model import add_model_options, check_encoder, check_model, choose_modes, load_model, ready_for_questions

if TYPE_CHECKING:
    from ..search.explain import Explainer

SHIPPED = "diffretriever-llada-tiny-multi-q4-p4"
PORT = 7860
HITS, PAGE_HITS = 3, 10
LEGEND = "fused scores stand before ids; [words in brackets] are the question's as well"


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    told = """Ask a text file of yours. Each answer shows the dense, the sparse and the fused score, and the words of
both sparse vectors with their weights; --web shows the same, and the vectors' similarities, on a page that only
this machine can see. Nothing is written."""
    parser = add_command(commands, "demo", "ask a text file, and see why each passage is found", run_demo, told)
    what = "plain text, a passage a line or paragraphs between blank lines; .jsonl, .tsv, .parquet; or a store's folder"
    parser.add_argument("passages", type=Path, metavar="FILE", help=what)
    parser.add_argument("question", nargs="*", help="one or more questions (default: they are read, a line each)")
    add_model_options(parser, f"a release: Hub id or folder (default: {SHIPPED}, of the source tree)", default=None)
    parser.add_argument("--top-k", type=count, help=f"passages a question (default: {HITS}, on the page {PAGE_HITS})")
    add_weight_option(parser)
    parser.add_argument("--web", action="store_true", help="show a page at 127.0.0.1 instead, until Ctrl-C")
    parser.add_argument("--port", type=count_or_none, help=f"of the page; 0 takes a free one (default: {PORT})")


def run_demo(options: argparse.Namespace) -> int:
    """Run `diffretriever demo`.

    Raises:
        ValueError: options that do not go together, a model without sparse vectors or other than the store's.
    """
    from ..model.scoring import fusion_weight_of
    from ..search.explain import MODE
    from ..shipped import shipped_release

    fusion_weight_of(None, options.fusion_weight)  # a wrong one is said before the model is loaded
    check_questions(options.question)
    if options.web and options.question:
        raise ValueError("questions are asked on the page; leave them out with --web.")
    if options.port is not None and not options.web:
        raise ValueError("--port is the page's; give --web as well, or leave it out.")
    options.model = options.model or shipped_release(SHIPPED)
    choose_modes(check_model(options), [MODE])
    explainer = _explainer(options)
    ready_for_questions(explainer.model)
    weight = fusion_weight_of(explainer.model.config, options.fusion_weight)
    about = f"{options.passages}: {len(explainer):,} passages; {Path(options.model).name}"
    if options.web:
        from .page import serve

        serve(explainer, about, PORT if options.port is None else options.port, options.top_k or PAGE_HITS, weight)
        return DONE
    columns = shutil.get_terminal_size().columns
    print(f"{about}\n{LEGEND}\n", flush=True)
    for question in options.question or read_questions(str(options.passages)):
        found = explainer.explain(question, options.top_k or HITS, weight)
        print(*explanation_lines(found, columns), sep="\n")
        print(flush=True)
    return DONE


def _explainer(options: argparse.Namespace) -> Explainer:
    """Load the model, and encode the file with it or open the store."""
    from ..data.plain_text import read_text_or_corpus
    from ..search.explain import Explainer
    from ..store.compression import CODEBOOK_FILE, open_store
    from ..store.manifest import MANIFEST_FILE
    from ..store.plan import PLAN_FILE

    if any((options.passages / name).is_file() for name in (MANIFEST_FILE, PLAN_FILE, CODEBOOK_FILE)):  # or unfinished
        store = open_store(options.passages)
        model = load_model(options)
        check_encoder(model, store.manifest, str(options.passages))
        return Explainer(model, store)
    passages = list(read_text_or_corpus(options.passages))  # before the model: a wrong file is told at once
    if not passages:
        raise ValueError(f"{options.passages}: no texts; expected at least one.")
    model = load_model(options)
    ids, texts = [passage.id for passage in passages], [passage.text for passage in passages]
    if cut := sum(text.cut for text in model.texts.prepare(texts, is_query=False, content_filter=False)):
        room = model.texts.layouts[False].room
        print(f"longer than {room} tokens, and cut there: {cut:,} of {len(texts):,} passages", file=sys.stderr)
    return Explainer(model, model.encode_texts(texts, is_query=False, show_progress_bar=True), ids, texts)
