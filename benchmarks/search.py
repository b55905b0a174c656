"""How fast, how small and how true search is.

python benchmarks/search.py speed [--sizes 10000 100000 1000000]    synthetic vectors: exact search and Qdrant's engine
python benchmarks/search.py quality --store S --queries Q --qrels F  real ones: exact, compressed, Qdrant

`speed` names the share of the matmul peak: the multiplications and additions that MaxSim needs (2·Q·K_q·P·K_p·H) over
the time of the whole search, ranking included, next to a matrix product of the same shape that stays in the caches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hardware import CLOCKS, describe

from diffretriever.cli.parser import Parser
from diffretriever.data.qrels import read_qrels
from diffretriever.evaluation.metrics import evaluate_run, means, parse_metric
from diffretriever.model.batching import run_side_by_side
from diffretriever.search import MODES, QdrantEngine, Results, Searcher, compress, open_store, upload
from diffretriever.store.store import ShardContents, write_store

VOCABULARY = 126_464  # LLaDA's
STORED = ("float16", "bfloat16", "float32", "int8", "compressed")
PEAK_ROWS = 1024  # of the product that gives the peak


def seconds(work: Callable[[], Any], repeats: int, clock: str = "wall") -> float:
    """Return the median time of a call after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        start = CLOCKS[clock]()
        work()
        times.append(CLOCKS[clock]() - start)
    return statistics.median(times)


def synthetic(count: int, masks: int, options: argparse.Namespace, seed: int) -> dict[str, torch.Tensor]:
    """Return made-up encoder output: unit vectors in float16, terms that are as unevenly spread as words."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.empty(count, masks, options.hidden_size, dtype=torch.float16)
    for start in range(0, count, 50_000):
        part = torch.randn(min(50_000, count - start), masks, options.hidden_size, generator=generator)
        vectors[start : start + 50_000] = F.normalize(part, dim=-1)
    spread = torch.rand(count, options.terms, generator=generator)
    terms = (VOCABULARY**spread).int()  # log-uniform: the n-th term is about 1/n as frequent
    values = torch.rand(count, options.terms, generator=generator)
    return {"repr_hidden": vectors, "sparse_indices": terms, "sparse_values": values}


def matmul_rate(columns: int, options: Any) -> float:
    """Return the FLOP/s of a product of the same shape whose sides stay in the caches."""
    left, right = (torch.randn(rows, options.hidden_size, device=options.device) for rows in (PEAK_ROWS, columns))
    out = torch.empty(PEAK_ROWS, columns, device=options.device)
    work = 2.0 * PEAK_ROWS * options.hidden_size * columns
    calls = max(1, round(2e9 / work))

    def product() -> None:
        for _ in range(calls):
            torch.mm(left, right.T, out=out)
        float(out[0, 0])  # waits for a GPU

    return calls * work / seconds(product, 5, options.clock)


def read(vectors: torch.Tensor) -> None:
    """Read vectors once, in as many threads as there are: the least that a search of one query can take."""
    parts = vectors.view(torch.int64).flatten().chunk(16)
    for _ in run_side_by_side(torch.sum, parts, torch.get_num_threads()):
        pass


def first(side: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Return the first queries."""
    return {name: tensor[:count] for name, tensor in side.items()}


def measure_exact(passages: dict[str, torch.Tensor], queries: dict[str, torch.Tensor], options: Any) -> None:
    """Print latency and throughput of the exact searcher."""
    count = len(passages["repr_hidden"])
    searcher = Searcher(passages, device=options.device, in_memory=options.device != "cpu")
    one = first(queries, 1)
    start = time.perf_counter()
    searcher.search(one, "sparse_max", options.top_k)
    print(f"  inverted index built in {time.perf_counter() - start:.2f} s")
    limit = seconds(partial(read, passages["repr_hidden"]), options.rounds, options.clock)
    print(f"  the vectors read once, nothing done with them {1000 * limit:9.2f} ms")
    for mode in MODES:
        single = seconds(partial(searcher.search, one, mode, options.top_k), options.rounds, options.clock)
        print(f"  {mode:26s} one query {1000 * single:9.2f} ms")
    for batch in options.batches:
        asked = first(queries, batch)
        took = seconds(partial(searcher.search, asked, "multi_dense", options.top_k), options.rounds, options.clock)
        columns = batch * options.num_query_masks
        rate = 2.0 * columns * count * options.num_passage_masks * options.hidden_size / took
        peak = matmul_rate(min(columns, 256), options)
        print(
            f"  multi_dense, {batch:4d} at once     {1000 * took / batch:9.2f} ms a query, {rate / 1e9:7.1f} GFLOP/s, "
            f"{100 * rate / peak:.0f} % of the {peak / 1e9:.1f} of a product alone"
        )


