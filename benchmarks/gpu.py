"""What encoding reaches of a GPU, in one command of at most ten minutes that needs neither network nor weights.

Random backbones of LLaDA-8B's and Dream-7B's shapes are made on the device. Measured, beside the hardware's own limits:
encoding at K 1, 4 and 16 with and without sparse vectors, the plain way with the head on every position, one query
against the time that reading the weights takes, memory, compiled layers, weights of 8 bits where torchao is installed,
and PromptReps at K 1, 4 and 20 (paper Fig. 1).

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
from latency import encoding_latency, random_text, ratios, systems_of  # noqa: E402
from random_backbone import Shape  # noqa: E402
from transformers import AutoModel  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.model.bidirectional_layers import compile_layers  # noqa: E402
from diffretriever.publishing import build as building  # noqa: E402

PARITY = ROOT / "tests/parity/backbones"
# The tiny checkpoint whose config and tokenizer a shape takes, and the shape; key and value heads after it.
SHAPES = {
    "LLaDA-8B": ("tiny-llada", Shape(32, 4096, 12288, 32), 32),
    "Dream-7B": ("tiny-dream", Shape(28, 3584, 18944, 28, 152_064), 4),
}
BUDGETS = (1, 4, 16)  # K
MAX_LENGTH = 256  # tokens of prompt and text
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
    return sum(weight.numel() * weight.element_size() for weight in model.backbone.layers.parameters())


def peak_memory(options: argparse.Namespace, work: Callable[[], Any]) -> float | None:
    """Return the GB that a call needs at its peak, the weights included; None on a CPU."""
    if options.device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 1e9


class Account:
    """The rows of the table, and the time that is left for more.

    Args:
        options: `seconds` is how much there is in all.
        peaks: of `limits`.
    """

    def __init__(self, options: argparse.Namespace, peaks: Mapping[str, Any]) -> None:
        self.options, self.peaks = options, peaks
        self.begun = time.perf_counter()
        self.rows: list[dict[str, Any]] = []

    def out_of_time(self) -> bool:
        """Whether what is to come is left out."""
        return time.perf_counter() - self.begun > self.options.seconds

    def encoding(self, model: Any, shape: str, way: str, texts: Sequence[str], sparse: bool) -> dict[str, Any] | None:
        """Time encoding passages; the arithmetic counted is what the vectors need, whichever way makes them."""
        if self.out_of_time():
            return None
        plain = way.startswith("plain")
        texts = list(texts)[: len(texts) // 4] if plain else list(texts)

        def work() -> Any:
            if plain:
                return plain_way(model, texts, batch_size=16)
            return model.encode_texts(texts, False, compute_sparse=sparse)

        work()  # warms up
        took = statistics.median(seconds(work, self.options.device) for _ in range(self.options.rounds))
        tokens = sum(map(len, model.texts.tokenize(texts, False)))
        row: dict[str, Any] = {"kind": "encoding", "shape": shape, "way": way, "sparse": sparse or plain}
        row |= {"masks": model.config.num_passage_masks, "tokens_per_second": tokens / took, "tokens": tokens}
        row["share_of_peak"] = needed_flops(model, texts) / took / self.peaks["flops"]
        row["peak_gb"] = peak_memory(self.options, work)
        self.rows.append(row)
        return row

    def one_query(self, model: Any, shape: str, way: str) -> None:
        """Time one query after the other, beside the time in which its weights can be read."""
        if self.out_of_time():
            return
        times, text = [], [random_text(16)]
        for _ in range(self.options.queries + 3):
            times.append(seconds(lambda: model.encode_texts(text, True, compute_sparse=False), self.options.device))
        times = sorted(times[3:])  # the first ones warm up
        row: dict[str, Any] = {"kind": "one query", "shape": shape, "way": way, "masks": model.config.num_query_masks}
        row |= {"p50_ms": 1000 * statistics.median(times), "p99_ms": 1000 * times[int(0.99 * (len(times) - 1))]}
        row["limit_ms"] = 1000 * weight_bytes(model) / self.peaks["bytes"]
        self.rows.append(row)


def measure_shape(account: Account, shape: str, scratch: Path) -> None:
    """Fill in all rows of one shape."""
    options = account.options
    model, texts = random_model(shape, options, scratch), mixed_texts(options.num_texts)
    for masks in BUDGETS:
        model.config.num_passage_masks = model.config.num_query_masks = masks
        for sparse in (False, True):
            account.encoding(model, shape, "ours", texts, sparse)
        account.one_query(model, shape, "ours")
    model.config.num_passage_masks = model.config.num_query_masks = 4
    account.encoding(model, shape, "plain, head everywhere", texts, True)
    if shape == "LLaDA-8B" and not account.out_of_time():
        chosen = systems_of(model)[:6]  # DiffRetriever's and PromptReps' three budgets
        timing = argparse.Namespace(lengths=[32], rounds=options.rounds, device=options.device, clock="wall")
        points = encoding_latency(chosen, timing)
        account.rows += [{"kind": "one query by words", "shape": shape} | point for point in points]
        account.rows += [{"kind": "words / masks", "shape": shape} | ratio for ratio in ratios(points)]
        model.config.num_query_masks, model.config.query_length = 4, None
    if options.compile:
        compile_layers(model)
        account.encoding(model, shape, "compiled", texts, True)
        account.one_query(model, shape, "compiled")
    if find_spec("torchao") is not None and options.weights and not account.out_of_time():
        reduced(account, model, shape, texts)


def reduced(account: Account, model: Any, shape: str, texts: Sequence[str]) -> None:
    """Measure weights of 8 bits, and how far the vectors turn from those of the whole weights."""
    from torchao import quantization

    settings = {
        "int8": quantization.Int8WeightOnlyConfig,
        "fp8": quantization.Float8DynamicActivationFloat8WeightConfig,
    }
    few = list(texts)[:64]
    before = model.encode_texts(few, False, compute_sparse=False).repr_hidden
    quantization.quantize_(model.backbone.layers, settings[account.options.weights]())
    row = account.encoding(model, shape, f"weights of {account.options.weights}", texts, True)
    account.one_query(model, shape, f"weights of {account.options.weights}")
    if row is not None:
        after = model.encode_texts(few, False, compute_sparse=False).repr_hidden
        row["least_cosine"] = float((before * after).sum(dim=-1).min())


def report(content: Mapping[str, Any]) -> None:
    """Print what was measured."""
    peaks = content["limits"]
    print(f"{content['hardware']}; {content['dtype']}")
    promised, reached = (f"{peaks[name] / 1e12:.3g} TFLOP/s" for name in ("flops", "measured_flops"))
    read, copied = (f"{peaks[name] / 1e9:.3g} GB/s" for name in ("bytes", "measured_bytes"))
    print(
        f"limits ({peaks['from']}): {promised}, {read}; a matmul of {peaks['width']} reaches {reached}, a copy {copied}"
    )
    for row in content["rows"]:
        name = f"{row['shape']:<10} {row.get('way', row.get('system', '')):<24} K={row.get('masks', ''):<3}"
        if row["kind"] == "encoding":
            memory = "" if row["peak_gb"] is None else f"  {row['peak_gb']:.1f} GB"
            cosine = f"  least cosine {row['least_cosine']:.4f}" if "least_cosine" in row else ""
            what = f"{'sparse' if row['sparse'] else 'dense':<7}{row['tokens_per_second']:>9,.0f} tokens/s"
            print(f"{name} {what}  {row['share_of_peak']:>5.1%} of the peak{memory}{cosine}")
        elif row["kind"] == "one query":
            over = row["p50_ms"] / row["limit_ms"]
            times = f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms"
            print(f"{name} one query: {times}; the weights' reading {row['limit_ms']:.2f} ms ({over:.1f} times)")
        elif row["kind"] == "one query by words":
            print(f"{row['shape']:<10} {row['system']:<24} {row['latency_ms']:>9.2f} ms a query")
        else:
            print(f"{row['shape']:<10} PromptReps of {row['words']} / {row['masks']} masks: {row['ratio']:.1f} times")
    if content["cut_short"]:
        print("the time was over before all was measured; give more --seconds")


def main() -> None:
    """Measure, print, write the JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="everything at a size of milliseconds, to see that it runs")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES), help="of the backbones")
    parser.add_argument("--num-texts", type=int, default=1024, help="passages")
    parser.add_argument("--queries", type=int, default=100, help="timed one by one")
    parser.add_argument("--rounds", type=int, default=2, help="of each timing, after one that warms up")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing more is begun")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled layers, too")
    parser.add_argument("--weights", choices=("int8", "fp8"), help="weights of 8 bits, too, by torchao")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    options.dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    if options.tiny:
        options.num_texts, options.queries, options.rounds, options.compile = 8, 3, 1, False
    account = Account(options, limits(options))
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shape:
            measure_shape(account, shape, Path(scratch))
            gc.collect()
    content: dict[str, Any] = {"hardware": describe(options.device), "dtype": str(options.dtype)}
    content |= {"limits": account.peaks, "rows": account.rows, "cut_short": account.out_of_time()}
    report(content)
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
