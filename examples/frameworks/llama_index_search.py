"""Search a few passages with LlamaIndex: a vector index on a DiffRetriever release.

pip install llama-index-core llama-index-embeddings-huggingface
python examples/frameworks/llama_index_search.py [--model DIR_OR_HUB_ID] [QUERY]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "diffretriever-llada-tiny-single"
PASSAGES = [
    "Plays MP3, Ogg Vorbis and FLAC files, with playlists and internet radio stations.",
    "A fast and small HTTP daemon that serves static pages and speaks CGI.",
    "An SQL engine in a single library that keeps tables in one ordinary disk file.",
    "Copies directories to a remote machine incrementally and encrypts the archive.",
]


def embedding(model: str) -> HuggingFaceEmbedding:
    """Return LlamaIndex's embedding. Its instructions replace the release's prompts, so they are the role tags."""
    return HuggingFaceEmbedding(
        model_name=model,
        trust_remote_code=True,
        query_instruction="<|query|>",
        text_instruction="<|document|>",
    )


def main() -> None:
    """Index, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a release: folder or Hub id")
    parser.add_argument("query", nargs="?", default="internet radio player")
    options = parser.parse_args()
    nodes = [TextNode(text=passage) for passage in PASSAGES]
    index = VectorStoreIndex(nodes, embed_model=embedding(options.model))
    for found in index.as_retriever(similarity_top_k=2).retrieve(options.query):
        print(f"{found.score:6.3f}  {found.text}")


if __name__ == "__main__":
    main()
