"""From where on an approximate index pays: Qdrant's engine in a folder, with each of its indexes, beside exact search.

python benchmarks/approximate.py --store S --queries Q [--sizes 20000 100000] [--indexes plain scalar hnsw]

Up to the store's size the passages are the store's own; where more are asked for, the others are copies of its passages
whose vectors were moved at random (`--noise` 0.5: to a cosine of 0.89), so that they lie as real ones do. They make a
store of float16 vectors in `--scratch`, which is taken as it is the next time that the same is asked for: for a large
one, name an index a run.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hardware import CLOCKS, describe

from diffretriever.cli.parser import Parser
from diffretriever.files.hashes import hash64
from diffretriever.search import QdrantEngine, Results, Searcher, open_store, upload
from diffretriever.store.manifest import MANIFEST_FILE
from diffretriever.store.store import ShardContents, Store, write_store

INDEXES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scalar": {"quantization": "scalar"},
    "binary": {"quantization": "binary"},
    "hnsw": {"hnsw": True},
    "hnsw+scalar": {"hnsw": True, "quantization": "scalar"},
}
MODES, FOUND, BLOCK = ("single_dense", "multi_dense"), 100, 20_000


def dense(folder: Path, limit: int | None = None) -> torch.Tensor:
    """Return a store's vectors, float16 [P, K, H]."""
    shards = open_store(folder).shards()
    return torch.cat([shard.dense(0, len(shard)).half() for shard in shards])[:limit]


def passages(real: torch.Tensor, count: int, noise: float) -> Iterator[torch.Tensor]:
    """Yield so many passages in blocks, float16 [n, K, H]: the real ones, then more around them."""
    generator = torch.Generator().manual_seed(0)
    yield from real[:count].half().split(BLOCK)
    for start in range(len(real), count, BLOCK):
        chosen = real[torch.randint(len(real), (min(BLOCK, count - start),), generator=generator)].float()
        moved = chosen + noise * torch.randn(chosen.shape, generator=generator) / chosen.shape[-1] ** 0.5
        yield F.normalize(moved, dim=-1).half()


def made_store(scratch: Path, real: torch.Tensor, count: int, noise: float) -> Store:
    """Return a store of so many passages, which is written unless the scratch folder holds it already."""
    folder = scratch / f"{count}-passages-noise-{noise:g}-of-{hash64(real.numpy().tobytes()):x}"
    if not (folder / MANIFEST_FILE).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
        ids, none = iter(range(count)), torch.zeros(BLOCK, 1)
        blocks = passages(real, count, noise)
        shards = (
            ShardContents([str(next(ids)) for _ in block], block, none[: len(block)], none[: len(block)])
            for block in blocks
        )
        write_store(folder, shards, {"dtype": "float16", "side": "passage"})
    return open_store(folder)


def measure(searcher: Searcher, queries: torch.Tensor, mode: str, options: argparse.Namespace) -> tuple[Results, float]:
    """Return what is found for all queries, and the median time of one query alone, in seconds."""
    results, times = searcher.search({"repr_hidden": queries}, mode, FOUND), []
    for row in range(options.rounds):
        start = CLOCKS[options.clock]()
        searcher.search({"repr_hidden": queries[row % len(queries)][None]}, mode, FOUND)
        times.append(CLOCKS[options.clock]() - start)
    return results, statistics.median(times)


def recall(exact: Results, found: Results) -> float:
    """Return the mean share of the exact results that were found."""
    shares = [len(set(a) & set(b)) / len(a) for a, b in zip(exact.ids, found.ids, strict=True)]
    return sum(shares) / len(shares)


def measure_index(name: str, store: Store, queries: torch.Tensor, exact: dict[str, Results], options: Any) -> None:
    """Print what one index costs and finds."""
    import qdrant_edge

    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        start = CLOCKS[options.clock]()
        upload(store, folder, name, **INDEXES[name])
        took = CLOCKS[options.clock]() - start
        size = sum(512 * file.stat().st_blocks for file in Path(folder).rglob("*") if file.is_file())
        print(f"  {name}: made in {took:.0f} s, {size / len(store):.0f} bytes a passage on disk", flush=True)
        again = qdrant_edge.QuantizationSearchParams(rescore=True, oversampling=2.0)
        asked: list[tuple[str, Any]] = [("as made", None)]
        if "hnsw" in name:
            found = [(ef, qdrant_edge.SearchParams(hnsw_ef=ef, quantization=again)) for ef in options.ef]
            asked += [(f"ef {ef}", params) for ef, params in found]
        for label, params in asked:
            engine = QdrantEngine(folder, name, search_params=params)
            for mode in MODES:
                results, one = measure(Searcher(engine), queries, mode, options)
                shared = recall(exact[mode], results)
                print(f"    {label:8s} {mode:12s} {1000 * one:8.2f} ms a query, recall@100 {shared:.4f}", flush=True)
            engine.close()


def measure_size(count: int, real: torch.Tensor, queries: torch.Tensor, options: argparse.Namespace) -> None:
    """Print what exact search and each index cost and find among so many passages."""
    store = made_store(options.scratch, real, count, options.noise)
    print(f"{count} passages, K_p {real.shape[1]}, H {real.shape[2]}; {len(queries)} queries, K_q {queries.shape[1]}")
    exact: dict[str, Results] = {}
    searcher = Searcher(store)
    for mode in MODES:
        exact[mode], one = measure(searcher, queries, mode, options)
        print(f"  exact search {mode:12s} {1000 * one:8.2f} ms a query", flush=True)
    for name in options.indexes:
        measure_index(name, store, queries, exact, options)


def main() -> None:
    """Parse the command line and measure."""
    parser = Parser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True, help="a store of queries")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--indexes", choices=INDEXES, nargs="*", default=["plain", "scalar", "hnsw"])
    parser.add_argument("--num-queries", type=int, default=100)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--ef", type=int, nargs="*", default=[512], help="of the graph's search, beside Qdrant's own")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the processors' time, all threads together"
    )
    parser.add_argument("--scratch", type=Path, help="where store and collections are made (default: temporary)")
    options = parser.parse_args()
    real, queries = dense(options.store), dense(options.queries, options.num_queries).float()
    print(f"{describe('cpu')}; {options.clock} time; {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as temporary:
        options.scratch = options.scratch or Path(temporary)
        options.scratch.mkdir(parents=True, exist_ok=True)
        for count in options.sizes:
            measure_size(count, real, queries, options)


if __name__ == "__main__":
    main()
