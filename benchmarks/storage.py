"""Storage and latency against corpus size, with synthetic vectors (paper App. B.2, B.3).

For every number of passage masks K_p and every corpus size: writes a store of random unit vectors and random sparse
vectors, adds up its bytes on the disk, and times exact search (`multi_dense`) of one query after the other.

python benchmarks/storage.py --json storage.json && diffretriever plot scaling --input storage.json --output storage.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hardware import CLOCKS, describe

from diffretriever.cli.parser import Parser
from diffretriever.search.searcher import Searcher
from diffretriever.store.store import ShardContents, write_store

SHARD = 5000  # passages
VOCABULARY = 126_464  # LLaDA's
SYSTEMS = ((1, 1), (4, 4), (4, 16))  # K_q, K_p of the paper's releases


def random_vectors(count: int, masks: int, width: int, terms: int, generator: torch.Generator) -> dict[str, Any]:
    """Return what `encode_texts` would: repr_hidden float32 [n, K, H], sparse indices and values [n, T]."""
    vectors = F.normalize(torch.randn(count, masks, width, generator=generator), dim=-1)
    indices = torch.randint(1, VOCABULARY, (count, terms), generator=generator)
    return {
        "repr_hidden": vectors,
        "sparse_indices": indices,
        "sparse_values": torch.rand(count, terms, generator=generator).sort(descending=True).values,
    }


def shards(passages: int, masks: int, options: argparse.Namespace) -> Iterator[ShardContents]:
    """Yield the shards of a synthetic store."""
    generator = torch.Generator().manual_seed(masks)
    for start in range(0, passages, SHARD):
        count = min(SHARD, passages - start)
        made = random_vectors(count, masks, options.hidden_size, options.terms, generator)
        yield ShardContents([f"passage-{start + row}" for row in range(count)], **made)


def disk_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def latency_ms(passages: Any, query_masks: int, options: argparse.Namespace) -> float:
    """Return the median time of searching one query, in milliseconds, everything in memory."""
    searcher = Searcher(passages, device=options.device, in_memory=True)
    generator = torch.Generator().manual_seed(0)
    queries = random_vectors(options.num_queries + 1, query_masks, options.hidden_size, options.terms, generator)
    took = []
    for row in range(options.num_queries + 1):
        one = {name: values[row : row + 1] for name, values in queries.items()}
        start = CLOCKS[options.clock]()
        searcher.search(one, "multi_dense", top_k=options.top_k)  # its results are on the CPU, so the device is done
        took.append(CLOCKS[options.clock]() - start)
    return 1000 * statistics.median(took[1:])  # the first one warms up


def measure(query_masks: int, passage_masks: int, passages: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return one point of the picture."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch) / "store"
        store = write_store(folder, shards(passages, passage_masks, options), {"dtype": options.dtype})
        size, milliseconds = disk_bytes(folder), latency_ms(store, query_masks, options)
    point = {"system": f"$K_q$ = {query_masks}, $K_p$ = {passage_masks}", "passages": passages}
    point |= {"num_query_masks": query_masks, "num_passage_masks": passage_masks, "hidden_size": options.hidden_size}
    return point | {"bytes": size, "bytes_per_passage": size / passages, "latency_ms": milliseconds}


def report(content: Mapping[str, Any]) -> None:
    """Print the table."""
    print(content["hardware"])
    print(
        f"{content['dtype']} vectors of {content['hidden_size']} dimensions, {content['terms']} sparse terms a passage"
    )
    print(f"{'K_q':>4} {'K_p':>4} {'passages':>9} {'on disk':>10} {'a passage':>10} {'a query':>10}")
    for point in content["points"]:
        print(
            f"{point['num_query_masks']:>4} {point['num_passage_masks']:>4} {point['passages']:>9,} "
            f"{point['bytes'] / 1e6:>7.1f} MB {point['bytes_per_passage'] / 1e3:>7.2f} kB "
            f"{point['latency_ms']:>7.2f} ms"
        )


def main() -> None:
    """Measure, print, write the JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10000, 30000], help="passages")
    parser.add_argument("--hidden-size", type=int, default=4096, help="of a vector (LLaDA-8B: 4096)")
    parser.add_argument("--terms", type=int, default=128, help="sparse terms a passage")
    parser.add_argument("--dtype", default="float16", help="of the stored vectors")
    parser.add_argument("--num-queries", type=int, default=20, help="timed one after the other")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall, or processor time on a shared machine")
    parser.add_argument("--scratch", type=Path, help="folder for the stores (default: the system's)")
    parser.add_argument("--json", type=Path, help="where to write the points")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    points = [measure(*masks, size, options) for masks in SYSTEMS for size in options.sizes]
    content = {"hardware": describe(options.device), "dtype": options.dtype, "hidden_size": options.hidden_size}
    content |= {"terms": options.terms, "points": points}
    report(content)
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
