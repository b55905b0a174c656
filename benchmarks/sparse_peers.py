"""Sparse search beside others on the same vectors: scipy's matrices, bm25s, Seismic, Qdrant's engine.

python benchmarks/sparse_peers.py [--sizes 100000 1000000]           synthetic vectors, spread as words are
python benchmarks/sparse_peers.py --store S --queries Q               those of stores

One query at a time, the ten best passages; the time of all threads with `--clock cpu`. A peer that is not installed is
left out (`pip install bm25s pyseismic-lsr qdrant-edge-py`). bm25s knows no weights of a query's terms, so it gets the
passages' weights and terms that weigh 1: its time is that of its own way of adding up, its ranking another.
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import CLOCKS, describe
from search import synthetic

from diffretriever.cli.parser import Parser
from diffretriever.search import QdrantEngine, Searcher, open_store, upload
from diffretriever.search.sparse import join_rows, sparse_of, sum_by_term

Query = dict[int, float]
Ask = Callable[[Query, int], list[int]]  # returns the best passages' positions


def matrix(indices: torch.Tensor, values: torch.Tensor) -> Any:
    """Return sparse vectors [P, T] as scipy's CSR matrix, float32 [P, V]; a term that stands twice is added up."""
    import scipy.sparse

    starts = np.arange(0, indices.numel() + 1, indices.shape[1])
    columns = int(indices.max()) + 1
    found = scipy.sparse.csr_matrix(
        (values.float().numpy().flatten(), indices.numpy().flatten(), starts), shape=(len(indices), columns)
    )
    found.sum_duplicates()
    found.eliminate_zeros()
    return found


def best(scores: Any, depth: int) -> list[int]:
    """Return the positions of the best scores."""
    places = np.argpartition(scores, -depth)[-depth:]
    return [int(place) for place in places[np.argsort(-scores[places], kind="stable")]]


def ours(indices: torch.Tensor, values: torch.Tensor) -> Ask:
    """Return this project's exact search."""
    nothing = torch.zeros(len(indices), 1, 1, dtype=torch.float16)
    searcher = Searcher({"repr_hidden": nothing, "sparse_indices": indices, "sparse_values": values})

    def ask(query: Query, depth: int) -> list[int]:
        terms, weights = torch.tensor([list(query)]), torch.tensor([list(query.values())])
        asked = {"repr_hidden": torch.zeros(1, 1, 1), "sparse_indices": terms, "sparse_values": weights}
        return [int(place) for place in searcher.search(asked, "sparse_max", depth).positions[0]]

    ask(dict.fromkeys(range(2), 1.0), 1)  # makes the index
    return ask


def by_scipy(indices: torch.Tensor, values: torch.Tensor) -> Ask:
    """Return scipy's product of the columns that a query has."""
    columns = matrix(indices, values).tocsc()

    def ask(query: Query, depth: int) -> list[int]:
        known = {term: weight for term, weight in query.items() if term < columns.shape[1]}
        return best(columns[:, list(known)] @ np.array(list(known.values()), dtype=np.float32), depth)

    return ask


def by_bm25s(indices: torch.Tensor, values: torch.Tensor) -> Ask:
    """Return bm25s's scorer over the same weights."""
    import bm25s

    columns = matrix(indices, values).tocsc()
    index = bm25s.BM25(backend="numba" if find_spec("numba") else "numpy")
    index.scores = {"data": columns.data, "indices": columns.indices, "indptr": columns.indptr}
    index.scores["num_docs"], index.nonoccurrence_array = columns.shape[0], None
    if find_spec("numba"):
        index.activate_numba_scorer()

    def ask(query: Query, depth: int) -> list[int]:
        return best(index.get_scores_from_ids([term for term in query if term < columns.shape[1]]), depth)

    return ask


def by_seismic(indices: torch.Tensor, values: torch.Tensor) -> Ask:
    """Return Seismic's approximate index, with the settings of its own examples."""
    import seismic

    rows, text = matrix(indices, values), seismic.get_seismic_string()
    rows.sort_indices()
    dataset = seismic.SeismicDatasetLV()  # for more than 65,536 terms
    names = [str(row) for row in range(rows.shape[0])]
    dataset.add_documents_by_id(names, rows.indices.astype(np.int64), rows.data, rows.indptr.astype(np.int64))
    index = seismic.SeismicIndexLV.build_from_dataset(dataset, num_threads=torch.get_num_threads())

    def ask(query: Query, depth: int) -> list[int]:
        terms = np.array([str(term) for term in query], dtype=text)
        weights = np.array(list(query.values()), dtype=np.float32)
        found = index.search("q", terms, weights, k=depth, query_cut=len(query), heap_factor=0.8)
        return [int(name) for _, _, name in found]

    return ask


