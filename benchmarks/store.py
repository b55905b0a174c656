"""What a store costs: the speed of `diffretriever encode` next to bare encoding, and what each dtype loses.

python benchmarks/store.py speed --model checkpoints/diffretriever-llada-tiny-multi-q4-p4 --input corpus.jsonl
python benchmarks/store.py dtypes --model checkpoints/diffretriever-llada-tiny-multi-q4-p4 --data BEIR_DIR --scratch DIR
python benchmarks/store.py write [--tokens-per-second 40000]
python benchmarks/store.py beside --model checkpoints/diffretriever-llada-tiny-multi-q4-p4 [--tokens-per-second 40000]
python benchmarks/store.py memory --model checkpoints/diffretriever-llada-tiny-multi-q4-p4 [--sizes 100000 1000000]
python benchmarks/store.py shards [--count 1000000]

`speed` encodes the same passages with `encode_texts` and with `encode_store`, in turn and in one process, and prints
the medians and their ratio. `dtypes` encodes once into float32 stores (kept in the scratch folder), converts them, and
compares each dtype's MaxSim ranking with float32's. `write` times the writing of shards of some widths, and says what
share of the encoding it would be. `beside` has `encode_store` write such shards beside a model that takes as long as a
GPU of that speed would, by the clock and without a processor, and says how much longer the encoding takes. `memory`
makes stores of some sizes, each in a process of its own, with tokens and vectors out of a hat, and prints the peak of
its memory. `shards` does what so many shards cost when a store is begun, ended and opened, with made-up entries, and
prints processor seconds and the peak of memory.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from encode import peak_resident  # noqa: E402
from hardware import describe  # noqa: E402
from transformers import AutoModel  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.data.corpus import read_corpus  # noqa: E402
from diffretriever.data.qrels import read_qrels  # noqa: E402
from diffretriever.encode.encode_store import encode_store  # noqa: E402
from diffretriever.store.manifest import MANIFEST_FILE, STORE_DTYPES, Manifest, ShardEntry  # noqa: E402
from diffretriever.store.plan import PLAN_FILE, SHARD_NAME, Plan, Survey  # noqa: E402
from diffretriever.store.shard_file import ShardFile  # noqa: E402
from diffretriever.store.store import Shard, ShardContents, Store, write_store  # noqa: E402

SHARD = 4096  # texts: the default of `diffretriever encode`
WIDTHS = ((4, 192), (4, 576), (4, 4096), (16, 4096))  # K, H


def main() -> None:
    """Run one of the measurements."""
    parser = Parser(description=__doc__)
    measurements = parser.add_subparsers(required=True)
    speed = measurements.add_parser("speed")
    speed.add_argument("--input", required=True)
    speed.add_argument("--num-passages", type=int, default=1024)
    speed.add_argument("--shard-size", type=int, default=512)
    speed.add_argument("--rounds", type=int, default=5)
    speed.set_defaults(run=compare_speed)
    dtypes = measurements.add_parser("dtypes")
    dtypes.add_argument("--data", required=True, type=Path)
    dtypes.add_argument("--split", default="test")
    dtypes.add_argument("--scratch", required=True, type=Path, help="keeps the float32 stores for the next time")
    dtypes.set_defaults(run=compare_dtypes)
    write = measurements.add_parser("write")
    write.add_argument("--tokens-per-second", type=float, nargs="+", default=[1000.0, 40000.0])
    write.add_argument("--num-passages", type=int, default=2048, help="in a shard")
    write.add_argument("--rounds", type=int, default=5)
    write.set_defaults(run=measure_writing)
    beside = measurements.add_parser("beside")
    beside.add_argument("--tokens-per-second", type=float, default=40000.0)
    beside.add_argument("--num-passages", type=int, default=1024, help="in a shard")
    beside.add_argument("--rounds", type=int, default=3)
    beside.set_defaults(run=measure_beside)
    for measurement in (write, beside):
        measurement.add_argument("--tokens", type=int, default=130, help="of a passage, prompt and masks included")
        measurement.add_argument("--scratch", type=Path, help="where shards are written (default: a temporary folder)")
    memory = measurements.add_parser("memory")
    memory.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000], help="passages")
    memory.set_defaults(run=measure_memory)
    shards = measurements.add_parser("shards")
    shards.add_argument("--count", type=int, default=1_000_000)
    shards.set_defaults(run=measure_shards)
    for measurement in (speed, dtypes, beside, memory):
        measurement.add_argument("--model", required=True)
        measurement.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if "model" not in options:
        options.run(options)
        return
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True).to(options.device)
    print(f"{describe(options.device)}; {options.model}, {model.dtype}")
    options.run(model, options)


def compare_speed(model: Any, options: argparse.Namespace) -> None:
    """Print the throughput of both ways and the median of their ratios, round by round."""
    passages = list(islice(read_corpus(options.input), options.num_passages))
    texts = [passage.text for passage in passages]
    tokens = int(model.tokenize(texts, False)[1].sum())
    with tempfile.TemporaryDirectory() as scratch:
        source = write_tsv(Path(scratch) / "corpus.tsv", passages)
        target = Path(scratch) / "store"
        ways: dict[str, Callable[[], Any]] = {
            "encode_texts": lambda: model.encode_texts(texts, False),
            "encode_store": lambda: encode_store(model, source, target, shard_size=options.shard_size),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):  # the first warms up
            for name, way in ways.items():
                shutil.rmtree(target, ignore_errors=True)
                begun = time.perf_counter()
                way()
                times[name] += [time.perf_counter() - begun] * (turn > 0)
    print(f"{len(texts)} passages, {tokens} tokens, shards of {options.shard_size}; {options.rounds} rounds, medians")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:>14}: {len(texts) / middle:8.1f} passages/s {tokens / middle:9.0f} tokens/s")
    pairs = zip(times["encode_texts"], times["encode_store"], strict=True)
    ratios = [bare / stored for bare, stored in pairs]
    print(
        f"encode_store runs at {statistics.median(ratios):.1%} of encode_texts ({min(ratios):.1%} … {max(ratios):.1%})"
    )


def write_tsv(file: Path, passages: list[Any]) -> Path:
    """Write passages as MS MARCO does; returns the file."""
    lines = [f"{number}\t{' '.join(passage.text.split())}\n" for number, passage in enumerate(passages)]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def measure_writing(options: argparse.Namespace) -> None:
    """Print what a passage's writing takes, of a processor and by the clock, beside its encoding."""
    print(describe("cpu"))
    count = options.num_passages
    for masks, width in WIDTHS:
        vectors = F.normalize(torch.randn(count, masks, width), dim=-1)
        sparse = torch.randint(1, 30_000, (count, 128)), torch.rand(count, 128)
        contents = ShardContents(list(map(str, range(count))), vectors, *sparse, ["x" * 400] * count)
        taken: list[tuple[float, float]] = []
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            for turn in range(options.rounds):
                begun = time.process_time(), time.perf_counter()
                write_store(Path(scratch) / str(turn), [contents], {})
                taken.append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
                shutil.rmtree(Path(scratch) / str(turn))
        worked, passed = (1e6 * statistics.median(times) / count for times in zip(*taken, strict=True))
        shares = [f"{worked / (1e6 * options.tokens / rate):.3%} at {rate:g}" for rate in options.tokens_per_second]
        print(
            f"K {masks:2d}, H {width:4d}, float16: {worked:4.0f} us of a core and {passed:5.0f} us by the clock each: "
            f"of encoding {', '.join(shares)} tokens/s",
            flush=True,
        )


