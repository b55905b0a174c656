"""How fast and how small encoding is, next to the plain way, in one process, for each dtype.

The plain way is what research code does: the same weights and layers, one padded batch after the other in the order of
arrival, the whole sequence through every layer and the head on every position. Both return the same vectors. Then one
query after the other: how long it takes, how long at the rate of a large product, and how much of it is not the layers.

python benchmarks/encode.py [--shape wide] [--model RELEASE] [--compile]
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from hardware import CLOCKS, arithmetic_unit, describe  # noqa: E402
from random_backbone import TOKENIZER, Shape, write_backbone  # noqa: E402
from transformers import AutoModel  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.publishing import build as building  # noqa: E402

WORDS = "the retrieval of light from water systems index sun energy with documents and of passages moving".split()
# Two shapes of 92M parameters with LLaDA's own vocabulary. "narrow" is LLaDA-8B with every width divided by 16; "wide"
# puts the same weights into fewer, larger matrices.
SHAPES = {"narrow": Shape(32, 256, 768, 4), "wide": Shape(8, 256, 4096, 4)}


def mixed_texts(count: int) -> list[str]:
    """Return passages of mixed lengths: most short, some cut at the maximum, as in MS MARCO."""
    numbers = random.Random(0)
    lengths = [min(120, max(4, round(numbers.lognormvariate(3.4, 0.6)))) for _ in range(count)]
    return [" ".join(numbers.choices(WORDS, k=length)) for length in lengths]


@torch.no_grad()
def plain_way(model: Any, texts: list[str], batch_size: int, top_k: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode as research code does; returns repr_hidden [N, K, H] and sparse values [N, T]."""
    dense, sparse = [], []
    contents = model.content_token_ids(texts)
    for start in range(0, len(texts), batch_size):
        ids, mask = model.tokenize(texts[start : start + batch_size], is_query=False)
        ids, mask = ids.to(model.device), mask.to(model.device)
        hidden = model.hidden_states(ids, mask)  # [B, L, H]
        logits = model.lm_head(hidden)  # [B, L, V]
        at_masks = (ids == model.texts.mask_id).nonzero()[:, 1].view(len(ids), -1)  # [B, K]
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        dense.append(F.normalize(hidden[rows, at_masks].float(), dim=-1).cpu())
        weights = torch.log1p(F.relu(logits[rows, at_masks].float().amax(dim=1)))  # [B, V]
        allowed = torch.zeros_like(weights)
        for row, content in enumerate(contents[start : start + batch_size]):
            allowed[row, content] = 1.0
        sparse.append((weights * allowed).topk(top_k, dim=1).values.cpu())
        del logits, weights, allowed  # or the next batch's would come on top
    return torch.cat(dense), torch.cat(sparse)


def our_way(model: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode through `encode_texts`."""
    out = model.encode_texts(texts, is_query=False)
    return out.repr_hidden, out.sparse_values


def matmul_rate(dtype: torch.dtype, device: str, least_seconds: float, size: int = 2048, clock: str = "wall") -> float:
    """Return the FLOP/s that square matrix products keep up for a while."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    took, count = 0.0, 0
    while not took or took < least_seconds:
        took += seconds(lambda: left @ right, device, clock)
        count += 1
    return count * 2 * size**3 / took


def seconds(work: Callable[[], Any], device: str, clock: str = "wall") -> float:
    """Time one call by one of `hardware.CLOCKS`."""
    start = now(device, clock)
    work()
    return now(device, clock) - start


def now(device: str, clock: str) -> float:
    """Return the time in seconds when the device has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return CLOCKS[clock]()


def needed_flops(model: Any, texts: list[str], is_query: bool = False) -> float:
    """Return the arithmetic that the vectors need: layers on the real tokens, the last and the head at the masks."""
    config = model.config.backbone_config
    num_masks = model.config.num_query_masks if is_query else model.config.num_passage_masks
    key_value = 2 * 2 * config.hidden_size**2 * config.num_key_value_heads // config.num_attention_heads
    layer = key_value + 2 * (2 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    total = 0.0
    for sequence, content in zip(model.texts.tokenize(texts, is_query), model.content_token_ids(texts), strict=True):
        length = len(sequence)
        attention = 4 * length * config.hidden_size
        total += (config.num_hidden_layers - 1) * length * (layer + attention) + length * key_value
        total += num_masks * (layer - key_value + attention + 2 * config.hidden_size * len(content))
    return total


def peak_resident() -> float:
    """Return this process's peak resident memory in GB (getrusage would count the parent's as well)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e9


def peak_memory(way: str, options: argparse.Namespace, dtype: str) -> float:
    """Return the peak of a fresh process that only loads and encodes one way, in GB."""
    command: list[Any] = [sys.executable, __file__, "--only", way, "--model-dtype", dtype, "--model", options.model]
    command += ["--num-texts", options.num_texts, "--batch-size", options.batch_size]
    command += ["--compile"] if options.compile else []
    report = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    return float(report.strip().splitlines()[-1])


def make_release(folder: Path, tokenizer: Path, shape: str) -> Path:
    """Build a release of random weights."""
    write_backbone(folder / "backbone", tokenizer, SHAPES[shape])
    building.build(str(folder / "backbone"), folder / "release", max_length=256)
    return folder / "release"


