"""Rank a few passages for a few questions with the small checkpoint that ships in this repository, on a CPU.

python examples/quickstart.py [--model DIR_OR_HUB_ID]
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from pathlib import Path

import torch
from transformers import AutoModel

EXAMPLES = Path(__file__).resolve().parent
CHECKPOINT = EXAMPLES.parent / "checkpoints" / "diffretriever-llada-tiny-multi-q4-p4"
CORPUS = EXAMPLES / "corpus"  # some queries share their words with the answer, some hardly any

MODES = {"dense": "multi_dense", "sparse": "sparse_max", "fused": "fusion_multi_sparse_max"}


def read_texts(path: Path) -> dict[str, str]:
    """Return {id: text} of a file in BEIR's layout."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {record["_id"]: record["text"] for record in records}


def ranking(scores: torch.Tensor, names: list[str]) -> str:
    """Return the best three of the passages' scores [P] in a line; a score of 0 is no match."""
    best = scores.topk(3)
    found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return (
        "".join(f"{names[place] + f' {score:.2f}':<27}" for score, place in found if score > 0) or "no term in common"
    )


def main() -> None:
    """Load, encode, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a release: folder or Hub id")
    options = parser.parse_args()

    started = time.perf_counter()
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    corpus, questions = read_texts(CORPUS / "corpus.jsonl"), list(read_texts(CORPUS / "queries.jsonl").values())
    names, texts = list(corpus), list(corpus.values())
    passages = model.encode_texts(texts, is_query=False)
    queries = model.encode_texts(questions, is_query=True)
    scores = {name: model.score(queries, passages, mode=mode) for name, mode in MODES.items()}  # [Q, P] each
    took = time.perf_counter() - started

    budgets = f"{model.config.num_query_masks} vectors a query, {model.config.num_passage_masks} a passage"
    print(f"{Path(options.model).name} on {device}: {budgets}, {model.config.hidden_size} dimensions\n")
    for row, query in enumerate(questions):
        print(f"\N{BLACK RIGHT-POINTING SMALL TRIANGLE} {query}")
        for name in MODES:
            print(f"    {name:<7}{ranking(scores[name][row], names)}")
        first = texts[int(scores["fused"][row].argmax())]
        print(textwrap.fill(first, 100, initial_indent="    \N{RIGHTWARDS ARROW} ", subsequent_indent="      ") + "\n")
    print(f"{len(texts)} passages and {len(questions)} queries loaded, encoded and scored in {took:.1f} s.")


if __name__ == "__main__":
    main()
