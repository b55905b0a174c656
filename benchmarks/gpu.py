"""What encoding reaches of a GPU, in one command of at most ten minutes that needs neither network nor weights.

Random backbones of LLaDA-8B's and Dream-7B's shapes are made on the device. Measured, beside the hardware's own limits:
encoding at K 1, 4 and 16 with and without sparse vectors, the plain way with the head on every position, one query
against the time that reading the weights takes, memory, PromptReps at K 1, 4 and 20 (paper Fig. 1), what `optimize_for`
makes of it with and without torch.compile, and weights of 8 bits where torchao is installed.

Encoding is measured on 2,560 passages, of which the first 512 are prepared while the GPU waits and padded more, as at
the beginning of each corpus. Seconds on an H200, LLaDA-8B: 5 to begin, 15 for each row of encoding as loaded, 30 for
queries and words, 60 for the first row of compiled layers and 12 for the others, 60 for each kind of 8 bits. Each row
is printed, and written to the JSON, when it is there; a row that fails says why and the others go on; the exit code
then is 1.

python benchmarks/gpu.py --json gpu.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from encode import matmul_rate, mixed_texts, needed_flops, plain_way, seconds  # noqa: E402
from hardware import describe  # noqa: E402
from latency import encoding_latency, ratios, systems_of  # noqa: E402
from random_backbone import Shape  # noqa: E402
from transformers import AutoModel  # noqa: E402
from weights import quantize  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.publishing import build as building  # noqa: E402

PARITY = ROOT / "tests/parity/backbones"
# The tiny checkpoint whose config and tokenizer a shape takes, and the shape; key and value heads after it.
SHAPES = {
    "LLaDA-8B": ("tiny-llada", Shape(32, 4096, 12288, 32), 32),
    "Dream-7B": ("tiny-dream", Shape(28, 3584, 18944, 28, 152_064), 4),
}
MAX_LENGTH = 256  # tokens of prompt and text
QUERY = "light from water systems and sun energy"
FIRST_SHARE = 0.65  # of the time, after which the first shape begins no more rows
# Dense bfloat16 FLOP/s and bytes/s by the vendor's data sheet; the first name that the device's contains.
DATA_SHEETS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "B200": (2250e12, 8.0e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100": (312e12, 1.56e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
    "A10": (125e12, 0.6e12),
    "4090": (165e12, 1.01e12),
}


def limits(options: argparse.Namespace) -> dict[str, float | str]:
    """Return FLOP/s and bytes/s that the device promises, or where nothing is known of it, those that it reaches."""
    size = 2**16 if options.tiny else 2**30
    source = torch.zeros(size, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    target.copy_(source)
    took = min(seconds(lambda: target.copy_(source), options.device) for _ in range(5))
    width = 256 if options.tiny else 8192
    for least_seconds in (0.0, 0.01 if options.tiny else 2.0):  # the first one warms up
        flops = matmul_rate(options.dtype, options.device, least_seconds, width)
    found: dict[str, Any] = {"measured_flops": flops, "width": width, "measured_bytes": 2 * size / took}
    name = torch.cuda.get_device_name(options.device) if options.device != "cpu" else ""
    sheet = next((values for part, values in DATA_SHEETS.items() if part in name), None)
    found["flops"], found["bytes"] = sheet or (found["measured_flops"], found["measured_bytes"])
    return found | {"from": "data sheet" if sheet else "measured"}


def random_model(name: str, options: argparse.Namespace, scratch: Path) -> Any:
    """Make a DiffRetriever of random weights on the device, with the tokenizer of a tiny checkpoint."""
    tiny, shape, key_value_heads = SHAPES[name]
    release = scratch / tiny
    if not release.is_dir():
        building.build(str(PARITY / tiny), release, max_length=MAX_LENGTH)
    pattern = AutoModel.from_pretrained(release, trust_remote_code=True)
    config = copy.deepcopy(pattern.config)
    if not options.tiny:
        config.backbone_config.update(
            {
                "num_hidden_layers": shape.layers,
                "hidden_size": shape.hidden,
                "intermediate_size": shape.inner,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": key_value_heads,
                "head_dim": shape.hidden // shape.heads,
                "vocab_size": shape.vocabulary,
            }
        )
        if getattr(config.backbone_config, "layer_types", None):
            config.backbone_config.layer_types = ["full_attention"] * shape.layers
    torch.manual_seed(0)
    torch.set_default_dtype(options.dtype)
    try:
        with torch.device(options.device):
            model = type(pattern)(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.tokenizer = pattern.tokenizer
    return model.eval()


def weight_bytes(model: Any) -> int:
    """Return what one forward pass reads of the weights: the layers', without embedding and head."""
    return sum(weight.numel() * bytes_of(weight) for weight in model.backbone.layers.parameters())