def main() -> None:
    """Print the comparison."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a release's folder (default: random weights of --shape)")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="its folder, for random weights")
    parser.add_argument("--num-texts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16, help="of the plain way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-queries", type=int, default=50, help="timed one by one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    told = "default: both on a CPU, bfloat16 on a GPU"
    parser.add_argument("--model-dtype", choices=("float32", "bfloat16"), nargs="+", help=told)
    parser.add_argument("--shape", choices=SHAPES, default="narrow", help="of the random model")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: one thread of a machine shared with others"
    )
    parser.add_argument("--compile", action="store_true", help='ours after `optimize_for("throughput")`')
    parser.add_argument("--only", choices=("plain", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options.model = options.model or make_release(Path(scratch), options.tokenizer, options.shape)
        for dtype in options.model_dtype or (["float32", "bfloat16"] if options.device == "cpu" else ["bfloat16"]):
            model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=getattr(torch, dtype))
            measure(model.to(options.device), options, dtype)


def measure(model: Any, options: argparse.Namespace, dtype: str) -> None:
    """Measure a model in one dtype, or with --only run one way and say what memory it took."""
    texts = mixed_texts(options.num_texts)
    fast = model
    if options.compile and options.only != "plain":
        fast = model if options.only else copy.deepcopy(model)  # a copy would count as memory
        fast.optimize_for("throughput")
    ways = {"plain": lambda: plain_way(model, texts, options.batch_size), "ours": lambda: our_way(fast, texts)}
    if options.only:
        ways[options.only]()
        print(peak_resident())
        return
    peak = report(model, texts, ways, options, dtype)
    report_one_query(fast, options, peak)


def report(
    model: Any, texts: list[str], ways: dict[str, Callable[[], Any]], options: argparse.Namespace, dtype: str
) -> float:
    """Time both ways in turn, compare their results, print the table; returns the FLOP/s of a large product."""
    device = options.device
    tokens = sum(map(len, model.texts.tokenize(texts, False)))
    results = {name: way() for name, way in ways.items()}  # warms up, too
    cosine = (results["plain"][0] * results["ours"][0]).sum(dim=-1).min()
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks = []
    for _ in range(options.rounds):  # in turn, so that a machine that slows down slows all of them
        for name, way in ways.items():
            times[name].append(seconds(way, device, options.clock))
        peaks.append(matmul_rate(model.dtype, device, times["ours"][-1] / 2, clock=options.clock))
    middle = {name: statistics.median(values) for name, values in times.items()}
    needed = needed_flops(model, texts)
    share = statistics.median(needed / took / peak for took, peak in zip(times["ours"], peaks, strict=True))
    speed = statistics.median(a / b for a, b in zip(times["plain"], times["ours"], strict=True))
    count = sum(weight.numel() for weight in model.parameters())
    unit = arithmetic_unit(model.dtype, device)
    print(f"{describe(device)}; {options.clock} time; {count / 1e6:.1f}M parameters, {dtype}{unit and f' on {unit}'}")
    print(f"{len(texts)} passages, {tokens} tokens (mean {tokens / len(texts):.0f}); {options.rounds} rounds, medians")
    print(f"least cosine of the two ways' dense vectors: {cosine:.6f}")
    memory = {}
    for name in ways:
        if device == "cpu":
            memory[name] = peak_memory(name, options, dtype)
        else:
            torch.cuda.reset_peak_memory_stats()
            ways[name]()
            memory[name] = torch.cuda.max_memory_allocated() / 1e9
        print(f"{name:>6}: {tokens / middle[name]:>9.0f} tokens/s  {memory[name]:.2f} GB at the peak")
    size = memory["ours"] / memory["plain"]
    print(f"ours / plain: {speed:.2f} x the speed, {size:.2f} x the memory")
    rate = statistics.median(peaks)
    print(f"matmul peak {rate / 1e9:.0f} GFLOP/s (2048 x 2048, same rounds); the needed arithmetic runs at {share:.0%}")
    return rate


def timed_within(place: Any, name: str, took: dict[str, float], options: argparse.Namespace) -> None:
    """Have a method note how long its last call took, under its name."""
    method = getattr(place, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        start = now(options.device, options.clock)
        result = method(*arguments, **named)
        took[name] = now(options.device, options.clock) - start
        return result

    setattr(place, name, noted)


def report_one_query(model: Any, options: argparse.Namespace, peak: float) -> None:
    """Time one query after the other, and within each what the layers take, and what the host does around them."""
    numbers, took = random.Random(1), dict[str, float]()
    for place, name in ((model, "states_at"), (model, "encode_prepared"), (model.texts, "prepare")):
        timed_within(place, name, took, options)
    times: dict[str, list[float]] = {}
    for _ in range(options.num_queries + 3):
        query = [" ".join(numbers.choices(WORDS, k=10))]  # another one each time: nothing is remembered
        for way, compute_sparse in (("dense", False), ("both", True)):
            encode = partial(model.encode_texts, query, True, compute_sparse=compute_sparse)
            whole = seconds(encode, options.device, options.clock)
            parts = {"all": whole, "layers": took["states_at"], "tokeniser and prompt": took["prepare"]}
            parts["packing, norms, checks"] = took["encode_prepared"] - took["states_at"]
            parts["batches, threads, order"] = whole - took["encode_prepared"] - took["prepare"]
            for name, value in parts.items():
                times.setdefault(f"{way} {name}", []).append(1000 * value)
    middle = {name: statistics.median(values[3:]) for name, values in times.items()}  # the first ones warm up
    whole, more = middle.pop("dense all"), middle["both all"]
    limit = 1000 * needed_flops(model, query, is_query=True) / peak
    length = len(model.texts.tokenize(query, True)[0])
    print(f"one query of {length} tokens, dense: {whole:.2f} ms; at the matmul peak {limit:.2f} ms")
    for name, value in middle.items():
        if name.startswith("dense"):
            print(f"  {name.removeprefix('dense '):<26} {value:7.2f} ms  {value / whole:4.0%}")
    content = middle["both tokeniser and prompt"] - middle["dense tokeniser and prompt"]
    print(f"  its sparse vector as well: {more - whole:.2f} ms more, of which its content words {content:.2f} ms\n")


if __name__ == "__main__":
    main()