def measure_beside(model: Any, options: argparse.Namespace) -> None:
    """Print how much longer a corpus takes whose vectors come at a GPU's pace, where they are written meanwhile.

    Of six shards instead of two, so that neither the start counts nor the last shard, which nothing is encoded beside.
    """
    (one,) = model.texts.prepare(["an audio player"], False, True)
    model.texts.prepare = partial(as_if_each, one)
    shards, pace = (2, 6), options.tokens / options.tokens_per_second
    for masks, width in WIDTHS:
        model.config.num_passage_masks, model.config.backbone_config.hidden_size = masks, width
        model.encode_batches = partial(at_a_pace, (masks, width), pace)
        longer = []
        for _ in range(options.rounds):
            taken = []
            for count in shards:
                with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
                    source = made_up_corpus(Path(scratch) / "corpus.tsv", count * options.num_passages)
                    begun = time.perf_counter()
                    encode_store(model, source, Path(scratch) / "store", shard_size=options.num_passages)
                    taken.append(time.perf_counter() - begun)
            encoding = (shards[1] - shards[0]) * options.num_passages * pace
            longer.append((taken[1] - taken[0]) / encoding - 1)
        spread = f"{statistics.median(longer):.1%} longer ({min(longer):.1%} … {max(longer):.1%})"
        print(f"K {masks:2d}, H {width:4d}, float16: {spread} at {options.tokens_per_second:g} tokens/s", flush=True)


