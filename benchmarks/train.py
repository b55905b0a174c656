"""How fast a training step is, next to what its matrix products alone would take at the same shapes.

The prediction times every product of the forward and backward pass by itself, at the step's own shapes and dtype: the
frozen projections (forward, and backward to their input), LoRA's small ones, attention's, and the output head's at the
masks. What a step takes beyond that goes to norms, activations, rotary embeddings, softmax, dropout, casts, and the
optimiser; `--account` lists it by kind of operation, from torch's profiler.

python benchmarks/train.py --model RELEASE [--num-queries 32 --negatives 1] [--bf16]

RELEASE is a zero-shot release, as `python publish.py build --base checkpoints/llada-tiny --output DIR` makes one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModel  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.data.pair_files import TrainingItem  # noqa: E402
from diffretriever.training.adapter_recipe import AdapterRecipe  # noqa: E402
from diffretriever.training.batches import Collator  # noqa: E402
from diffretriever.training.objective import ContrastiveModel, word_columns  # noqa: E402
from diffretriever.training.train import prepare_model  # noqa: E402

WORDS = "the retrieval of light from water systems index sun energy with documents and of passages moving".split()
Product = tuple[int, int, int, int]  # batch, rows, inner, columns

# Names of torch's operations, by what they are for.
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn"),
    "attention": ("scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "dropout": ("dropout", "bernoulli", "native_dropout"),
    "casts and copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::gather", "aten::index", "aten::scatter"),
    "optimiser": ("_fused_adamw", "Optimizer", "_foreach"),
}


def made_up_items(count: int, negatives: int) -> list[dict[str, Any]]:
    """Return queries of 2 to 9 words with passages of mixed lengths, as the data set draws them."""
    rng, drawn = random.Random(0), []

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    for _ in range(count):
        item = TrainingItem(text(2, 9), (text(60, 90),), tuple(text(60, 90) for _ in range(negatives)))
        drawn.append({"item": item, "positive": item.positives[0], "negatives": list(item.negatives)})
    return drawn


def projections(config: Any) -> dict[str, tuple[int, int]]:
    """Return {name: (in, out)} of a layer's seven projections."""
    hidden, inner = config.hidden_size, config.intermediate_size
    key_value = hidden * config.num_key_value_heads // config.num_attention_heads
    square, keys = (hidden, hidden), (hidden, key_value)
    shapes = {"q": square, "k": keys, "v": keys, "o": square}
    return shapes | {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}


def products_of(model: ContrastiveModel, batch: dict[str, Any]) -> Counter[Product]:
    """Count the matrix products that a forward and backward pass needs, by shape."""
    config, rank = model.retriever.config.backbone_config, model.recipe.rank
    found: Counter[Product] = Counter()
    columns = len(word_columns(batch["query_words"]))
    for side in ("query", "passage"):
        for chunk in batch[side]["chunks"]:
            texts, length = chunk["ids"].shape
            masks = chunk["positions"].shape[1]
            for layer in range(config.num_hidden_layers):
                last = layer == config.num_hidden_layers - 1
                _add_layer(found, config, rank, texts, length, masks if last else length, first=layer == 0)
            rows = texts * masks
            found[1, rows, config.hidden_size, columns] += 1
            found[1, rows, columns, config.hidden_size] += 1
    return found


def _add_layer(
    found: Counter[Product], config: Any, rank: int, texts: int, length: int, kept: int, first: bool
) -> None:
    """Add one layer; its queries and its MLP run at `kept` of the `length` positions."""
    for name, (inputs, outputs) in projections(config).items():
        rows = texts * (length if name in "kv" else kept)
        backward = not (first and name in "qkv")  # nothing below the first layer learns
        found[1, rows, inputs, outputs] += 1
        found[1, rows, outputs, inputs] += backward
        found[1, rows, inputs, rank] += 1  # LoRA: x A
        found[1, rows, rank, outputs] += 1  # (x A) B
        found[1, rank, rows, outputs] += 1  # gradient of B
        found[1, rows, outputs, rank] += 1  # gradient of x A
        found[1, rank, rows, inputs] += 1  # gradient of A
        found[1, rows, rank, inputs] += backward  # gradient of x
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    found[texts * heads, kept, width, length] += 2  # scores; gradient of the weights
    found[texts * heads, kept, length, width] += 2  # mixture; gradient of the queries
    found[texts * heads, length, kept, width] += 2  # gradients of the keys and of the values


def predict(products: Counter[Product], dtype: torch.dtype, device: str, repeat: int = 3) -> float:
    """Return the seconds that the products take one by one, by the fastest of a few tries each."""
    total = 0.0
    for (batch, rows, inner, columns), count in products.items():
        shape = (batch,) if batch > 1 else ()
        left = torch.randn(*shape, rows, inner, dtype=dtype, device=device)
        right = torch.randn(*shape, inner, columns, dtype=dtype, device=device)
        result = left @ right
        multiply = partial(torch.matmul, left, right, out=result)
        total += count * min(seconds(multiply, device) for _ in range(repeat))
    return total