def measure_stored(passages: dict[str, torch.Tensor], queries: dict[str, torch.Tensor], options: Any) -> None:
    """Print one query's latency on stores of other forms, and how long reading such vectors takes."""
    count, one = len(passages["repr_hidden"]), first(queries, 1)
    ids = [str(number) for number in range(count)]
    contents = ShardContents(ids, passages["repr_hidden"], passages["sparse_indices"][:, :1], torch.ones(count, 1))
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for form in options.stored:
            dtype = "float16" if form == "compressed" else form
            store = write_store(Path(folder) / f"{form} vectors", [contents], {"dtype": dtype})
            if form == "compressed":
                store = compress(store, Path(folder) / "codes", 4)
            held = next(iter(store.shards())).file.tensor("codes" if form == "compressed" else "repr_hidden")
            times = [seconds(partial(read, held), options.rounds, options.clock)]
            for mode in ("multi_dense", "single_dense"):
                call = partial(Searcher(store).search, one, mode, options.top_k)
                times.append(seconds(call, options.rounds, options.clock))
            limit, multi, single = (1000 * value for value in times)
            print(f"  {form:10s} read {limit:8.2f} ms, multi_dense {multi:8.2f} ms, single_dense {single:8.2f} ms")


def measure_engine(passages: dict[str, torch.Tensor], queries: dict[str, torch.Tensor], options: Any) -> None:
    """Print upload time, latency, size and agreement of Qdrant."""
    count = len(passages["repr_hidden"])
    exact = Searcher(passages)
    with tempfile.TemporaryDirectory() as folder:
        location = options.qdrant or folder
        start = time.perf_counter()
        upload(passages, location, f"benchmark-{count}")
        print(f"  Qdrant at {options.qdrant or 'a folder'}: uploaded in {time.perf_counter() - start:.1f} s")
        if not options.qdrant:
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            print(f"  {size / count:.0f} bytes a passage on disk")
        engine = QdrantEngine(location, f"benchmark-{count}")
        asked = first(queries, options.engine_queries)
        for mode in MODES:
            took = seconds(partial(Searcher(engine).search, asked, mode, 100), 1) / options.engine_queries
            shared = recall(exact.search(asked, mode, 100), Searcher(engine).search(asked, mode, 100))
            print(f"  Qdrant {mode:26s} {1000 * took:9.2f} ms a query, recall@100 against exact {shared:.4f}")
        engine.close()


def recall(exact: Results, found: Results) -> float:
    """Return the mean share of the exact results that were found."""
    shares = [len(set(a) & set(b)) / len(a) for a, b in zip(exact.ids, found.ids, strict=True) if a]
    return sum(shares) / max(1, len(shares))


def speed(options: argparse.Namespace) -> None:
    """Run `speed`."""
    print(f"{describe(options.device)}; {options.clock} time")
    masks = f"K_q {options.num_query_masks}, K_p {options.num_passage_masks}"
    print(f"H {options.hidden_size}, {masks}, {options.terms} terms a text")
    queries = synthetic(max([1, *options.batches]), options.num_query_masks, options, seed=1)
    for value in (queries["sparse_values"], queries["sparse_indices"]):
        value[:, 8:] = 0  # a query of eight words
    for count in options.sizes:
        passages = synthetic(count, options.num_passage_masks, options, seed=2)
        dense = passages["repr_hidden"].nbytes / count
        sparse = options.terms * (4 + 2)
        print(f"{count} passages: {dense:.0f} + {sparse} bytes each in a float16 store (dense + sparse)", flush=True)
        measure_exact(passages, queries, options)
        measure_stored(passages, queries, options)
        if count <= options.engine_limit:
            measure_engine(passages, queries, options)