def bytes_of(weight: torch.Tensor) -> int:
    """Return the bytes of a weight's entry: one of torchao's, which say the dtype that they stand for."""
    return weight.element_size() if type(weight) is torch.nn.Parameter else 1


class Account:
    """The rows of the table, and the time that is left for more.

    Args:
        options: `seconds` is how much there is in all.
        peaks: of `limits`.
    """

    def __init__(self, options: argparse.Namespace, peaks: Mapping[str, Any]) -> None:
        self.options, self.peaks = options, peaks
        self.begun = time.perf_counter()
        self.share = 1.0  # of the time, for the shape at hand
        self.compiled: set[tuple[str, str]] = set()  # shape and way
        self.content: dict[str, Any] = {"hardware": describe(options.device), "dtype": str(options.dtype)}
        self.content |= {"limits": peaks, "rows": [], "left_out": []}

    def add(self, kind: str, shape: str, way: str, fill: Callable[[dict[str, Any]], None], **more: Any) -> bool:
        """Have a row filled in, and print and write it; what fails is a row that says why, so that the others go on.

        Returns:
            Whether the row is there, whole.
        """
        row: dict[str, Any] = {"kind": kind, "shape": shape, "way": way} | more
        begun = time.perf_counter()
        if begun - self.begun > self.share * self.options.seconds:
            self.content["left_out"].append(row)
            print(f"{shape:<10} {way:<30} left out: the time is over", flush=True)
            return False
        try:
            fill(row)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs in the table
            row["failed"] = f"{type(error).__name__}: {str(error)[:2000]}"
            if self.options.device != "cpu":
                torch.cuda.empty_cache()
        row["seconds"] = time.perf_counter() - begun
        self.content["rows"].append(row)
        print(words_of(row), flush=True)
        if self.options.json:
            self.options.json.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        return "failed" not in row

    def encoding(self, model: Any, shape: str, way: str, texts: Sequence[str], masks: int, sparse: bool) -> None:
        """Time encoding passages; the arithmetic counted is what the vectors need, whichever way makes them."""
        plain = way.startswith("plain")
        texts = list(texts)[: len(texts) // 8] if plain else list(texts)
        device = self.options.device

        def work(texts: Sequence[str] = texts) -> Any:
            if plain:
                return plain_way(model, list(texts), batch_size=16)
            return model.encode_texts(texts, False, compute_sparse=sparse)

        def fill(row: dict[str, Any]) -> None:
            model.config.num_passage_masks = model.config.num_query_masks = masks
            codes, compiles = compiled_codes(), "compiled" in way and (shape, way) not in self.compiled
            self.compiled.add((shape, way))  # for all batches; masks and sparse vectors come behind the layers
            row["first_seconds"] = seconds(work if compiles else lambda: work(texts[:64]), device)
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            took = statistics.median(seconds(work, device) for _ in range(self.options.rounds))
            tokens = sum(map(len, model.texts.tokenize(texts, False)))
            row |= {"tokens_per_second": tokens / took, "tokens": tokens, "compiled_codes": compiled_codes() - codes}
            row["share_of_peak"] = needed_flops(model, texts) / took / self.peaks["flops"]
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else None

        self.add("encoding", shape, way, fill, masks=masks, sparse=sparse)

    def one_query(self, model: Any, shape: str, way: str, masks: int = 4) -> None:
        """Time one query after the other, beside the time in which its weights can be read."""
        device = self.options.device

        def work() -> Any:
            return model.encode_texts([QUERY], True, compute_sparse=False)

        def fill(row: dict[str, Any]) -> None:
            model.config.num_passage_masks = model.config.num_query_masks = masks
            codes = compiled_codes()
            row["first_seconds"] = seconds(work, device)
            ids = model.tokenize([QUERY], True)[0]
            positions, on_device = model.texts.mask_positions(ids, True).to(device), ids.to(device)

            @torch.no_grad()
            def layers() -> Any:
                if model._recorded is not None and device != "cpu":  # what was recorded last is this query's
                    return list(model._recorded._graphs.values())[-1][2].replay()
                return model(on_device, mask_positions=positions)

            rest = 10.0 if "compiled" in way else 2.0  # torch.compile begins processes, which keep the host busy
            whole, alone = in_turn((work, layers), self.options, rest)
            row |= {"p50_ms": percentile(whole, 50), "p99_ms": percentile(whole, 99)}
            row |= {"layers_p50_ms": percentile(alone, 50), "layers_p99_ms": percentile(alone, 99)}
            row |= {"tokens": ids.shape[1], "compiled_codes": compiled_codes() - codes}
            row["limit_ms"] = 1000 * weight_bytes(model) / self.peaks["bytes"]

        self.add("one query", shape, way, fill, masks=masks)


def in_turn(works: Sequence[Callable[[], Any]], options: argparse.Namespace, rest: float) -> list[list[float]]:
    """Return the milliseconds of many calls of each, in turn, after seconds in which clocks and processes rest."""
    taken: list[list[float]] = [[] for _ in works]
    settled = time.perf_counter() + (0.0 if options.tiny else rest)
    while time.perf_counter() < settled:
        for work in works:
            seconds(work, options.device)
    for _ in range(options.num_queries):
        for work, times in zip(works, taken, strict=True):
            times.append(1000 * seconds(work, options.device))
    return taken


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value below which so many per cent are."""
    return sorted(values)[round(percent / 100 * (len(values) - 1))]


def compiled_codes() -> int:
    """Return how often torch.compile has written code in this process: once a layer would be too often."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure_shape(account: Account, shape: str, scratch: Path) -> None:
    """Fill in all rows of one shape; those after the first one's are fewer."""
    options, whole = account.options, shape == account.options.shape[0]
    account.share = FIRST_SHARE if whole and len(options.shape) > 1 else 1.0
    texts, made = mixed_texts(options.num_texts), []

    def fill(row: dict[str, Any]) -> None:
        made.append(random_model(shape, options, scratch))
        row["weights_gb"] = sum(weight.numel() * weight.element_size() for weight in made[0].parameters()) / 1e9

    if not account.add("model", shape, "random weights", fill):
        return
    model = made.pop()
    products(account, model, shape)
    budgets = options.budgets if whole else options.budgets[:1]
    for masks in budgets:
        for sparse in (False, True):
            account.encoding(model, shape, "as loaded", texts, masks, sparse)
    for masks in budgets:
        account.one_query(model, shape, "as loaded", masks)
    account.encoding(model, shape, "plain, head everywhere", texts, 4, True)
    if whole:
        by_words(account, model, shape)
    model.optimize_for("latency", compiled=False)
    account.one_query(model, shape, "recorded")
    if options.compile:
        model.optimize_for("latency")
        account.one_query(model, shape, "recorded, compiled")
        model.optimize_for("throughput")
        for masks in budgets:
            for sparse in (True, False):
                account.encoding(model, shape, "compiled", texts, masks, sparse)
    for weights in options.weights if whole else options.weights[:1]:
        reduced(account, model, shape, texts, weights)


def products(account: Account, model: Any, shape: str) -> None:
    """Time a layer's matrix products alone, at as many tokens as a batch has: what is left for all else to take."""
    options = account.options
    parts = [part for part in model.backbone.layers[0].modules() if isinstance(part, torch.nn.Linear)]
    tokens, repeats = (64, 1) if options.tiny else (16384, 10)
    states = {
        size: torch.randn(tokens, size, dtype=options.dtype, device=options.device)
        for size in {part.in_features for part in parts}
    }

    @torch.no_grad()
    def work() -> None:
        for _ in range(repeats):
            for part in parts:
                part(states[part.in_features])

    def fill(row: dict[str, Any]) -> None:
        work()
        took = min(seconds(work, options.device) for _ in range(3))
        arithmetic = 2 * tokens * repeats * sum(part.weight.numel() for part in parts)
        row |= {"flops": arithmetic / took, "share_of_peak": arithmetic / took / account.peaks["flops"]}

    account.add("products", shape, "a layer's products alone", fill)


def by_words(account: Account, model: Any, shape: str) -> None:
    """Time PromptReps, which says its query in words, beside masks (paper Fig. 1)."""
    options = account.options

    def fill(row: dict[str, Any]) -> None:
        chosen = systems_of(model)[:6]  # DiffRetriever's and PromptReps' three budgets
        rounds = 1 if options.tiny else 5
        timing = argparse.Namespace(lengths=[32], rounds=rounds, device=options.device, clock="wall")
        row["points"] = encoding_latency(chosen, timing)
        row["ratios"] = ratios(row["points"])

    account.add("one query by words", shape, "as loaded", fill)
    model.config.query_length = None


def reduced(account: Account, model: Any, shape: str, texts: Sequence[str], weights: str) -> None:
    """Measure weights of 8 bits, and how far the vectors turn from those of the whole weights."""
    options, way = account.options, f"{weights}, compiled" if account.options.compile else weights
    layers, few = model.backbone.layers, list(texts)[:64]
    model.config.num_passage_masks = model.config.num_query_masks = 4

    def fill(row: dict[str, Any]) -> None:
        before = model.encode_texts(few, False, compute_sparse=False).repr_hidden
        model.backbone.layers = copy.deepcopy(layers)  # not compiled
        quantize(model.backbone.layers, weights)
        after = model.encode_texts(few, False, compute_sparse=False).repr_hidden
        cosines = (before * after).sum(dim=-1)
        row |= {"least_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}

    if account.add("cosine", shape, f"{weights}, beside whole weights", fill):
        torch.compiler.reset()  # of the codes for whole weights, as there may only be a few
        if weights != "int8":  # torch's product of these cannot be recorded (2.11)
            model.optimize_for("latency", compiled=options.compile)
            account.one_query(model, shape, f"{way}, recorded")
        model.optimize_for("throughput", compiled=options.compile)
        account.encoding(model, shape, way, texts, 4, True)
    model.backbone.layers = layers


def words_of(row: Mapping[str, Any]) -> str:
    """Return a row as one or a few lines of the table."""
    name = f"{row['shape']:<10} {row['way']:<30} " + (f"K={row['masks']:<3}" if "masks" in row else "     ")
    after = f"  [{row['seconds']:.0f} s]"
    if "failed" in row:
        return f"{name} FAILED: {row['failed'][:300]}{after}"
    if row["kind"] == "encoding":
        memory = "" if row["peak_gb"] is None else f"  {row['peak_gb']:.1f} GB"
        what = f"{'sparse' if row['sparse'] else 'dense':<7}{row['tokens_per_second']:>9,.0f} tokens/s"
        return f"{name} {what}  {row['share_of_peak']:>5.1%} of the peak{memory}{after}"
    if row["kind"] == "one query":
        over = row["p50_ms"] / row["limit_ms"]
        times = f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms, layers alone {row['layers_p50_ms']:.2f} ms"
        return f"{name} {times}; the weights' reading {row['limit_ms']:.2f} ms ({over:.2f} times){after}"
    if row["kind"] == "one query by words":
        lines = [f"{name} {point['system']:<24} {point['latency_ms']:>9.2f} ms a query" for point in row["points"]]
        lines += [
            f"{name} PromptReps of {ratio['words']} / {ratio['masks']} masks: {ratio['ratio']:.1f} times"
            for ratio in row["ratios"]
        ]
        return "\n".join(lines) + after
    figures = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
    return f"{name} {figures}"


def print_limits(content: Mapping[str, Any]) -> None:
    """Print the hardware and what it promises."""
    peaks = content["limits"]
    print(f"{content['hardware']}; {content['dtype']}")
    promised, reached = (f"{peaks[name] / 1e12:.3g} TFLOP/s" for name in ("flops", "measured_flops"))
    read, copied = (f"{peaks[name] / 1e9:.3g} GB/s" for name in ("bytes", "measured_bytes"))
    measured = f"a matmul of {peaks['width']} reaches {reached}, a copy {copied}"
    print(f"limits ({peaks['from']}): {promised}, {read}; {measured}", flush=True)


def main() -> int:
    """Measure, print, write the JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="everything at a size of milliseconds, to see that it runs")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES), help="of the backbones")
    told = "masks of a text, most wanted first; other shapes than the first have that alone"
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 1, 16], metavar="K", help=told)
    parser.add_argument("--num-texts", type=int, default=2560, help="passages")
    parser.add_argument("--num-queries", type=int, default=100, help="timed one by one")
    parser.add_argument("--rounds", type=int, default=1, help="of each timing, after one that warms up")
    parser.add_argument("--seconds", type=float, default=480, help="after which nothing more is begun")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile's layers, too"
    )
    parser.add_argument(
        "--weights",
        choices=("fp8", "int8"),
        nargs="*",
        help="of 8 bits, too (default: both where torchao is installed)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    options.dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    if options.weights is None:
        options.weights = ["fp8", "int8"] if find_spec("torchao") is not None and options.device != "cpu" else []
    if options.tiny:
        options.num_texts, options.num_queries = 8, 3
    account = Account(options, limits(options))
    print_limits(account.content)
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shape:
            measure_shape(account, shape, Path(scratch))
            gc.collect()
    failed = [row for row in account.content["rows"] if "failed" in row]
    print(f"{len(failed)} rows failed, {len(account.content['left_out'])} were left out")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
