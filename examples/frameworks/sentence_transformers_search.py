"""Search a few passages with sentence-transformers, by one vector a text, by words, or by several vectors a text.

python examples/frameworks/sentence_transformers_search.py [--model DIR_OR_HUB_ID] [--kind dense|sparse|multi-vector]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import sentence_transformers

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "diffretriever-llada-tiny-single"
CLASSES = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multi-vector": "MultiVectorEncoder"}
PASSAGES = [
    "Plays MP3, Ogg Vorbis and FLAC files, with playlists and internet radio stations.",
    "A fast and small HTTP daemon that serves static pages and speaks CGI.",
    "An SQL engine in a single library that keeps tables in one ordinary disk file.",
    "Copies directories to a remote machine incrementally and encrypts the archive.",
]
QUERIES = ["internet radio player", "database in one file"]


def load(model: str, kind: str) -> Any:
    """Load a release; on the Hub its branches "sparse" and "multi-vector" are for the other two classes."""
    revision = None if kind == "dense" or Path(model).is_dir() else kind
    return getattr(sentence_transformers, CLASSES[kind])(model, revision=revision, trust_remote_code=True)


def main() -> None:
    """Encode, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a release: folder or Hub id")
    parser.add_argument("--kind", choices=CLASSES, default="dense", help="the class that the folder's files are for")
    options = parser.parse_args()
    model = load(options.model, options.kind)
    queries = model.encode_query(QUERIES)
    passages = model.encode_document(PASSAGES)
    scores = model.similarity(queries, passages)  # [queries, passages]
    for query, row in zip(QUERIES, scores, strict=True):
        print(query)
        for place in row.argsort(descending=True)[:2].tolist():
            print(f"  {row[place]:6.3f}  {PASSAGES[place]}")
    if options.kind == "sparse":
        print("words of the first passage:", model.decode(passages[0], top_k=6))


if __name__ == "__main__":
    main()