def quality(options: argparse.Namespace) -> None:
    """Run `quality`."""
    print(describe("cpu"))
    store, queries, qrels = open_store(options.store), open_store(options.queries), read_qrels(options.qrels)
    judged = [row for row, name in enumerate(queries.ids()) if name in qrels][: options.limit]
    names = [queries.ids()[row] for row in judged]
    shard = next(queries.shards())
    whole = {"repr_hidden": torch.cat([part.dense(0, len(part)) for part in queries.shards()])}
    for field in ("sparse_indices", "sparse_values"):
        whole[field] = torch.cat([getattr(part, field) for part in queries.shards()])
    asked = {name: tensor[judged] for name, tensor in whole.items()}
    metric = parse_metric("nDCG@10")
    exact: dict[str, Results] = {}

    def report(label: str, searcher: Searcher, dense_bytes: float) -> None:
        for mode in MODES:
            start = time.perf_counter()
            results = searcher.search(asked, mode, 100)
            took = (time.perf_counter() - start) / len(names)
            exact.setdefault(mode, results)
            kept = {name: qrels[name] for name in names}
            value = means(evaluate_run(results.run(names), kept, [metric]))["nDCG@10"]
            shared = recall(exact[mode], results)
            print(
                f"{label:12s} {mode:26s} nDCG@10 {value:.4f}  recall@100 against exact {shared:.4f}  "
                f"{1000 * took:8.2f} ms a query  {dense_bytes:6.0f} dense bytes a passage",
                flush=True,
            )

    print(f"{len(store)} passages, {len(names)} queries, K_q {shard.repr_hidden.shape[1]}")
    full = 2.0 * store.manifest.num_masks * store.manifest.hidden_size
    report("exact", Searcher(store), full)
    with tempfile.TemporaryDirectory() as folder:
        for dimensions in options.dimensions_per_byte:
            small = compress(store, Path(folder) / str(dimensions), dimensions)
            report(f"{dimensions} dims/byte", Searcher(small), full / 2 / dimensions)
        if options.qdrant:
            upload(store, str(Path(folder) / "qdrant"), "quality")
            engine = QdrantEngine(str(Path(folder) / "qdrant"), "quality")
            report("Qdrant", Searcher(engine), full)
            engine.close()


def main() -> None:
    """Parse the command line and measure."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    fast = commands.add_parser("speed")
    fast.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    fast.add_argument("--hidden-size", type=int, default=192, help="H; LLaDA-8B's is 4096")
    fast.add_argument("--num-query-masks", type=int, default=4)
    fast.add_argument("--num-passage-masks", type=int, default=4)
    fast.add_argument("--terms", type=int, default=48, help="sparse weights a text")
    fast.add_argument("--batches", type=int, nargs="*", default=[1, 32, 64], help="queries searched at once")
    fast.add_argument("--top-k", type=int, default=10)
    fast.add_argument("--rounds", type=int, default=3)
    fast.add_argument("--device", default="cpu")
    fast.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: on one thread of a machine shared with others"
    )
    fast.add_argument("--threads", type=int)
    fast.add_argument("--stored", nargs="*", choices=STORED, default=[], help="stores of these forms, one query")
    fast.add_argument("--scratch", type=Path, help="folder for them (default: the system's)")
    fast.add_argument("--qdrant", help="a server's address; without it a folder")
    fast.add_argument("--engine-limit", type=int, default=10_000, help="largest size for Qdrant")
    fast.add_argument("--engine-queries", type=int, default=10)
    fast.set_defaults(run=speed)
    true = commands.add_parser("quality")
    true.add_argument("--store", type=Path, required=True)
    true.add_argument("--queries", type=Path, required=True)
    true.add_argument("--qrels", type=Path, required=True)
    true.add_argument("--limit", type=int, help="queries (default: all that have judgements)")
    true.add_argument("--dimensions-per-byte", type=int, nargs="*", default=[3, 4])
    true.add_argument("--qdrant", action="store_true", help="Qdrant in a folder, too")
    true.set_defaults(run=quality, threads=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
