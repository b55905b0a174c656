"""What weights of 8 bits cost: the vectors' cosine to those of float32, and nDCG@10, on a part of a benchmark.

By torchao, the layers' weights with a scale a row. "int8" and "fp8" also round what they are multiplied by (fp8 on a
GPU alone); "int8-stored" and "fp8-stored" are widened before they are multiplied, and so save memory, not time.

pip install -e ".[torchao]"
python benchmarks/weights.py --model RELEASE --data FOLDER
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hardware import arithmetic_unit, describe  # noqa: E402
from transformers import AutoModel  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.evaluation.small_task import read_small_task  # noqa: E402

KINDS = ("bfloat16", "int8", "int8-stored", "fp8", "fp8-stored")


def quantize(layers: Any, kind: str) -> None:
    """Replace the layers' weights by torchao's of 8 bits.

    Args:
        layers: of a backbone, on the device where they will run.
        kind: of KINDS, but bfloat16.
    """
    from torchao import quantization

    configs: Any = {
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
        "int8-stored": quantization.Int8WeightOnlyConfig,
        "fp8": quantization.Float8DynamicActivationFloat8WeightConfig,
        "fp8-stored": quantization.Float8WeightOnlyConfig,
    }
    options: Any = {"version": 2, "set_inductor_config": False}
    if kind != "fp8-stored":  # which knows of rows alone
        options["granularity"] = quantization.PerRow()
    quantization.quantize_(layers, configs[kind](**options))


def main() -> None:
    """Print a line for each kind of weights."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="a release: folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="a benchmark in BEIR's layout")
    parser.add_argument("--split", default="test")
    parser.add_argument("--num-passages", type=int, default=600, help="those judged and the first others")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=[kind for kind in KINDS if kind != "fp8"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    task = read_small_task(options.data, options.split, options.num_passages)
    texts = list(task.passages.values())
    plain = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=torch.float32).to(options.device)
    whole = plain.encode_texts(texts, False).repr_hidden
    print(f"{describe(options.device)}, {arithmetic_unit(torch.bfloat16, options.device)}; {Path(options.model).name}")
    print(f"{len(task.benchmark.queries)} queries, {len(texts)} passages of {options.data.name}; nDCG@10")
    for kind in ("float32", *options.kinds):
        model = plain if kind == "float32" else copy.deepcopy(plain).to(torch.bfloat16)
        if kind not in ("float32", "bfloat16"):
            quantize(model.backbone.layers, kind)
        start = time.perf_counter()
        found = model.encode_texts(texts, False)
        took = time.perf_counter() - start
        cosines = (found.repr_hidden * whole).sum(dim=-1)
        searcher, queries = task.searcher(found), model.encode_texts(list(task.benchmark.queries.values()), True)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in task.ndcg(task.runs(searcher, queries)).items())
        print(f"{kind:<12} cosine {cosines.mean():.5f}, least {cosines.min():.5f}; {figures}; {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
