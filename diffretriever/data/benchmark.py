"""A benchmark's queries and judgements: BEIR's layout, MS MARCO's, TREC Deep Learning's."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from ..files.lines import COMPRESSIONS
from .corpus import read_queries
from .qrels import LARGEST_GRADE, read_qrels

# MS MARCO passage ranking as it is distributed: split -> (queries, qrels); papers report the small dev set
MS_MARCO = {
    "dev": ("queries.dev.small.tsv", "qrels.dev.small.tsv"),
    "train": ("queries.train.tsv", "qrels.train.tsv"),
    "dl19": ("msmarco-test2019-queries.tsv", "2019qrels-pass.txt"),
    "dl20": ("msmarco-test2020-queries.tsv", "2020qrels-pass.txt"),
}
# TREC Deep Learning judges on 0 to 3 and counts 2 and above as relevant (Craswell et al. 2020, 2021)
RELEVANCE_LEVELS = {"dl19": 2, "dl20": 2}


@dataclass(frozen=True)
class Benchmark:
    """The judged queries of one split.

    Args:
        folder: where the corpus is, too (`read_corpus`).
        split: the split's name.
        queries: {query id: text}, those that have judgements and nothing else.
        qrels: {query id: {passage id: grade}} of these queries.
        relevance_level: the least grade that counts as relevant in the binary metrics.
        own_ids_count: whether a passage with the query's own id may be found. In BEIR it is the query itself (ArguAna,
            Quora) and is left out; in MS MARCO's own files queries and passages are numbered apart.
        notes: what does not fit together, for the reader.
    """

    folder: Path
    split: str
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    relevance_level: int
    own_ids_count: bool = False
    notes: list[str] = field(default_factory=list)


def read_benchmark(folder: str | Path, split: str, relevance_level: int | None = None) -> Benchmark:
    """Read queries and judgements of a split.

    Args:
        folder: BEIR's layout (`queries.jsonl`, `qrels/SPLIT.tsv`) or MS MARCO's (`queries.dev.small.tsv`,
            `qrels.dev.small.tsv`, `2019qrels-pass.txt` …), each file plain or compressed.
        split: BEIR's name, or of MS MARCO "dev", "train", "dl19", "dl20".
        relevance_level: None is 2 for the splits dl19 and dl20, else 1.

    Returns:
        The benchmark. A judged query without a text is left out, with a note.

    Raises:
        FileNotFoundError: no such folder, split or file; the message lists the splits that are there.
        ValueError: a malformed file, or no judged query has a text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a benchmark in BEIR's or MS MARCO's layout.")
    if relevance_level is not None and not 1 <= relevance_level <= LARGEST_GRADE:
        raise ValueError(f"the relevance level must lie between 1 and {LARGEST_GRADE:,}, got {relevance_level}.")
    source, judgements, is_beir = _files(folder, split)
    qrels = read_qrels(judgements)
    texts, unjudged = {}, 0
    for query in read_queries(source):
        if query.id in qrels:
            texts[query.id] = query.text
        else:
            unjudged += 1
    if not texts:
        raise ValueError(f"none of the {len(qrels)} queries judged in {judgements} is in {source}.")
    level = relevance_level or RELEVANCE_LEVELS.get(split, 1)
    kept = {query: grades for query, grades in qrels.items() if query in texts}
    queries = {query: texts[query] for query in kept}
    notes = _notes(qrels, kept, unjudged, level)
    if is_beir and (own := [query for query, grades in kept.items() if grades.get(query, 0) >= level]):
        notes.append(
            f"{len(own):,} queries are judged to be answered by the passage with their own id, e.g. {own[0]!r}: as in "
            "BEIR, it is left out of their rankings and counts as not found."
        )
    return Benchmark(folder, split, queries, kept, level, not is_beir, notes)


def _files(folder: Path, split: str) -> tuple[Path, Path, bool]:
    """Return where the split's queries and judgements are, and whether the layout is BEIR's."""
    judgements = _present(folder / "qrels" / f"{split}.tsv")
    if judgements is not None:
        return folder, judgements, True
    if split in MS_MARCO:
        queries, qrels = (_present(folder / name) for name in MS_MARCO[split])
        if queries is not None and qrels is not None:
            return queries, qrels, False
    there = ", ".join(splits(folder)) or "none"
    raise FileNotFoundError(
        f"{folder}: no split {split!r}; the splits there are: {there}. Expected qrels/{split}.tsv (BEIR) or MS MARCO's "
        "own file names."
    )


def splits(folder: Path) -> list[str]:
    """Return the names of the splits that a benchmark folder holds."""
    names = {path.name.split(".tsv")[0] for path in (folder / "qrels").glob("*.tsv*")}
    names |= {split for split, files in MS_MARCO.items() if all(_present(folder / name) for name in files)}
    return sorted(names)


def _present(path: Path) -> Path | None:
    """Return the file or its compressed form, if there is one."""
    for suffix in ("", *COMPRESSIONS):
        if path.with_name(path.name + suffix).is_file():
            return path.with_name(path.name + suffix)
    return None


def _notes(qrels: dict[str, dict[str, int]], kept: dict[str, dict[str, int]], unjudged: int, level: int) -> list[str]:
    notes = []
    if len(qrels) > len(kept):
        unknown = next(query for query in qrels if query not in kept)
        notes.append(
            f"{len(qrels) - len(kept):,} of {len(qrels):,} judged queries have no text, e.g. {unknown!r}: left out."
        )
    if unjudged:
        notes.append(f"{unjudged:,} queries have no judgement in this split: not searched.")
    without = sum(max(grades.values()) < level for grades in kept.values())
    if without:
        notes.append(f"{without:,} queries have no passage of grade {level} or more: they score 0 in binary metrics.")
    if level == 1 and max(grade for grades in kept.values() for grade in grades.values()) > 2:
        notes.append("Grades reach 3 or more; for TREC Deep Learning's rule give --relevance-level 2.")
    return notes


def note_unknown_passages(benchmark: Benchmark, passages: Set[str]) -> list[str]:
    """Say how many judged passages the corpus lacks; they stay judged, so they count as not found.

    Args:
        benchmark: the judgements.
        passages: the corpus's ids.

    Raises:
        ValueError: the corpus has none of the judged passages.
    """
    judged = {passage for grades in benchmark.qrels.values() for passage in grades}
    unknown = judged - passages
    if unknown == judged:
        raise ValueError(
            f"the corpus holds none of the {len(judged)} passages judged in split {benchmark.split!r} (e.g. "
            f"{min(judged)!r}); are corpus and qrels of the same benchmark?"
        )
    if not unknown:
        return []
    return [
        f"{len(unknown):,} of {len(judged):,} judged passages are not in the corpus, e.g. {min(unknown)!r}: "
        "they count as not found."
    ]
