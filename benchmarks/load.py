"""How long loading takes and what memory it peaks at: a sharded bfloat16 LLaDA backbone and its adapter, to be merged.

The default has 3.7 GB; --full-size has LLaDA-8B's own shape, 16.0 GB, for a machine of 24 GB.

python benchmarks/load.py --scratch /tmp/llada-2b
python benchmarks/load.py --scratch /tmp/llada-8b --full-size
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from encode import matmul_rate, report_one_query  # noqa: E402
from hardware import describe  # noqa: E402
from random_backbone import Shape  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModel  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.publishing import build as building  # noqa: E402

SHAPES = {
    "small": Shape(4, 256, 768, 4),
    "2b": Shape(24, 2048, 6144, 16),
    "8b": Shape(32, 4096, 12288, 32),  # LLaDA-8B
}
RANK = 16
LAYERS_A_SHARD = 2
MOST = 1.15  # times the weights, at the peak
QUERIES, AT_PRODUCTS = 10, 5.0  # timed one by one, and seconds that the rate of large products is measured for
PARITY = ROOT / "tests/parity"


def layer_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return {name: (out, in)} of a layer's projections."""
    hidden, inner = shape.hidden, shape.inner
    return {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (hidden, hidden)),
        **dict.fromkeys(("ff_proj", "up_proj"), (inner, hidden)),
        "ff_out": (hidden, inner),
    }


def write_backbone(folder: Path, shape: Shape) -> None:
    """Write a random backbone, a shard at a time, so that it may be larger than the memory."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}

    def write(shapes: dict[str, tuple[int, ...]]) -> None:
        shard = f"model-{len(set(weight_map.values())):05}.safetensors"
        state = {
            f"model.transformer.{name}.weight": torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, size in shapes.items()
        }
        save_file(state, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(state, shard))

    hidden, vocabulary = shape.hidden, shape.vocabulary
    write({"wte": (vocabulary, hidden)})
    write({"ff_out": (vocabulary, hidden), "ln_f": (hidden,)})
    layer = layer_shapes(shape) | {"attn_norm": (hidden,), "ff_norm": (hidden,)}
    for first in range(0, shape.layers, LAYERS_A_SHARD):
        numbers = range(first, min(first + LAYERS_A_SHARD, shape.layers))
        write({f"blocks.{number}.{name}": size for number in numbers for name, size in layer.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((PARITY / "backbones/tiny-llada/config.json").read_text())
    config |= {"d_model": hidden, "n_layers": shape.layers, "n_heads": shape.heads, "n_kv_heads": shape.heads}
    config |= {"mlp_hidden_size": shape.inner, "embedding_size": vocabulary, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((PARITY / "backbones/tiny-llada" / file).read_bytes())


def write_adapter(folder: Path, shape: Shape) -> None:
    """Write a random adapter for it, head included, as the method's training saves one."""
    folder.mkdir(parents=True)
    layer = layer_shapes(shape)
    targets = {f"blocks.{number}.{name}": size for number in range(shape.layers) for name, size in layer.items()}
    targets["ff_out"] = (shape.vocabulary, shape.hidden)
    state = {}
    for name, (rows, columns) in targets.items():
        key = f"base_model.model.model.transformer.{name}"
        state[f"{key}.lora_A.weight"] = torch.randn(RANK, columns) * 0.01
        state[f"{key}.lora_B.weight"] = torch.randn(rows, RANK) * 0.01
    save_file(state, folder / "adapter_model.safetensors")
    for file in ("adapter_config.json", "retriever_config.json"):
        (folder / file).write_bytes((PARITY / "adapters/llada-single" / file).read_bytes())


def resident() -> dict[str, int]:
    """Return this process's resident bytes: memory of its own, and file pages that the system can drop."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmRSS")}


def measure(release: Path) -> None:
    """Load the release in this fresh process, watching its memory, and print what it took."""
    start = resident()
    peak, done = dict(start), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            for name, size in resident().items():
                peak[name] = max(peak[name], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    model = AutoModel.from_pretrained(release, trust_remote_code=True, torch_dtype=torch.bfloat16)
    took, loaded = time.perf_counter() - begun, dict(peak)
    model.encode_texts(["what are tides"], is_query=True)
    first = time.perf_counter() - begun
    done.set()
    watcher.join()
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    rate = f"{took:.1f} s ({weights / 1e9 / took:.2f} GB/s)"
    print(f"{describe('cpu')}; transformers {transformers.__version__}")
    print(f"{weights / 1e9:.2f} GB of weights loaded and merged in {rate}; first vector after {first:.1f} s")
    for when, sizes in (("loaded", loaded), ("with the first query", peak)):
        own, pages = (sizes[name] - start[name] for name in ("RssAnon", "VmRSS"))
        shares = f"{own / weights:.2f} x the weights in own memory, {pages / weights:.2f} x with file pages"
        print(f"peak over the start, {when}: {shares} ({'at most' if own <= MOST * weights else 'ABOVE'} {MOST} x)")
    one = argparse.Namespace(device="cpu", num_queries=QUERIES, clock="wall")
    report_one_query(model, one, matmul_rate(model.dtype, "cpu", AT_PRODUCTS))


def main() -> None:
    """Make the checkpoint if it is not there, then measure in a fresh process."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--scratch", type=Path, required=True, help="4 GB are written here once; 17 GB with --full-size"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full-size", dest="shape", action="store_const", const="8b", default="2b")
    size.add_argument("--shape", choices=SHAPES, default="2b", help="of the backbone; one scratch folder holds one")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    release = options.scratch / "release"
    if options.measure:
        measure(release)
        return
    for part, write in (("backbone", write_backbone), ("adapter", write_adapter)):
        if not (options.scratch / part).is_dir():
            write(options.scratch / part, SHAPES[options.shape])
    if not release.is_dir():
        building.build(str(options.scratch / "backbone"), release, str(options.scratch / "adapter"))
    subprocess.run([sys.executable, __file__, "--scratch", str(options.scratch), "--measure"], check=True)


if __name__ == "__main__":
    main()