def seconds(work: Callable[[], Any], device: str) -> float:
    """Time one call: by the clock, or on one CPU thread by the processor, which other programs disturb less."""
    if device != "cpu":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def account(step: Callable[[], Any]) -> dict[str, float]:
    """Return the share of each kind of operation in a step's time."""
    with torch.profiler.profile() as profile:
        step()
    spent: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), None)
        spent[kind or "norms, activations, rotary, loss and the rest"] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: value / total for kind, value in sorted(spent.items(), key=lambda entry: -entry[1])}


def prepare(options: argparse.Namespace) -> tuple[ContrastiveModel, dict[str, Any], Callable[[], None], float]:
    """Return model, batch, a function that makes one step, and the seconds that preparing the batch took."""
    recipe = AdapterRecipe(
        num_query_masks=options.num_query_masks, num_passage_masks=options.num_passage_masks,
        max_length=options.max_length,
        grad_cache_chunk=options.grad_cache_chunk, forward_texts=options.forward_texts, bf16=options.bf16,
        dropout=options.dropout, compile_layers=options.compile,
        backbone_dtype=options.backbone_dtype,
    )  # fmt: skip
    settings = {"attn_implementation": recipe.attention(), **recipe.model_settings()}
    retriever = AutoModel.from_pretrained(options.model, trust_remote_code=True, **settings)
    model = prepare_model(retriever, recipe).to(options.device).train()
    drawn = made_up_items(options.num_queries, options.negatives)
    collate = Collator(model.retriever, recipe)
    start = time.perf_counter()
    batch = to_device(collate(drawn), options.device)
    took = time.perf_counter() - start
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            loss = model(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, batch, step, took


def to_device(value: Any, device: str) -> Any:
    """Move the tensors of nested lists and dicts."""
    if isinstance(value, dict):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, list):
        return [to_device(entry, device) for entry in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def main() -> None:
    """Print tokens per second, the prediction, and the account."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="a zero-shot release")
    parser.add_argument("--num-queries", type=int, default=32)
    parser.add_argument("--negatives", type=int, default=1, help="hard negatives a query")
    parser.add_argument("--num-query-masks", type=int, default=4, help="K_q")
    parser.add_argument("--num-passage-masks", type=int, default=4, help="K_p")
    parser.add_argument("--max-length", type=int, default=120)
    parser.add_argument(
        "--grad-cache-chunk", type=int, default=0, help="a third more arithmetic, not in the prediction"
    )
    parser.add_argument("--forward-texts", type=int, default=0, help="texts read at once (0: a whole side)")
    parser.add_argument("--dropout", type=float, default=0.05, help="LoRA's")
    parser.add_argument("--compile", action="store_true", help="torch.compile each layer")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument(
        "--backbone-dtype",
        choices=["float32", "bfloat16"],
        help="of the frozen weights (default: bfloat16 for --bf16 on a GPU)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--account", action="store_true", help="say where a step's time goes")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.backbone_dtype is None:
        options.backbone_dtype = "bfloat16" if options.bf16 and options.device != "cpu" else "float32"
    model, batch, step, preparing = prepare(options)
    products = products_of(model, batch)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    step()
    took, predicted = [], []
    for _ in range(options.rounds):  # in turn, so that a machine that slows down slows both
        took.append(seconds(step, options.device))
        predicted.append(predict(products, dtype, options.device))
    flops = sum(2 * count * batch * rows * inner * cols for (batch, rows, inner, cols), count in products.items())
    threads = torch.get_num_threads()
    cores = f"{threads} threads" if threads > 1 else "1 thread, processor time"
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {cores}"
    step_time, best = statistics.median(took), statistics.median(predicted)
    share = statistics.median(b / a for a, b in zip(took, predicted, strict=True))
    print(f"{where}; torch {torch.__version__}; products in {dtype}; {options.rounds} rounds, medians")
    masks = f"K_q={options.num_query_masks}, K_p={options.num_passage_masks}"
    print(f"{options.num_queries} queries, {options.negatives} negatives each, {masks}: {batch['tokens']} tokens")
    print(f"a step: {step_time:.3f} s, {batch['tokens'] / step_time:.0f} tokens/s")
    print(f"its products: {best:.3f} s, {batch['tokens'] / best:.0f} tokens/s, {flops / best / 1e9:.0f} GFLOP/s")
    print(f"a step reaches {share:.0%} of the prediction; preparing its batch takes {preparing:.3f} s the first time")
    if options.account:
        for kind, part in account(step).items():
            print(f"  {part:>4.0%}  {kind}")


if __name__ == "__main__":
    main()
