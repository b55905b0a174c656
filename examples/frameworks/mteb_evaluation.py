"""Evaluate a release on a retrieval task of your own with MTEB 2.

The task is a folder in BEIR's layout: corpus.jsonl ({"_id", "title", "text"}), queries.jsonl ({"_id", "text"}) and
qrels/test.tsv (query-id, corpus-id and score, with a header line).

pip install mteb sentence-transformers
python examples/frameworks/mteb_evaluation.py --data DIR [--model DIR_OR_HUB_ID] [--mode MODE]
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import mteb
import sentence_transformers
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from diffretriever.data.texts import join_title
from diffretriever.mteb_models import FUSION_MODES, MODES, FusionSearch

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "diffretriever-llada-tiny-single"
# Which class each mode needs, and the branch that serves it on the Hub.
CLASSES = {
    "single_dense": ("SentenceTransformer", "main"),
    "sparse_max": ("SparseEncoder", "sparse"),
    "multi_dense": ("MultiVectorEncoder", "multi-vector"),
}


def read_rows(file: Path) -> Dataset:
    """Read a corpus or queries; titles are joined here ("title. text"), as MTEB itself would put a blank between."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = (join_title(row.get("title"), row["text"]) for row in rows)
    return Dataset.from_list([{"id": row["_id"], "text": text} for row, text in zip(rows, texts, strict=True)])


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Read relevance judgements: query id to passage id to grade."""
    qrels: dict[str, dict[str, int]] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    return qrels


def beir_task(folder: Path, name: str = "MyRetrieval") -> Any:
    """Return a folder in BEIR's layout as an MTEB task."""
    description = TaskMetadata(
        name=name,
        description="A retrieval task of one's own.",
        dataset={"path": str(folder), "revision": "local"},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    class LocalRetrieval(AbsTaskRetrieval):
        """The folder's passages, queries and judgements, read at the first use."""

        metadata = description

        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            """Read the files."""
            split: Any = {
                "corpus": read_rows(folder / "corpus.jsonl"),
                "queries": read_rows(folder / "queries.jsonl"),
                "relevant_docs": read_qrels(folder / "qrels" / "test.tsv"),
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return LocalRetrieval()


def load(model: str, mode: str) -> Any:
    """Load a release as what MTEB evaluates in this mode: a folder's files are for one class, a Hub id has branches."""
    if mode in FUSION_MODES:
        return FusionSearch(model, mode=mode)
    name, branch = CLASSES[mode]
    revision = None if Path(model).is_dir() else branch
    return getattr(sentence_transformers, name)(model, revision=revision, trust_remote_code=True)


def main() -> None:
    """Evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder in BEIR's layout")
    parser.add_argument("--model", default=str(CHECKPOINT), help="a release: folder or Hub id")
    parser.add_argument("--mode", choices=MODES, default="single_dense", help="scoring mode")
    options = parser.parse_args()
    results = mteb.evaluate(load(options.model, options.mode), beir_task(options.data), cache=None)
    scores = results[0].scores["test"][0]
    print(" ".join(f"{name}={scores[name]:.4f}" for name in ("ndcg_at_10", "recall_at_100", "mrr_at_10")))


if __name__ == "__main__":
    main()
