"""Encoding and search latency of the paper's four methods, on backbones of one size (paper App. B.2, Fig. 1 and 8).

One random backbone is read in four ways: bidirectionally with masks (DiffRetriever) and without (DiffEmbed), under the
causal mask once (RepLLaMA) and word by word (PromptReps), which here never ends before its cap, as the vectors cost the
same whatever the words are. One query at a time; its text has the given number of tokens, and what the method puts
around it comes on top. Search is exact, over random vectors.

python benchmarks/latency.py --json latency.json && diffretriever plot latency --input latency.json --output latency.png
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hardware import CLOCKS, describe  # noqa: E402
from random_backbone import TOKENIZER, Shape, write_backbone  # noqa: E402
from storage import SYSTEMS, latency_ms, random_vectors  # noqa: E402
from transformers import AutoModel, LlamaForCausalLM  # noqa: E402

from diffretriever.baselines.configuration import BaselineConfig  # noqa: E402
from diffretriever.baselines.diffembed import DiffEmbed  # noqa: E402
from diffretriever.baselines.promptreps import PromptReps  # noqa: E402
from diffretriever.baselines.repllama import RepLLaMA  # noqa: E402
from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.publishing import build as building  # noqa: E402

SHAPES = {
    "tiny": Shape(2, 32, 64, 2, 2048),
    "small": Shape(32, 256, 768, 4),  # LLaDA-8B with every width divided by 16
    "medium": Shape(16, 1024, 3072, 16),
    "8b": Shape(32, 4096, 12288, 32),  # LLaDA-8B
}
CAPS = (1, 4, 20)  # vectors of a query: PromptReps' caps fine-tuned and zero-shot, and as many masks
PROMPT_ROOM = 512  # tokens


@dataclass(frozen=True)
class System:
    """A method with its number of vectors, and how its model is told that number and a length."""

    method: str
    vectors: int
    model: Any
    settle: Callable[[int], None]

    @property
    def name(self) -> str:
        """What pictures and tables call it."""
        return self.method if self.method in ("RepLLaMA", "DiffEmbed") else f"{self.method}, K = {self.vectors}"

    @property
    def passes(self) -> int:
        """Forward passes of the backbone, one after the other."""
        return self.vectors if self.method == "PromptReps" else 1


def causal_twin(diffretriever: Any) -> Any:
    """Return a causal language model with the very weights of a DiffRetriever's backbone."""
    config = diffretriever.config.backbone_config
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    state = {f"model.{name}": weight for name, weight in diffretriever.backbone.state_dict().items()}
    state |= {f"lm_head.{name}": weight for name, weight in diffretriever.lm_head.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    twin.model.rotary_emb = diffretriever.backbone.rotary_emb  # its buffer is in no state dict
    return twin.eval()


def systems_of(diffretriever: Any) -> list[System]:
    """Return all methods on one backbone."""
    causal, tokenizer = causal_twin(diffretriever), diffretriever.tokenizer

    def with_masks(masks: int) -> System:
        def settle(tokens: int) -> None:
            diffretriever.config.num_query_masks, diffretriever.config.query_length = masks, tokens

        return System("DiffRetriever", masks, diffretriever, settle)

    def baseline(kind: Any, backbone: Any, vectors: int = 1) -> System:
        model = kind(BaselineConfig(kind.__name__.lower(), "random", num_query_vectors=vectors), backbone, tokenizer)
        if vectors > 1:
            model.stops.zero_()

        def settle(tokens: int) -> None:
            model.config.query_length = PROMPT_ROOM
            around = len(model.tokenize([""], is_query=True)[0][0]) if kind is RepLLaMA else 0  # which it counts, too
            model.config.query_length = around + tokens

        return System(kind.__name__, vectors, model, settle)

    return [
        *(with_masks(masks) for masks in CAPS),
        *(baseline(PromptReps, causal, cap) for cap in CAPS),
        baseline(RepLLaMA, causal),
        baseline(DiffEmbed, diffretriever),
    ]


def random_text(tokens: int) -> str:
    """Return a text of at least so many tokens, to be cut to them."""
    numbers = random.Random(tokens)
    return " ".join("".join(numbers.choices(string.ascii_lowercase, k=5)) for _ in range(tokens))


def encoding_latency(systems: Sequence[System], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time encoding one query, every system in every round, so that a machine that slows down slows all of them.

    Returns:
        {"system", "method", "num_vectors", "passes", "tokens", "latency_ms"} for each system and length; medians.
    """
    points = []
    for tokens in options.lengths:
        text = random_text(tokens)
        took: list[list[float]] = [[] for _ in systems]
        for one in range(options.rounds + 1):
            for system, times in zip(systems, took, strict=True):
                system.settle(tokens)
                ids, mask = (tensor.to(options.device) for tensor in system.model.tokenize([text], is_query=True))
                start = now(options)
                vectors = system.model.encode(ids, mask, is_query=True).repr_hidden
                spent = now(options) - start
                if vectors.shape[1] != system.vectors:
                    raise RuntimeError(f"{system.name} returned {vectors.shape[1]} vectors.")
                if one:  # the first round warms up
                    times.append(spent)
        for system, times in zip(systems, took, strict=True):
            point = {"system": system.name, "method": system.method, "num_vectors": system.vectors}
            point |= {"passes": system.passes, "tokens": tokens, "latency_ms": 1000 * statistics.median(times)}
            points.append(point)
    return points


def now(options: argparse.Namespace) -> float:
    """Return the time in seconds when the device has done all that it was given."""
    if options.device != "cpu":
        torch.accelerator.synchronize()
    return CLOCKS[options.clock]()


def search_latency(sizes: Sequence[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time exact search of one query for the paper's numbers of vectors.

    Returns:
        {"system", "num_query_vectors", "num_passage_vectors", "passages", "latency_ms"} for each; medians.
    """
    points = []
    for query_vectors, passage_vectors in SYSTEMS:
        for passages in sizes:
            generator = torch.Generator().manual_seed(passages)
            made = random_vectors(passages, passage_vectors, options.hidden_size, options.terms, generator)
            made["repr_hidden"] = made["repr_hidden"].half()
            point: dict[str, Any] = {"system": f"$K_q$ = {query_vectors}, $K_p$ = {passage_vectors}"}
            point |= {"num_query_vectors": query_vectors, "num_passage_vectors": passage_vectors}
            points.append(point | {"passages": passages, "latency_ms": latency_ms(made, query_vectors, options)})
    return points


def ratios(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return PromptReps' latency over DiffRetriever's at the same K and length, and K = 20 over 4 masks (Fig. 1)."""
    took = {(point["method"], point["num_vectors"], point["tokens"]): point["latency_ms"] for point in points}
    pairs = [(cap, masks) for cap in CAPS for masks in dict.fromkeys((cap, min(cap, 4)))]
    return [
        {
            "words": cap,
            "masks": masks,
            "tokens": tokens,
            "ratio": took["PromptReps", cap, tokens] / took["DiffRetriever", masks, tokens],
        }
        for cap, masks in pairs
        for tokens in dict.fromkeys(point["tokens"] for point in points)
    ]


def report(content: Mapping[str, Any]) -> None:
    """Print three tables: encoding, ratios, search."""
    lengths = list(dict.fromkeys(point["tokens"] for point in content["encoding"]))
    print(f"{content['hardware']}; {content['clock']} time; {content['dtype']}; {content['backbone']}")
    print(f"{'encoding one query, ms; tokens of text':<40}" + "".join(f"{tokens:>9}" for tokens in lengths))
    for name in dict.fromkeys(point["system"] for point in content["encoding"]):
        row = [point["latency_ms"] for point in content["encoding"] if point["system"] == name]
        print(f"{name:<40}" + "".join(f"{value:9.1f}" for value in row))
    print("autoregressive / masks")
    for words, masks in dict.fromkeys((found["words"], found["masks"]) for found in content["ratios"]):
        row = [found["ratio"] for found in content["ratios"] if (found["words"], found["masks"]) == (words, masks)]
        print(f"{f'PromptReps, K = {words} / {masks} masks':<40}" + "".join(f"{value:9.1f}" for value in row))
    sizes = list(dict.fromkeys(point["passages"] for point in content["search"]))
    print(f"{'searching one query, ms; passages':<40}" + "".join(f"{size:>9,}" for size in sizes))
    for name in dict.fromkeys(point["system"] for point in content["search"]):
        row = [point["latency_ms"] for point in content["search"] if point["system"] == name]
        print(f"{name.replace('$', ''):<40}" + "".join(f"{value:9.2f}" for value in row))


def main() -> None:
    """Measure, print, write the JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="of the backbone (default: 8b on a GPU, small on a CPU)")
    parser.add_argument("--tiny", action="store_true", help="everything at a size of milliseconds, to see that it runs")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="its folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 32, 128, 256], help="tokens of text")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000], help="passages to search")
    parser.add_argument("--rounds", type=int, default=7, help="of each timing, after one that warms up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall, or processor time on a shared machine")
    parser.add_argument("--scratch", type=Path, help="folder for the backbone (default: the system's)")
    parser.add_argument("--json", type=Path, help="where to write the points")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape or ("small" if options.device == "cpu" else "8b")]
    if options.tiny:
        shape, options.lengths, options.sizes, options.rounds = SHAPES["tiny"], [4, 12], [20, 50], 1
    name = options.model_dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        write_backbone(Path(scratch) / "backbone", options.tokenizer, shape, getattr(torch, name))
        building.build(str(Path(scratch) / "backbone"), Path(scratch) / "release", max_length=PROMPT_ROOM)
        release = Path(scratch) / "release"
        model = AutoModel.from_pretrained(release, trust_remote_code=True, torch_dtype=getattr(torch, name))
        encoding = encoding_latency(systems_of(model.to(options.device)), options)
    options.hidden_size, options.terms, options.num_queries, options.top_k = shape.hidden, 1, options.rounds, 10
    content: dict[str, Any] = {"hardware": describe(options.device), "clock": options.clock}
    content |= {"dtype": name, "backbone": str(shape)}
    content |= {"encoding": encoding, "ratios": ratios(encoding), "search": search_latency(options.sizes, options)}
    report(content)
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