def by_qdrant(indices: torch.Tensor, values: torch.Tensor) -> Ask:
    """Return Qdrant's engine in a folder."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    nothing = torch.ones(len(indices), 1, 1, dtype=torch.float16)
    upload({"repr_hidden": nothing, "sparse_indices": indices, "sparse_values": values}, folder, "peer")
    searcher = Searcher(QdrantEngine(folder, "peer"))

    def ask(query: Query, depth: int) -> list[int]:
        terms, weights = torch.tensor([list(query)]), torch.tensor([list(query.values())])
        asked = {"repr_hidden": torch.ones(1, 1, 1), "sparse_indices": terms, "sparse_values": weights}
        return [int(place) for place in searcher.search(asked, "sparse_max", depth).positions[0]]

    return ask


PEERS: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], Ask]]] = {
    "ours": ("torch", ours),
    "scipy": ("scipy", by_scipy),
    "bm25s": ("bm25s", by_bm25s),
    "seismic": ("seismic", by_seismic),
    "qdrant": ("qdrant_edge", by_qdrant),
}


def vectors(options: argparse.Namespace) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[Query]]]:
    """Yield passages' indices and values [P, T], and queries."""
    if options.store:
        sides = [
            join_rows([sparse_of(part) for part in open_store(name).shards()])
            for name in (options.store, options.queries)
        ]
        asked = [sum_by_term(*row) for row in zip(*(tensor[: options.num_queries] for tensor in sides[1]), strict=True)]
        yield *sides[0], [{int(term): float(weight) for term, weight in query.items()} for query in asked if query]
        return
    shape = argparse.Namespace(hidden_size=1, terms=options.terms)
    some = synthetic(options.num_queries, 1, shape, seed=1)
    rows = zip(some["sparse_indices"][:, : options.query_terms], some["sparse_values"], strict=True)
    queries = [sum_by_term(terms, weights[: options.query_terms]) for terms, weights in rows]
    for count in options.sizes:
        made = synthetic(count, 1, shape, seed=2)
        yield made["sparse_indices"], made["sparse_values"], queries


def measure(name: str, side: tuple[torch.Tensor, torch.Tensor], queries: list[Query], truth: Any, options: Any) -> Any:
    """Print one peer's times, and return what it finds."""
    clock = CLOCKS[options.clock]
    start = clock()
    ask = PEERS[name][1](*side)
    built, times, found = clock() - start, [], []
    ask(queries[0], options.top_k)
    for query in queries:
        start = clock()
        found.append(ask(query, options.top_k))
        times.append(clock() - start)
    truth = truth or found
    shared = statistics.mean(len({*a} & {*b}) / len(a) for a, b in zip(truth, found, strict=True))
    print(
        f"  {name:8s} {1000 * statistics.median(times):8.2f} ms a query, made in {built:6.1f} s, "
        f"{100 * shared:.1f} % of the exact {options.top_k} best",
        flush=True,
    )
    return found


def main() -> None:
    """Parse the command line and measure."""
    parser = Parser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--store", type=Path, help="passages, instead of synthetic ones")
    parser.add_argument("--queries", type=Path, help="a store of queries")
    parser.add_argument("--peers", choices=PEERS, nargs="+", default=list(PEERS))
    parser.add_argument("--terms", type=int, default=48, help="a passage")
    parser.add_argument("--query-terms", type=int, default=8)
    parser.add_argument("--num-queries", type=int, default=50)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument(
        "--engine-limit", type=int, default=100_000, help="largest size for Qdrant, which is slow to fill"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    print(f"{describe('cpu')}; {options.clock} time")
    for indices, values, queries in vectors(options):
        print(f"{len(indices)} passages of {indices.shape[1]} terms, {len(queries)} queries", flush=True)
        truth = None
        for name in options.peers:
            if find_spec(PEERS[name][0]) and (name != "qdrant" or len(indices) <= options.engine_limit):
                found = measure(name, (indices, values), queries, truth, options)
                truth = truth or found


if __name__ == "__main__":
    main()