def at_a_pace(
    shape: tuple[int, int], pace: float, prepared: Any, batches: Any, sparse_top_k: int, **_: Any
) -> Iterator[Any]:
    """Yield what a model on a GPU would, `pace` seconds a text; each batch has the same vectors of a shape [K, H]."""
    longest = max(map(len, batches))
    vectors = F.normalize(torch.rand(longest, *shape), dim=-1)
    indices, values = torch.arange(1, sparse_top_k + 1).expand(longest, -1), torch.rand(longest, sparse_top_k)
    ready = time.perf_counter()
    for rows in batches:
        ready += pace * len(rows)  # the GPU goes on, whatever the host does
        time.sleep(max(0.0, ready - time.perf_counter()))
        count = len(rows)
        yield rows, {"repr_hidden": vectors[:count], "sparse_indices": indices[:count], "sparse_values": values[:count]}


def made_up_corpus(file: Path, size: int) -> Path:
    """Write a corpus of so many passages; returns the file."""
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{number}\taudio player {number}\n" for number in range(size))
    return file


def measure_memory(model: Any, options: argparse.Namespace) -> None:
    """Print the peak memory of encoding corpora of some sizes; more than one are measured in processes of their own."""
    for size in options.sizes:
        if len(options.sizes) > 1:
            command = [sys.executable, __file__, "memory", "--model", options.model, "--sizes", str(size)]
            command += ["--device", options.device]
            print(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1], flush=True
            )
            continue
        shape = model.config.num_passage_masks, model.config.backbone_config.hidden_size
        model.encode_batches = partial(out_of_a_hat, shape)
        (one,) = model.texts.prepare(["an audio player"], False, True)
        model.texts.prepare = partial(as_if_each, one)
        with tempfile.TemporaryDirectory() as scratch:
            source = made_up_corpus(Path(scratch) / "corpus.tsv", size)
            begun = time.perf_counter()
            store = encode_store(model, source, Path(scratch) / "store")
            print(f"{len(store)} passages: {peak_resident():.2f} GB at the peak, {time.perf_counter() - begun:.0f} s")


def as_if_each(one: Any, texts: list[str], *_: Any) -> list[Any]:
    """Return one prepared text for every text."""
    return [one] * len(texts)


def out_of_a_hat(shape: tuple[int, int], prepared: Any, batches: Any, sparse_top_k: int, **_: Any) -> Iterator[Any]:
    """Yield what a model would, with random vectors of a shape [K, H]."""
    for rows in batches:
        vectors = F.normalize(torch.rand(len(rows), *shape), dim=-1)
        indices = torch.randint(1, 100, (len(rows), sparse_top_k))
        yield rows, {"repr_hidden": vectors, "sparse_indices": indices, "sparse_values": torch.rand(indices.shape)}


def measure_shards(options: argparse.Namespace) -> None:
    """Print what plan, manifest and headers of so many shards cost, one step after the other in this process."""
    digests = tuple(f"{number:064x}" for number in range(options.count))
    entries = (
        ShardEntry(SHARD_NAME.format(number), number * SHARD, SHARD, 10**8, digest, digest)
        for number, digest in enumerate(digests)
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small = ShardContents(["id"], torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), ["text"])
        write_store(folder / "one", [small], {"options": {"shard_size": SHARD}})
        settings, one = Store.open(folder / "one").manifest.settings, folder / "one" / SHARD_NAME.format(0)
        steps: dict[str, Callable[[], Any]] = {
            "plan written": lambda: Plan(settings, Survey(SHARD * options.count, digests), SHARD).write(folder),
            "plan read": lambda: Plan.read(folder),
            "manifest written": lambda: Manifest.of(settings, entries).write(folder),
            "manifest read": lambda: Manifest.read(folder),
            "headers read": lambda: [ShardFile(one) for _ in range(options.count)],
        }
        print(f"{describe('cpu')}; {options.count} shards, processor seconds; {peak_resident():.2f} GB before")
        for name, step in steps.items():
            begun = time.process_time()
            step()
            print(f"{name:>16}: {time.process_time() - begun:6.1f} s, {peak_resident():.2f} GB at the peak", flush=True)
        sizes = {name: (folder / name).stat().st_size / 1e6 for name in (PLAN_FILE, MANIFEST_FILE)}
        print(", ".join(f"{name} {size:.0f} MB" for name, size in sizes.items()))


