"""Search a few passages with LangChain: an in-memory vector store on a DiffRetriever release.

pip install langchain-huggingface sentence-transformers
python examples/frameworks/langchain_search.py [--model DIR_OR_HUB_ID] [QUERY]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import HuggingFaceEmbeddings

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "diffretriever-llada-tiny-single"
PASSAGES = [
    "Plays MP3, Ogg Vorbis and FLAC files, with playlists and internet radio stations.",
    "A fast and small HTTP daemon that serves static pages and speaks CGI.",
    "An SQL engine in a single library that keeps tables in one ordinary disk file.",
    "Copies directories to a remote machine incrementally and encrypts the archive.",
]


def embeddings(model: str) -> HuggingFaceEmbeddings:
    """Return LangChain's embeddings. It calls encode() for both sides, so each is named here."""
    return HuggingFaceEmbeddings(
        model_name=model,
        model_kwargs={"trust_remote_code": True},
        encode_kwargs={"task": "document"},
        query_encode_kwargs={"task": "query"},
    )


def main() -> None:
    """Index, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a release: folder or Hub id")
    parser.add_argument("query", nargs="?", default="internet radio player")
    options = parser.parse_args()
    store = InMemoryVectorStore.from_texts(PASSAGES, embeddings(options.model))
    for document, score in store.similarity_search_with_score(options.query, k=2):
        print(f"{score:6.3f}  {document.page_content}")


if __name__ == "__main__":
    main()
