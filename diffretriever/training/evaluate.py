"""A small evaluation: nDCG@10 of dense, sparse and fused rankings on a BEIR-style folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.corpus import read_qrels
from ..files.lines import read_objects
from .losses import maxsim


@dataclass
class Benchmark:
    """Queries, passages and judgements of one split."""

    query_ids: list[str]
    queries: list[str]
    passage_ids: list[str]
    passages: list[str]
    qrels: dict[str, dict[str, int]]


@dataclass
class Vectors:
    """One side's encoding: dense [N, K, H] L2-normalised, sparse ids and values [N, T] (value 0: unused)."""

    dense: torch.Tensor
    sparse_ids: torch.Tensor
    sparse_values: torch.Tensor


def read_benchmark(folder: str | Path, split: str, limit: int | None = None) -> Benchmark:
    """Reads corpus.jsonl, queries.jsonl (plain or .xz) and qrels/<split>.tsv.

    Args:
        folder: BEIR layout.
        split: e.g. "dev".
        limit: keep the judged passages and the first ones up to this number.

    Raises:
        FileNotFoundError: if a file is absent.
    """
    folder = Path(folder)
    qrels = read_qrels(folder / "qrels" / f"{split}.tsv")
    queries = {r["_id"]: r["text"] for _, r in read_objects(_present(folder, "queries.jsonl")) if r["_id"] in qrels}
    judged = {passage for row in qrels.values() for passage in row}
    corpus = {
        r["_id"]: f"{r['title']}. {r['text']}" if r.get("title", "").strip() else r["text"]
        for _, r in read_objects(_present(folder, "corpus.jsonl"))
    }
    ids = list(corpus)
    if limit is not None:
        room = max(limit - len(judged), 0)
        ids = sorted(judged & corpus.keys()) + [name for name in ids if name not in judged][:room]
    return Benchmark(list(queries), list(queries.values()), ids, [corpus[name] for name in ids], qrels)


def _present(folder: Path, name: str) -> Path:
    """The file, or its .xz."""
    return (
        folder / name if (folder / name).is_file() or not (folder / f"{name}.xz").is_file() else folder / f"{name}.xz"
    )


def sparse_product(query: Vectors, passage: Vectors, vocab_size: int) -> torch.Tensor:
    """Dot products of two sets of sparse vectors: [Q, P]."""
    rows = torch.arange(len(passage.sparse_ids))[:, None].expand_as(passage.sparse_ids)
    used = passage.sparse_values > 0
    index = torch.stack([rows[used], passage.sparse_ids[used].long()])
    size = (len(passage.sparse_ids), vocab_size)
    stored = torch.sparse_coo_tensor(index, passage.sparse_values[used].float(), size, check_invariants=False)
    full = torch.zeros(len(query.sparse_ids), vocab_size)
    full.scatter_add_(1, query.sparse_ids.long(), query.sparse_values.float())
    return torch.sparse.mm(stored.coalesce(), full.T).T


def top_fused(dense: torch.Tensor, sparse: torch.Tensor, depth: int = 1000, weight: float = 0.5) -> torch.Tensor:
    """Min-max normalised fusion (paper §3.3) over the union of both rankings' top passages; the rest scores -inf.

    Args:
        dense, sparse: scores [Q, P].
        depth: passages taken from each ranking.
        weight: of the dense score.

    Returns:
        [Q, P].
    """
    depth = min(depth, dense.shape[1])
    candidates = torch.zeros_like(dense, dtype=torch.bool)
    for scores in (dense, sparse):
        candidates.scatter_(1, scores.topk(depth, dim=1).indices, True)
    parts = []
    for scores in (dense, sparse):
        low = scores.masked_fill(~candidates, torch.inf).amin(1, keepdim=True)
        high = scores.masked_fill(~candidates, -torch.inf).amax(1, keepdim=True)
        parts.append((scores - low) / (high - low).clamp(min=1e-9))
    fused = weight * parts[0] + (1 - weight) * parts[1]
    return fused.masked_fill(~candidates, -torch.inf)


def ndcg_at_10(
    scores: torch.Tensor, query_ids: Sequence[str], passage_ids: Sequence[str], qrels: Mapping[str, Mapping[str, int]]
) -> float:
    """Mean nDCG@10 (linear gain, log2 discount) over the queries that have a judgement.

    Args:
        scores: [Q, P].
        query_ids, passage_ids: names of rows and columns.
        qrels: query -> passage -> grade.
    """
    discount = 1 / torch.log2(torch.arange(10) + 2.0)
    top = scores.topk(min(10, scores.shape[1]), dim=1).indices.tolist()
    total = 0.0
    for query, row in zip(query_ids, top, strict=True):
        grades = qrels[query]
        gains = torch.tensor([float(grades.get(passage_ids[column], 0)) for column in row])
        best = torch.tensor(sorted(map(float, grades.values()), reverse=True)[:10])
        total += float((gains * discount[: len(gains)]).sum() / (best * discount[: len(best)]).sum())
    return total / len(query_ids)


def evaluate(
    encode: Callable[[Sequence[str], bool], Vectors], benchmark: Benchmark, vocab_size: int, weight: float = 0.5
) -> dict[str, float]:
    """Encodes a benchmark and returns nDCG@10 under "dense" (MaxSim), "sparse" and "fused".

    Args:
        encode: (texts, is_query) -> `Vectors`.
        benchmark: from `read_benchmark`.
        vocab_size: columns of the sparse vectors.
        weight: of the dense score in the fusion.
    """
    query, passage = encode(benchmark.queries, True), encode(benchmark.passages, False)
    names = benchmark.query_ids, benchmark.passage_ids, benchmark.qrels
    return {name: ndcg_at_10(scores, *names) for name, scores in rankings(query, passage, vocab_size, weight).items()}


def rankings(query: Vectors, passage: Vectors, vocab_size: int, weight: float = 0.5) -> dict[str, torch.Tensor]:
    """Scores [Q, P] under "dense" (MaxSim), "sparse" (dot product) and "fused"."""
    chunks = [
        maxsim(query.dense.float(), passage.dense[i : i + 2000].float()) for i in range(0, len(passage.dense), 2000)
    ]
    dense, sparse = torch.cat(chunks, 1), sparse_product(query, passage, vocab_size)
    return {"dense": dense, "sparse": sparse, "fused": top_fused(dense, sparse, weight=weight)}