def compare_dtypes(model: Any, options: argparse.Namespace) -> None:
    """Print, for each dtype, how much of float32's ranking it keeps and what the judgements say."""
    exact = encode_store(model, options.data, options.scratch / "passages", dtype="float32", show_progress_bar=True)
    encode_store(model, options.data, options.scratch / "queries", is_query=True, dtype="float32")
    queries = Store.open(options.scratch / "queries")
    qrels = read_qrels(options.data / "qrels" / f"{options.split}.tsv")
    kept = [row for row, query in enumerate(queries.ids()) if query in qrels]
    vectors = torch.cat([shard.dense(0, len(shard)) for shard in queries.shards()])[kept]  # float32 [Q, K_q, H]
    names = [queries.ids()[row] for row in kept]
    ids, best = exact.ids(), {}
    for dtype in STORE_DTYPES:
        folder = options.scratch / dtype
        shutil.rmtree(folder, ignore_errors=True)
        fields = {"dtype": dtype}
        store = write_store(folder, map(contents_of, exact.shards()), fields)
        size = sum(shard.repr_hidden.nbytes + shard_scale_bytes(shard) for shard in store.shards()) / len(store)
        best[dtype] = (size, ranking(vectors, store, 100))
        shutil.rmtree(folder)
    reference = best["float32"][1]
    print(f"{len(ids)} passages, {len(names)} queries, MaxSim")
    print("dtype     bytes a passage  recall@10 of float32's  recall@100 of float32's  nDCG@10  recall@100")
    for dtype, (size, found) in best.items():
        overlap = [share_kept(found[:, :depth], reference[:, :depth]) for depth in (10, 100)]
        gain, recall = quality([[ids[place] for place in row] for row in found.tolist()], names, qrels)
        print(f"{dtype:<9} {size:15.0f} {overlap[0]:23.4f} {overlap[1]:24.4f} {gain:8.4f} {recall:11.4f}")


def contents_of(shard: Shard) -> ShardContents:
    """Return what a float32 shard holds."""
    return ShardContents(shard.ids, shard.dense(0, len(shard)), shard.sparse_indices, shard.sparse_values)


def shard_scale_bytes(shard: Shard) -> int:
    """Return the size of an int8 shard's scales, else 0."""
    return 0 if shard.repr_scale is None else shard.repr_scale.nbytes


def ranking(queries: torch.Tensor, store: Store, depth: int) -> torch.Tensor:
    """Return the positions of the best passages by MaxSim (paper Eq. 2), int64 [Q, depth]."""
    blocks = []
    for shard in store.shards():
        passages = shard.dense(0, len(shard))  # [P, K_p, H]
        similarity = queries.flatten(0, 1) @ passages.flatten(0, 1).T  # [Q·K_q, P·K_p]
        best = similarity.view(*queries.shape[:2], len(passages), -1).amax(dim=3)  # [Q, K_q, P]
        blocks.append(best.mean(dim=1))
    return torch.cat(blocks, dim=1).topk(depth, dim=1).indices


def share_kept(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Return how much of the reference's lists the found lists hold, in any order."""
    pairs = zip(found.tolist(), reference.tolist(), strict=True)
    return statistics.mean(len(set(row) & set(wanted)) / len(wanted) for row, wanted in pairs)


def quality(rankings: list[list[str]], names: list[str], qrels: dict[str, dict[str, int]]) -> tuple[float, float]:
    """Return nDCG@10 and Recall@100 (ir_measures, pytrec_eval)."""
    import ir_measures

    run = {
        query: {passage: float(-place) for place, passage in enumerate(row) if passage != query}
        for query, row in zip(names, rankings, strict=True)
    }
    judged = {query: qrels[query] for query in names}
    found = ir_measures.pytrec_eval.calc_aggregate([ir_measures.nDCG @ 10, ir_measures.R @ 100], judged, run)
    return found[ir_measures.nDCG @ 10], found[ir_measures.R @ 100]


if __name__ == "__main__":
    main()
