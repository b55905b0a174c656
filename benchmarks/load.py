"""How long loading takes and what memory it peaks at: a sharded bfloat16 LLaDA backbone of 3.7 GB and its adapter.

python benchmarks/load.py --scratch /tmp/llada-2b
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
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModel  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.publishing import build as building  # noqa: E402

LAYERS, HIDDEN, INNER, VOCABULARY, RANK = 24, 2048, 6144, 126_464, 16
LAYER_SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("ff_proj", "up_proj"), (INNER, HIDDEN)),
    "ff_out": (HIDDEN, INNER),
}
PARITY = ROOT / "tests/parity"


def write_backbone(folder: Path) -> None:
    """Write a random 1.8B-parameter backbone, a few layers a shard."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}

    def write(shard: str, shapes: dict[str, tuple[int, ...]]) -> None:
        state = {
            f"model.transformer.{name}.weight": (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(state, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(state, shard))

    write("model-00000.safetensors", {"wte": (VOCABULARY, HIDDEN), "ff_out": (VOCABULARY, HIDDEN), "ln_f": (HIDDEN,)})
    layer = LAYER_SHAPES | {"attn_norm": (HIDDEN,), "ff_norm": (HIDDEN,)}
    for first in range(0, LAYERS, 6):
        numbers = range(first, first + 6)
        write(
            f"model-{first + 1:05}.safetensors",
            {f"blocks.{number}.{name}": shape for number in numbers for name, shape in layer.items()},
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((PARITY / "backbones/tiny-llada/config.json").read_text())
    config |= {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 16, "n_kv_heads": 16, "mlp_hidden_size": INNER}
    config |= {"embedding_size": VOCABULARY, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((PARITY / "backbones/tiny-llada" / file).read_bytes())


def write_adapter(folder: Path) -> None:
    """Write a random adapter for it, head included, as the method's training saves one."""
    folder.mkdir(parents=True)
    targets = {f"blocks.{number}.{name}": shape for number in range(LAYERS) for name, shape in LAYER_SHAPES.items()}
    targets["ff_out"] = (VOCABULARY, HIDDEN)
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
    took = time.perf_counter() - begun
    done.set()
    watcher.join()
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    own, all_pages = peak["RssAnon"] - start["RssAnon"], peak["VmRSS"] - start["VmRSS"]
    rate = f"{took:.1f} s ({weights / 1e9 / took:.2f} GB/s)"
    print(f"transformers {transformers.__version__}: {weights / 1e9:.2f} GB of weights loaded and merged in {rate}")
    shares = f"{own / weights:.2f} x the weights in own memory, {all_pages / weights:.2f} x with file pages"
    print(f"peak over the start: {shares}")


def main() -> None:
    """Make the checkpoint if it is not there, then measure in a fresh process."""
    parser = Parser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="4 GB are written here once")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    release = options.scratch / "release"
    if options.measure:
        measure(release)
        return
    for part, write in (("backbone", write_backbone), ("adapter", write_adapter)):
        if not (options.scratch / part).is_dir():
            write(options.scratch / part)
    if not release.is_dir():
        building.build(str(options.scratch / "backbone"), release, str(options.scratch / "adapter"))
    subprocess.run([sys.executable, __file__, "--scratch", str(options.scratch), "--measure"], check=True)


if __name__ == "__main__":
    main()
