"""The sub-command `diffretriever make-pairs`."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .arguments import add_command, count, count_or_none, share
from .exit_status import DONE


def register(commands: Any) -> None:
    """Add the sub-command to the parser's `add_subparsers` object."""
    what = "make training pairs of texts without queries: a sentence asks for the rest of its text"
    parser = add_command(commands, "make-pairs", what, run_make_pairs)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--corpus", help="the texts, in any layout of a corpus")
    given.add_argument("--pairs", type=Path, nargs="+", help="or pairs, whose passages are the texts, each once")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write, in the layout of pairs")
    told = "sentences of a text, at most (default %(default)s)"
    parser.add_argument("--per-text", type=count, default=1, metavar="N", help=told)
    parser.add_argument("--min-words", type=count, default=9, metavar="N", help="of a sentence (default %(default)s)")
    told = "of a sentence; the rest of its text has more (default %(default)s)"
    parser.add_argument("--max-words", type=count, default=32, metavar="N", help=told)
    told = "words of a sentence that few texts have (default %(default)s)"
    parser.add_argument("--rare-words", type=count_or_none, default=2, metavar="N", help=told)
    told = "what share of the texts is few (default %(default)s)"
    parser.add_argument("--rare-share", type=share, default=0.01, metavar="SHARE", help=told)
    told = "share of the texts that keep their sentences (default %(default)s)"
    parser.add_argument("--keep-share", type=share, default=0.1, metavar="SHARE", help=told)
    parser.add_argument("--seed", type=int, default=42)


def run_make_pairs(options: argparse.Namespace) -> int:
    """Run `diffretriever make-pairs`."""
    from ..data.corpus import read_corpus
    from ..data.pair_files import PairFiles
    from ..files.durable import check_place
    from ..training.hard_negatives import passages_of
    from ..training.sentence_queries import SentenceChoice, write_pairs

    check_place(options.output)
    names = ("per_text", "min_words", "max_words", "rare_words", "rare_share", "keep_share", "seed")
    choice = SentenceChoice(**{name: getattr(options, name) for name in names})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.output.parent, prefix=".make-") as scratch:  # for compressed pairs
        files = PairFiles(options.pairs, Path(scratch)) if options.pairs else None
        with passages_of(files) if files else nullcontext(options.corpus) as corpus:
            counts = write_pairs(lambda: read_corpus(corpus), options.output, choice)
        if files:
            files.close()
    print(
        f"{options.output}: {counts['pairs']} pairs of {counts['texts']} texts; {counts['texts_without_pairs']} texts "
        "have no sentence that asks"
    )
    return DONE
