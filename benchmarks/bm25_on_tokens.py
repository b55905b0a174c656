"""BM25 over a backbone's own tokens: what word counts reach with the vocabulary that the sparse vectors have.

The usual BM25 indexes stemmed words of whole texts; a release's sparse vectors know the tokenizer's pieces only, and of
a long text its beginning. These rows tell the shares of vocabulary and, with --first, of length in their difference.

python benchmarks/bm25_on_tokens.py --model RELEASE --data DATA --per-query results/llada-tokens.0.debian.queries.json
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoModel

from diffretriever.cli.parser import Parser
from diffretriever.data.benchmark import read_benchmark
from diffretriever.data.corpus import read_corpus
from diffretriever.evaluation.bm25 import BM25
from diffretriever.evaluation.metrics import evaluate_run, means, parse_metric
from diffretriever.files.durable import write_json

DEPTH = 1000  # passages a query


def as_words(tokenizer: Any, texts: Iterable[str], first: int | None = None) -> list[str]:
    """Write each text's (first) token ids as words that no stemmer changes: "t17 t4096"."""
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [" ".join(f"t{token}" for token in row[:first]) for row in rows]


def main() -> None:
    """Print nDCG@10, and write each query's."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="release: its tokenizer is used, its weights are not")
    parser.add_argument("--data", type=Path, required=True, help="BEIR-style folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--first", type=int, help="tokens of each passage that are indexed (default: all)")
    parser.add_argument("--per-query", type=Path, help="JSON, as `diffretriever evaluate --per-query` writes it")
    options = parser.parse_args()
    tokenizer: Any = AutoModel.from_pretrained(options.model, trust_remote_code=True).tokenizer
    benchmark, passages = read_benchmark(options.data, options.split), list(read_corpus(options.data))
    index = BM25([one.id for one in passages], as_words(tokenizer, (one.text for one in passages), options.first))
    asked = dict(zip(benchmark.queries, as_words(tokenizer, benchmark.queries.values()), strict=True))
    values = evaluate_run(index.search(asked, DEPTH), benchmark.qrels, [parse_metric("nDCG@10")])
    print(f"{options.data}: BM25 over {options.model}'s tokens, nDCG@10 {means(values)['nDCG@10']:.4f}")
    if options.per_query:
        write_json(options.per_query, {"bm25": values})


if __name__ == "__main__":
    main()
