"""The table of the small releases: rows over seeds, and a test behind every claim.

Reads what `diffretriever evaluate --bm25 --tune-split SPLIT --per-query` and bm25_on_tokens.py wrote for each row and
seed, named ROW.SEED.DATASET.queries.json, for example llada-single.42.debian.queries.json. Rows without training have
the seed 0. checkpoints/README.md has the commands.

python benchmarks/small_releases.py --input results --data debian=DATA/debian scifact=DATA/scifact
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from diffretriever.cli.parser import Parser
from diffretriever.data.benchmark import read_benchmark
from diffretriever.data.corpus import read_corpus
from diffretriever.evaluation.report import read_per_query
from diffretriever.evaluation.significance import TTest, bonferroni, paired_t_test

METRIC = "nDCG@10"
TUNED = "fused, tuned"  # the dense weight chosen on another split
PerQuery = dict[str, float]  # {query id: nDCG@10}
ROWS = {  # name of the files: title; the dense mode that counts; which commands of checkpoints/README.md make it
    "llada-tokens": ("BM25 over `llada-tiny`'s tokens", "bm25", "E"),
    "llada-first96": ("BM25 over the 96 tokens that `llada-tiny` sees", "bm25", "E"),
    "llada-zero-mean": ("LLaDA, zero-shot, mean pooling", "single_dense", "B"),
    "llada-zero-single": ("LLaDA, zero-shot, K = 1", "single_dense", "A"),
    "llada-zero-multi": ("LLaDA, zero-shot, K_q = K_p = 4", "multi_dense", "A"),
    "llada-mean": ("LLaDA, fine-tuned, mean pooling (DiffEmbed)", "single_dense", "D"),
    "llada-single": ("`diffretriever-llada-tiny-single`", "single_dense", "C"),
    "llada-multi": ("`diffretriever-llada-tiny-multi-q4-p4`", "multi_dense", "C"),
    "dream-tokens": ("BM25 over `dream-tiny`'s tokens", "bm25", "E"),
    "dream-first96": ("BM25 over the 96 tokens that `dream-tiny` sees", "bm25", "E"),
    "dream-zero-mean": ("Dream, zero-shot, mean pooling", "single_dense", "B"),
    "dream-zero-single": ("Dream, zero-shot, K = 1", "single_dense", "A"),
    "dream-zero-multi": ("Dream, zero-shot, K_q = 4, K_p = 16", "multi_dense", "A"),
    "dream-mean": ("Dream, fine-tuned, mean pooling (DiffEmbed)", "single_dense", "D"),
    "dream-single": ("`diffretriever-dream-tiny-single`", "single_dense", "C"),
    "dream-multi": ("`diffretriever-dream-tiny-multi-q4-p16`", "multi_dense", "C"),
}
EDGES = (0, 30, 60, 90, math.inf)  # of the groups by length, in words
COLUMNS = ("dense", "sparse", "fused", TUNED, "fused + BM25")
BM25 = "bm25"


@dataclass(frozen=True)
class Claim:
    """`better` should have a higher score than `worse`; both are (row, column), the row may be BM25."""

    text: str
    better: tuple[str, str]
    worse: tuple[str, str]


def claims(backbone: str) -> Iterator[Claim]:
    """Yield what the method promises, for one backbone."""
    for kind in ("single", "multi"):
        for column in ("dense", "sparse", "fused"):
            tuned, zero = (f"{backbone}-{kind}", column), (f"{backbone}-zero-{kind}", column)
            yield Claim(f"{kind}, {column}: fine-tuned > zero-shot", tuned, zero)
        yield Claim(f"{kind}: fused > BM25", (f"{backbone}-{kind}", "fused"), (BM25, "sparse"))
        yield Claim(f"{kind}: fused, tuned > BM25", (f"{backbone}-{kind}", TUNED), (BM25, "sparse"))
        fused, seen = (f"{backbone}-{kind}", "fused"), (f"{backbone}-first96", "sparse")
        yield Claim(f"{kind}: fused > BM25 over the tokens it sees", fused, seen)
        yield Claim(f"{kind}: fused + BM25 > BM25", (f"{backbone}-{kind}", "fused + BM25"), (BM25, "sparse"))
        yield Claim(
            f"{kind}: masks > mean pooling, dense", (f"{backbone}-{kind}", "dense"), (f"{backbone}-mean", "dense")
        )
        yield Claim(
            f"{kind}: masks > mean pooling, dense, both zero-shot",
            (f"{backbone}-zero-{kind}", "dense"),
            (f"{backbone}-zero-mean", "dense"),
        )
    yield Claim("multi > single, dense", (f"{backbone}-multi", "dense"), (f"{backbone}-single", "dense"))


def modes(dense: str, evaluated: Collection[str]) -> dict[str, str]:
    """Name the evaluation's rows behind the table's columns.

    Where the weight chosen on another split is 0.5, the evaluation has no row of its own for it.

    >>> modes("multi_dense", ["fusion_multi_sparse_max", "fusion_multi_sparse_max@0.4"])[TUNED]
    'fusion_multi_sparse_max@0.4'
    """
    if dense == BM25:
        return {"sparse": BM25}
    fused = "fusion_multi_sparse_max" if dense == "multi_dense" else "fusion_single_sparse_max"
    with_bm25 = f"{fused}+bm25@0.5"
    if with_bm25 not in evaluated:
        with_bm25 = "fusion_multi_sparse_max+bm25@0.5"  # the default; with one vector MaxSim is the cosine
    tuned = next((row for row in evaluated if row.startswith(f"{fused}@")), fused)
    return {"dense": dense, "sparse": "sparse_max", "fused": fused, TUNED: tuned, "fused + BM25": with_bm25, BM25: BM25}


class Results:
    """Per-query values of every row, seed and column on one dataset.

    Args:
        folder: of the files.
        dataset: its name in theirs.
        data: its folder in BEIR's layout.
        split: of the judgements.
    """

    def __init__(self, folder: Path, dataset: str, data: Path, split: str) -> None:
        self.qrels = read_benchmark(data, split).qrels
        self.values: dict[str, dict[int, dict[str, PerQuery]]] = {}
        for row, (_, dense, _) in ROWS.items():
            found = sorted(folder.glob(f"{row}.*.{dataset}.queries.json"))
            self.values[row] = {int(file.name.split(".")[1]): self._read(file, dense) for file in found}
        columns = (one for seeds in self.values.values() for one in seeds.values())
        bm25 = next((one[BM25] for one in columns if BM25 in one), None)
        if bm25 is None:
            raise FileNotFoundError(f"{folder}: no ROW.SEED.{dataset}.queries.json of `diffretriever evaluate --bm25`.")
        self.values[BM25] = {0: {"sparse": bm25}}

    def _read(self, file: Path, dense: str) -> dict[str, PerQuery]:
        found = read_per_query(file)
        return {column: found[mode][METRIC] for column, mode in modes(dense, found).items() if mode in found}

    def means(self, row: str, column: str) -> list[float]:
        """Return nDCG@10 of each seed, in the seeds' order."""
        seeds = self.values[row]
        return [statistics.fmean(seeds[seed][column].values()) for seed in sorted(seeds) if column in seeds[seed]]

    def over_seeds(self, row: str, column: str) -> PerQuery:
        """Return each query's mean over the seeds."""
        seeds = [columns[column] for columns in self.values[row].values() if column in columns]
        return {query: statistics.fmean(values[query] for values in seeds) for query in seeds[0]}

    def test(self, claim: Claim) -> TTest | None:
        """Test a claim over queries, each query's values averaged over the seeds; None where a row is missing."""
        if not (self.means(*claim.better) and self.means(*claim.worse)):
            return None
        return paired_t_test(self.over_seeds(*claim.better), self.over_seeds(*claim.worse))

    def seeds_that_hold(self, claim: Claim) -> str:
        """Count the seeds of the better row whose mean is above every seed of the worse row."""
        ours, theirs = self.means(*claim.better), self.means(*claim.worse)
        return f"{sum(value > max(theirs) for value in ours)} of {len(ours)}"


