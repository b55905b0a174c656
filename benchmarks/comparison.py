"""The paper's comparison on one backbone: its methods, zero-shot and trained on the same pairs (paper §4.2).

Each step is a command of `diffretriever`; several run at once, and what is done is not done again, so that the same
line goes on after an interruption. Results are named ROW.SEED.DATASET.queries.json, as small_releases.py reads them;
rows without training have the seed 0. At the end each model is timed alone.

python benchmarks/comparison.py --backbone checkpoints/smollm2-135m-instruct --output runs/comparison \
    --pairs DEBIAN.jsonl DOCS.jsonl GENERAL.jsonl --data debian=DATA/debian scifact=DATA/scifact
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hardware import describe  # noqa: E402

from diffretriever.cli.load_model import load_model  # noqa: E402
from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.data.benchmark import read_benchmark  # noqa: E402
from diffretriever.data.corpus import read_corpus  # noqa: E402

PROMPTLESS = ("sparse_weight=0", "query_prompt=null", "passage_prompt=null")  # methods of one dense vector, no prompt
BUDGETS = {"num_query_masks": "--num-query-masks", "num_passage_masks": "--num-passage-masks"}
TIMED_PASSAGES = 2048
NOT_BEGUN = -1  # the status of a job whose predecessor failed


@dataclass(frozen=True)
class Row:
    """One method with its number of vectors.

    Args:
        name: of its files.
        method: of `diffretriever train --method`.
        masks: K of queries and passages, or the most words, when trained.
        zero_masks: the same without training (the paper's cap for generated words is 20 there).
        changes: of the recipe.
    """

    name: str
    method: str = "diffretriever"
    masks: int = 1
    zero_masks: int = 1
    changes: tuple[str, ...] = ()


ROWS = (
    Row("diffretriever-multi", masks=4, zero_masks=4),
    Row("diffretriever-single"),
    Row("promptreps-multi", "promptreps", 4, 20),
    Row("promptreps-single", "promptreps"),
    Row("diffembed", "diffembed", changes=PROMPTLESS),
    Row("repllama", "repllama", changes=PROMPTLESS),
)


@dataclass
class Job:
    """One command.

    Args:
        name: of its log.
        command: words after `python`.
        makes: the file that is there when it is done.
        after: names of jobs that come before.
    """

    name: str
    command: list[str]
    makes: Path
    after: list[str] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to do."""
        return self.makes.is_file()


class Plan:
    """All jobs, those that others wait for first.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.zero = options.output / "zero-shot"
        self.jobs: list[Job] = []
        self.models: dict[str, list[str]] = {}  # how each row's first seed is loaded

    def make(self) -> list[Job]:
        """Return the jobs."""
        build = ["publish", "build", "--base", str(self.options.backbone), "--output", str(self.zero)]
        build += ["--fingerprint", "never", *self._given("--mask-token", self.options.mask_token)]
        self._add("build", build, self.zero / "config.json")
        first, *others = self.options.seeds
        for name, *changes in self.options.variant:
            self._trained(Row(f"diffretriever-{name}", masks=4, changes=tuple(changes)), first)
        chosen = [row for row in ROWS if not self.options.rows or row.name in self.options.rows]
        for row in chosen:
            self._trained(row, first)
        for row in chosen if self.options.zero_shot else ():
            self._zero_shot(row)
        for seed in others:
            for row in chosen:
                self._trained(row, seed)
        return self.jobs

    def _given(self, name: str, value: str | None) -> list[str]:
        return [] if value is None else [name, value]

    def _add(self, name: str, words: list[str], makes: Path, *after: str) -> None:
        self.jobs.append(Job(name, ["-m", "diffretriever", *words], makes, list(after)))

    def _base(self, row: Row) -> str:
        """Return what the method reads: the backbone, or what reads it bidirectionally."""
        return str(self.options.backbone if row.method in ("promptreps", "repllama") else self.zero)

    def _trained(self, row: Row, seed: int) -> None:
        name = f"{row.name}.{seed}"
        out = self.options.output / "adapters" / name
        recipe = f"smollm2-135m-{'single' if row.masks == 1 else 'multi-q4-p4'}"
        words = ["train", "--recipe", recipe, "--method", row.method, "--model", self._base(row), "--seed", str(seed)]
        words += ["--pairs", *map(str, self.options.pairs), "--output", str(out)]
        for change in (*self.options.set, *row.changes):
            words += ["--set", change]
        self._add(f"train-{name}", words, out / "run.json", "build")
        model = ["--model", self._base(row), "--adapter", str(out)]
        model += ["--method", row.method] if row.method != "diffretriever" else []
        self.models.setdefault(row.name, model)
        self._evaluate(name, model, f"train-{name}")

    def _zero_shot(self, row: Row) -> None:
        model = ["--model", self._base(row)]
        model += ["--method", row.method] if row.method != "diffretriever" else []
        if row.zero_masks > 1:
            model += ["--num-query-masks", str(row.zero_masks), "--num-passage-masks", str(row.zero_masks)]
        self.models[f"zero-{row.name}"] = model
        self._evaluate(f"zero-{row.name}.0", model, "build")

    def _evaluate(self, name: str, model: Sequence[str], after: str) -> None:
        results = self.options.output / "results"
        for dataset, folder in self.options.data.items():
            words = ["evaluate", *model, "--data", folder, "--split", self.options.split, "--bm25", "--quiet"]
            words += ["--json", str(results / f"{name}.{dataset}.json")]
            words += ["--per-query", str(results / f"{name}.{dataset}.queries.json")]
            if self.options.device:
                words += ["--device", self.options.device]
            if self.options.model_dtype:
                words += ["--model-dtype", self.options.model_dtype]
            self._add(f"evaluate-{name}.{dataset}", words, results / f"{name}.{dataset}.queries.json", after)


class Queue:
    """Runs jobs in their order, several at once; after an interruption the rest.

    Args:
        jobs: those that others wait for first.
        logs: folder of what they say.
        most: how many run at once.
        environment: of all of them.
    """

    def __init__(self, jobs: Sequence[Job], logs: Path, most: int, environment: Mapping[str, str]) -> None:
        self.jobs, self.logs, self.most, self.environment = jobs, logs, most, dict(environment)
        self.running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self.failed: dict[str, int] = {}

    def run(self) -> None:
        """Run until all is done, or nothing more can be."""
        self.logs.mkdir(parents=True, exist_ok=True)
        waiting = [job for job in self.jobs if not job.is_done]
        try:
            while waiting or self.running:
                self._collect()
                for job in list(waiting):
                    if self.failed.keys() & set(job.after):
                        self.failed[job.name] = NOT_BEGUN
                        waiting.remove(job)
                    elif len(self.running) < self.most and self._is_ready(job, waiting):
                        waiting.remove(job)
                        self._start(job)
                time.sleep(0.2)
        finally:
            for process, _ in self.running.values():
                process.send_signal(signal.SIGTERM)  # a training saves, and goes on next time

    def _is_ready(self, job: Job, waiting: Sequence[Job]) -> bool:
        pending = {other.name for other in waiting} | self.running.keys()
        return not pending.intersection(job.after)

    def _start(self, job: Job) -> None:
        with (self.logs / f"{job.name}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, *job.command], stdout=log, stderr=log, env=self.environment)
        self.running[job.name] = process, time.monotonic()

    def _collect(self) -> None:
        for name, (process, begun) in list(self.running.items()):
            if (status := process.poll()) is not None:
                del self.running[name]
                if status:
                    self.failed[name] = status
                words = f"failed with {status}: {self.logs / name}.log" if status else "done"
                print(f"{name}: {words} ({time.monotonic() - begun:.0f} s)", flush=True)


def timings(plan: Plan, queries: Sequence[str], passages: Sequence[str]) -> dict[str, Any]:
    """Time each row's model: one query after the other, and passages in bulk; what it computes is all that it has.

    Returns:
        {row: {"query_ms": median, "passages_per_second", "query_vectors": mean number}}, for those that are there.
    """
    found: dict[str, Any] = {}
    for row, words in plan.models.items():
        model = _load(words, plan.options)
        if model is None:
            continue
        took, vectors = [], []
        for query in (*queries[:3], *queries):
            begun = time.perf_counter()
            out = model.encode_texts([query], is_query=True)
            took.append(time.perf_counter() - begun)  # the vectors are in the host's memory: nothing is pending
            exists = out.get("repr_mask")
            vectors.append(out["repr_hidden"].shape[1] if exists is None else int(exists.sum()))
        model.encode_texts(passages[:64], is_query=False)
        begun = time.perf_counter()
        model.encode_texts(passages, is_query=False)
        rate = len(passages) / (time.perf_counter() - begun)
        found[row] = {"query_ms": 1000 * statistics.median(took[3:]), "passages_per_second": rate}
        found[row]["query_vectors"] = statistics.fmean(vectors[3:])
        print(f"{row}: one query {found[row]['query_ms']:.1f} ms, {rate:,.0f} passages/s", flush=True)
    return found


def _load(words: Sequence[str], options: argparse.Namespace) -> Any:
    """Load a model as the commands do; None where its adapter is not there."""
    given = dict(zip(words[::2], words[1::2], strict=True))
    adapter = given.get("--adapter")
    if adapter is not None and not Path(adapter, "adapter_config.json").is_file():
        return None
    masks: dict[str, Any] = {name: int(given[option]) for name, option in BUDGETS.items() if option in given}
    asked = argparse.Namespace(
        model=given["--model"], adapter=adapter, method=given.get("--method"), revision=None,
        model_dtype=options.model_dtype, device=options.device, trust_remote_code=False,
    )  # fmt: skip
    return load_model(asked, **masks)


def datasets(words: Sequence[str]) -> dict[str, str]:
    """Read NAME=FOLDER, several.

    >>> datasets(["debian=data/debian"])
    {'debian': 'data/debian'}
    """
    return {name: folder for name, _, folder in (word.partition("=") for word in words)}


def main() -> int:
    """Run the queue, time the models, write timings.json; 1 where a job failed."""
    parser = Parser(description=__doc__)
    parser.add_argument("--backbone", type=Path, required=True, help="folder in Llama's or Qwen2's native format")
    parser.add_argument("--mask-token", default="<empty_output>", help="an unused special token that serves as [MASK]")
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="to train on")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FOLDER", help="datasets, BEIR's layout")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", type=Path, required=True, help="folder; run again to go on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="methods (default: all)")
    parser.add_argument("--zero-shot", action=argparse.BooleanOptionalAction, default=True, help="untrained, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all recipes")
    parser.add_argument("--variant", action="append", nargs="+", default=[], metavar="NAME KEY=VALUE",
                        help="one more DiffRetriever of four masks and the first seed")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="commands at once")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each")
    parser.add_argument("--num-queries", type=int, default=100, help="timed one by one; 0 times nothing")
    parser.add_argument("--device", help="for example cuda:1 (default: the first GPU, else the CPU)")
    parser.add_argument("--model-dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    options = parser.parse_args()
    options.data = datasets(options.data)
    plan = Plan(options)
    jobs = plan.make()
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    (options.output / "results").mkdir(parents=True, exist_ok=True)
    queue = Queue(jobs, options.output / "logs", options.jobs, environment)
    queue.run()
    if options.num_queries:
        folder = Path(next(iter(options.data.values())))
        queries = list(read_benchmark(folder, options.split).queries.values())[: options.num_queries]
        passages = [passage.text for _, passage in zip(range(TIMED_PASSAGES), read_corpus(folder), strict=False)]
        found = {"hardware": describe(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))}
        found["rows"] = timings(plan, queries, passages)
        (options.output / "timings.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if queue.failed:
        print(f"failed: {', '.join(queue.failed)}", file=sys.stderr)
    return 1 if queue.failed else 0


if __name__ == "__main__":
    sys.exit(main())
