"""How fast and how small encoding is, next to the plain way, in one process.

The plain way is what research code does: the same weights and layers, one padded batch after the other in the order of
arrival, the whole sequence through every layer and the head on every position. Both return the same vectors.

python benchmarks/encode.py [--shape wide]
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from hardware import describe  # noqa: E402
from random_backbone import TOKENIZER, Shape, write_backbone  # noqa: E402
from transformers import AutoModel  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.publishing import build as building  # noqa: E402

# Two shapes of 92M parameters with LLaDA's own vocabulary. "narrow" is LLaDA-8B with every width divided by 16; "wide"
# puts the same weights into fewer, larger matrices.
SHAPES = {"narrow": Shape(32, 256, 768, 4), "wide": Shape(8, 256, 4096, 4)}


def mixed_texts(count: int) -> list[str]:
    """Return passages of mixed lengths: most short, some cut at the maximum, as in MS MARCO."""
    numbers = random.Random(0)
    words = "the retrieval of light from water systems index sun energy with documents and of passages moving".split()
    lengths = [min(120, max(4, round(numbers.lognormvariate(3.4, 0.6)))) for _ in range(count)]
    return [" ".join(numbers.choices(words, k=length)) for length in lengths]


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


def matmul_rate(dtype: torch.dtype, device: str, least_seconds: float, size: int = 2048) -> float:
    """Return the FLOP/s that square matrix products keep up for a while."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    took, count = 0.0, 0
    while not took or took < least_seconds:
        took += seconds(lambda: left @ right, device)
        count += 1
    return count * 2 * size**3 / took


def seconds(work: Callable[[], Any], device: str) -> float:
    """Time one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def needed_flops(model: Any, texts: list[str]) -> float:
    """Return the arithmetic that the vectors need: layers on the real tokens, the last and the head at the masks."""
    config, num_masks = model.config.backbone_config, model.config.num_passage_masks
    key_value = 2 * 2 * config.hidden_size**2 * config.num_key_value_heads // config.num_attention_heads
    layer = key_value + 2 * (2 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    total = 0.0
    for sequence, content in zip(model.texts.tokenize(texts, False), model.content_token_ids(texts), strict=True):
        length = len(sequence)
        attention = 4 * length * config.hidden_size
        total += (config.num_hidden_layers - 1) * length * (layer + attention) + length * key_value
        total += num_masks * (layer - key_value + attention + 2 * config.hidden_size * len(content))
    return total


def peak_resident() -> float:
    """Return this process's peak resident memory in GB (getrusage would count the parent's as well)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e9


def peak_memory(way: str, options: argparse.Namespace) -> float:
    """Return the peak of a fresh process that only loads and encodes one way, in GB."""
    command = [sys.executable, __file__, "--tokenizer", str(options.tokenizer), "--only", way]
    command += [
        "--num-texts",
        str(options.num_texts),
        "--batch-size",
        str(options.batch_size),
        "--folder",
        str(options.folder),
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(report.strip().splitlines()[-1])


def load(folder: Path, tokenizer: Path, device: str, dtype: torch.dtype, shape: str = "narrow") -> Any:
    """Build the release once and load it."""
    if not (folder / "release").is_dir():
        write_backbone(folder / "backbone", tokenizer, SHAPES[shape])
        building.build(str(folder / "backbone"), folder / "release", max_length=256)
    model = AutoModel.from_pretrained(folder / "release", trust_remote_code=True, dtype=dtype)
    return model.to(device)


def main() -> None:
    """Print the comparison."""
    parser = Parser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="its folder")
    parser.add_argument("--num-texts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16, help="of the plain way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--shape", choices=SHAPES, default="narrow", help="of the random model")
    parser.add_argument("--only", choices=("plain", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = getattr(torch, options.model_dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    texts = mixed_texts(options.num_texts)
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = options.folder or Path(scratch)
        model = load(options.folder, options.tokenizer, options.device, dtype, options.shape)
        ways = {"plain": lambda: plain_way(model, texts, options.batch_size), "ours": lambda: our_way(model, texts)}
        if options.only:
            ways[options.only]()
            print(peak_resident())
            return
        report(model, texts, ways, options, dtype)


def report(
    model: Any, texts: list[str], ways: dict[str, Callable[[], Any]], options: argparse.Namespace, dtype: torch.dtype
) -> None:
    """Time both ways in turn, compare their results, print the table."""
    device = options.device
    tokens = sum(map(len, model.texts.tokenize(texts, False)))
    results = {name: way() for name, way in ways.items()}  # warms up, too
    difference = (results["plain"][0] - results["ours"][0]).abs().max()
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks = []
    for _ in range(options.rounds):  # in turn, so that a machine that slows down slows all of them
        for name, way in ways.items():
            times[name].append(seconds(way, device))
        peaks.append(matmul_rate(dtype, device, times["ours"][-1] / 2))
    middle = {name: statistics.median(values) for name, values in times.items()}
    needed = needed_flops(model, texts)
    share = statistics.median(needed / took / peak for took, peak in zip(times["ours"], peaks, strict=True))
    speed = statistics.median(a / b for a, b in zip(times["plain"], times["ours"], strict=True))
    count = sum(weight.numel() for weight in model.parameters())
    print(f"{describe(device)}; {SHAPES[options.shape]}; {count / 1e6:.1f}M parameters, {dtype}")
    print(f"{len(texts)} passages, {tokens} tokens (mean {tokens / len(texts):.0f}); {options.rounds} rounds, medians")
    print(f"largest difference of the dense vectors: {difference:.1e}")
    memory = {}
    for name in ways:
        if device == "cpu":
            memory[name] = peak_memory(name, options)
        else:
            torch.cuda.reset_peak_memory_stats()
            ways[name]()
            memory[name] = torch.cuda.max_memory_allocated() / 1e9
        print(f"{name:>6}: {tokens / middle[name]:>9.0f} tokens/s  {memory[name]:.2f} GB at the peak")
    size = memory["ours"] / memory["plain"]
    print(f"ours / plain: {speed:.2f} x the speed, {size:.2f} x the memory")
    rate = statistics.median(peaks) / 1e9
    print(f"matmul peak {rate:.0f} GFLOP/s (2048 x 2048, same rounds); the needed arithmetic runs at {share:.0%} of it")


if __name__ == "__main__":
    main()