def cell(values: Sequence[float]) -> str:
    """Format the mean over seeds, with the lowest and the highest where there are several.

    >>> cell([0.5]), cell([0.5, 0.52, 0.51]), cell([])
    ('0.500', '0.510 (0.500-0.520)', '')
    """
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def table(results: Results) -> Iterator[str]:
    """Yield the lines of one dataset's table."""
    yield f"| made by | | {' | '.join(COLUMNS)} |"
    yield "|---" * (2 + len(COLUMNS)) + "|"
    yield f"| A | BM25 | | {cell(results.means(BM25, 'sparse'))} |{' |' * (len(COLUMNS) - 2)}"
    for row, (title, _, commands) in ROWS.items():
        if results.values[row]:
            yield f"| {commands} | {title} | {' | '.join(cell(results.means(row, column)) for column in COLUMNS)} |"


def verdicts(results: Results) -> Iterator[str]:
    """Yield the lines of one dataset's claims, p after Bonferroni's correction over all of them."""
    tested = [
        (backbone, claim, test)
        for backbone in ("llada", "dream")
        for claim in claims(backbone)
        if (test := results.test(claim)) is not None
    ]
    yield "| claim | difference | p, corrected | seeds above |"
    yield "|---|---|---|---|"
    corrected = bonferroni([test.p for _, _, test in tested])
    for (backbone, claim, test), p in zip(tested, corrected, strict=True):
        seeds = results.seeds_that_hold(claim)
        yield f"| {backbone}, {claim.text} | {test.difference:+.3f} | {p:.1g} | {seeds} |"


