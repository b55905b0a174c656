"""Rank a few passages for a few questions with the small checkpoint that ships in this repository, on a CPU.

python examples/quickstart.py [--model DIR_OR_HUB_ID]
"""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path

import torch
from transformers import AutoModel

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "diffretriever-llada-tiny-multi-q4-p4"

PASSAGES = {
    "photo editor": "An image manipulation program for retouching photographs, composing pictures and converting "
    "between graphics formats, with layers, brushes, filters and plug-ins.",
    "music player": "Plays MP3, Ogg Vorbis and FLAC files from your collection, with playlists, album covers, an "
    "equalizer and internet radio stations.",
    "mail reader": "A graphical e-mail client that reads messages over IMAP and POP3, filters spam and keeps an "
    "address book.",
    "web server": "A fast and small HTTP daemon that serves static pages, speaks CGI and FastCGI and can act as a "
    "reverse proxy in front of other servers.",
    "backup": "Copies directories to a remote machine incrementally, compresses and encrypts the archive and restores "
    "files as they were on any earlier day.",
    "chess": "A program that plays chess against a human opponent. It has an opening book and endgame tables, and a "
    "board drawn in three dimensions.",
    "spell checker": "Finds misspelled words in a document and suggests corrections from dictionaries for many "
    "languages.",
    "regular expressions": "This library matches strings against patterns with Perl 5 syntax, including look-behind "
    "assertions and Unicode character classes.",
    "firewall": "Sets up packet filtering rules in the Linux kernel to block unwanted connections from the internet "
    "and to share one address among several computers.",
    "database": "An SQL engine in a single library that keeps tables and indexes in one ordinary disk file, with "
    "transactions and no separate server process.",
    "astronomy": "Shows a realistic sky with stars, constellations and planets as seen from any place on Earth, and "
    "can steer a telescope.",
    "compiler": "Translates C and C++ source code into optimised machine instructions for many processor "
    "architectures.",
    "video": "Records the screen and the webcam, cuts and joins clips on a timeline, and renders movies with "
    "transitions and titles.",
    "dns": "Answers queries that turn host names into IP addresses, as a caching resolver or as an authoritative name "
    "server for a zone.",
    "molecules": "Draws proteins and small molecules in three dimensions and measures distances and angles between "
    "their atoms.",
    "threads": "Creates a new thread of execution in the calling process; the thread starts by invoking the given "
    "start routine and ends when it returns.",
}

# Some share their words with the answer, some hardly any.
QUERIES = [
    "chess playing program",
    "SQL database engine",
    "touch up pictures from my camera",
    "listen to songs",
    "stop attackers from reaching my network",
    "keep a safe copy of my files",
    "look at planets at night",
    "fix typing errors in a text",
]
MODES = {"dense": "multi_dense", "sparse": "sparse_max", "fused": "fusion_multi_sparse_max"}


def ranking(scores: torch.Tensor, names: list[str]) -> str:
    """Return the best three of the passages' scores [P] in a line; a score of 0 is no match."""
    best = scores.topk(3)
    found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return (
        "".join(f"{names[place] + f' {score:.2f}':<27}" for score, place in found if score > 0) or "no term in common"
    )


def main() -> None:
    """Load, encode, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a release: folder or Hub id")
    options = parser.parse_args()

    started = time.perf_counter()
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    names, texts = list(PASSAGES), list(PASSAGES.values())
    passages = model.encode_texts(texts, is_query=False)
    queries = model.encode_texts(QUERIES, is_query=True)
    scores = {name: model.score(queries, passages, mode=mode) for name, mode in MODES.items()}  # [Q, P] each
    took = time.perf_counter() - started

    budgets = f"{model.config.num_query_masks} vectors a query, {model.config.num_passage_masks} a passage"
    print(f"{Path(options.model).name} on {device}: {budgets}, {model.config.hidden_size} dimensions\n")
    for row, query in enumerate(QUERIES):
        print(f"\N{BLACK RIGHT-POINTING SMALL TRIANGLE} {query}")
        for name in MODES:
            print(f"    {name:<7}{ranking(scores[name][row], names)}")
        first = texts[int(scores["fused"][row].argmax())]
        print(textwrap.fill(first, 100, initial_indent="    \N{RIGHTWARDS ARROW} ", subsequent_indent="      ") + "\n")
    print(f"{len(texts)} passages and {len(QUERIES)} queries loaded, encoded and scored in {took:.1f} s.")


if __name__ == "__main__":
    main()
