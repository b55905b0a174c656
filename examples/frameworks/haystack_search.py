"""Search a few passages with Haystack: an in-memory document store on a DiffRetriever release.

pip install haystack-ai sentence-transformers-haystack
python examples/frameworks/haystack_search.py [--model DIR_OR_HUB_ID] [QUERY]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersTextEmbedder,
)

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "diffretriever-llada-tiny-single"
PASSAGES = [
    "Plays MP3, Ogg Vorbis and FLAC files, with playlists and internet radio stations.",
    "A fast and small HTTP daemon that serves static pages and speaks CGI.",
    "An SQL engine in a single library that keeps tables in one ordinary disk file.",
    "Copies directories to a remote machine incrementally and encrypts the archive.",
]


def document_embedder(model: str) -> SentenceTransformersDocumentEmbedder:
    """Return Haystack's embedder for passages. It calls encode(), so the side is named here."""
    return SentenceTransformersDocumentEmbedder(
        model=model, trust_remote_code=True, encode_kwargs={"task": "document"}, progress_bar=False
    )


def query_embedder(model: str) -> SentenceTransformersTextEmbedder:
    """Return Haystack's embedder for queries."""
    return SentenceTransformersTextEmbedder(
        model=model, trust_remote_code=True, encode_kwargs={"task": "query"}, progress_bar=False
    )


def search(model: str) -> Pipeline:
    """Index the passages; returns the pipeline that searches them."""
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    embedder = document_embedder(model)
    embedder.warm_up()
    store.write_documents(embedder.run([Document(content=passage) for passage in PASSAGES])["documents"])
    pipeline = Pipeline()
    pipeline.add_component("query", query_embedder(model))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=2))
    pipeline.connect("query.embedding", "retriever.query_embedding")
    return pipeline


def main() -> None:
    """Index, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a release: folder or Hub id")
    parser.add_argument("query", nargs="?", default="internet radio player")
    options = parser.parse_args()
    found = search(options.model).run({"query": {"text": options.query}})
    for document in found["retriever"]["documents"]:
        print(f"{document.score:6.3f}  {document.content}")


if __name__ == "__main__":
    main()