def words_to_find(results: Results, data: Path) -> dict[str, float]:
    """Return {query: words of its relevant passages, on average}."""
    relevant = {query: [p for p, grade in grades.items() if grade > 0] for query, grades in results.qrels.items()}
    wanted = {passage for passages in relevant.values() for passage in passages}
    words = {passage.id: len(passage.text.split()) for passage in read_corpus(data) if passage.id in wanted}
    return {query: statistics.fmean(words[one] for one in found) for query, found in relevant.items() if found}


def by_length(results: Results, words: Mapping[str, float]) -> Iterator[str]:
    """Yield a table over the length of what is to be found, in words, each cell a mean over queries and seeds."""
    groups = [[query for query, count in words.items() if low <= count < high] for low, high in pairwise(EDGES)]
    names = [f"{low:g} to {high - 1:g}" if high < math.inf else f"{low:g} and more" for low, high in pairwise(EDGES)]
    yield f"| | {' | '.join(f'{name} ({len(group):,})' for name, group in zip(names, groups, strict=True))} |"
    yield "|---" * (1 + len(groups)) + "|"
    shown = [(BM25, "BM25", "sparse")]
    for row, (title, dense, _) in ROWS.items():
        columns = ("sparse",) if dense == BM25 or "-zero-" in row else ("dense", "sparse", "fused")
        shown += [(row, f"{title}, {column}", column) for column in columns]
    for row, title, column in shown:
        if results.means(row, column):
            values = results.over_seeds(row, column)
            cells = (f"{statistics.fmean(map(values.__getitem__, group)):.3f}" if group else "" for group in groups)
            yield f"| {title} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table, the claims and the table by length of each dataset."""
    parser = Parser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder of the evaluations")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FOLDER", help="datasets, BEIR's layout")
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    for pair in options.data:
        dataset, _, folder = pair.partition("=")
        results = Results(options.input, dataset, Path(folder), options.split)
        print(f"\n{dataset}: {METRIC}, mean over seeds (lowest-highest)\n")
        print("\n".join(table(results)), end="\n\n")
        print("\n".join(verdicts(results)), end="\n\n")
        print("\n".join(by_length(results, words_to_find(results, Path(folder)))))


if __name__ == "__main__":
    main()
