"""`diffretriever evaluate` as a user runs it: files, exit codes, messages."""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_benchmark import qrels_of, write_benchmark

from diffretriever.cli import evaluate as command
from diffretriever.cli import main as cli
from diffretriever.evaluation.metrics import evaluate_run, means, parse_metric
from diffretriever.evaluation.runs import read_run
from diffretriever.search.modes import MODES
from diffretriever.store.compression import open_store
from diffretriever.store.store import ShardContents, write_store

ROOT = Path(__file__).resolve().parents[2]
RELEASE = ROOT / "checkpoints" / "diffretriever-llada-tiny-single"
Command = Callable[..., int]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Return a function that runs the command on the small benchmark."""
    data = write_benchmark(tmp_path / "data")

    def run(*arguments: object, **replaced: object) -> int:
        given = {"--model": RELEASE, "--data": data, **{f"--{name}": value for name, value in replaced.items()}}
        words = [str(word) for pair in given.items() for word in pair]
        return cli.main(["evaluate", *words, "--quiet", *map(str, arguments)])

    return run


def test_files_agree_with_each_other(evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / "out" / name for name in ("figures.json", "table.md", "queries.json", "runs")}
    status = evaluate(
        "--json", files["figures.json"], "--markdown", files["table.md"], "--per-query", files["queries.json"],
        "--run-folder", files["runs"], "--store", tmp_path / "store", "--bm25", "--tune-split", "dev", "--latency", 2,
    )  # fmt: skip
    assert status == 0
    figures = json.loads(files["figures.json"].read_text())
    assert list(figures)[:6] == [*MODES, "bm25"]
    metrics = ["nDCG@10", "RR@10", "R@100", "R@1000", "AP"]
    measures = [parse_metric(name) for name in metrics]
    per_query = json.loads(files["queries.json"].read_text())
    assert {file.name for file in files["runs"].iterdir()} == {f"{name}.trec" for name in figures}
    for mode, values in figures.items():
        again = means(evaluate_run(read_run(files["runs"] / f"{mode}.trec"), qrels_of("test"), measures))
        assert {name: values[name] for name in metrics} == again
        assert means(per_query[mode]) == again
        assert ("latency_ms" in values) == (mode in (*MODES, "bm25"))
    table, markdown = capsys.readouterr().out, files["table.md"].read_text()
    for mode in MODES:
        cells = [f"{figures[mode][name]:.3f}" for name in metrics]
        assert any(line.split()[0:1] == [mode] and line.split()[1:6] == cells for line in table.splitlines()), mode
        assert f"| `{mode}` | {' | '.join(cells)} |" in markdown
    assert "4 queries, 10 passages" in table


def test_a_baseline_gives_the_mark_of_the_same_mode(evaluate: Command, tmp_path: Path) -> None:
    given = ("--store", tmp_path / "store", "--modes", "single_dense", "sparse_max", "--metrics", "RR@10")
    assert evaluate(*given, "--per-query", tmp_path / "queries.json") == 0
    worse = json.loads((tmp_path / "queries.json").read_text())
    worse["single_dense"]["RR@10"] = {query: value - 0.5 for query, value in worse["single_dense"]["RR@10"].items()}
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    assert evaluate(*given, "--baseline", tmp_path / "worse.json", "--markdown", tmp_path / "table.md") == 0
    table = (tmp_path / "table.md").read_text()
    assert "| `single_dense` † | single_dense of the baseline | RR@10 | +0.5000 | inf | 0 | 0 |" in table
    assert "| `sparse_max`  | sparse_max of the baseline | RR@10 | +0.0000 |" in table
    assert "† better than the same mode of the baseline" in table
    marked = [line for line in table.splitlines() if line.startswith("| `single_dense` | ")]
    assert marked[0].endswith("† |")
    both = ("--baseline", tmp_path / "queries.json", "--counterpart", tmp_path / "worse.json")
    assert evaluate(*given, *both, "--markdown", tmp_path / "table.md") == 0
    table = (tmp_path / "table.md").read_text()
    assert "| `single_dense`  | single_dense of the baseline | RR@10 | +0.0000 |" in table
    assert "| `single_dense` ‡ | single_dense of the counterpart | RR@10 | +0.5000 |" in table


def test_another_length_of_texts(evaluate: Command, tmp_path: Path) -> None:
    given = ("--modes", "multi_dense", "--metrics", "nDCG@10")
    assert evaluate(*given, "--store", tmp_path / "short", "--max-length", 40) == 0
    assert evaluate(*given, "--store", tmp_path / "whole") == 0
    lengths = [open_store(tmp_path / name).manifest.max_length for name in ("short", "whole")]
    assert lengths == [40, 120]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "train"], "no split 'train'; the splits there are: dev, test."),
        (["--metrics", "nDGC@10"], "metric 'nDGC@10' is not known"),
        (["--bm25", "--tune-split", "train"], "no split 'train'"),
        (["--baseline", "absent.json"], "absent.json"),
        (["--relevance-level", "0"], "relevance level must lie between 1 and 1,000,000, got 0"),
        (["--relevance-level", "1" + "0" * 30], "relevance level must lie between 1 and 1,000,000, got 1000000"),
        (["--json", "."], "Is a directory"),
        (["--run-folder", f"{__file__}/runs"], "test_evaluate_command.py"),
    ],
)
def test_wrong_input_is_status_2_before_the_model_is_loaded(
    evaluate: Command,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert evaluate(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("diffretriever evaluate: ")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("file", "kind"), [("queries", "query"), ("corpus", "passage")])
def test_ids_that_a_run_file_cannot_hold_are_said_at_once(
    evaluate: Command,
    file: str,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    if kind == "query":  # one that is searched; of passages each may be found
        qrels = tmp_path / "data" / "qrels" / "test.tsv"
        qrels.write_text(qrels.read_text().replace("q-web\t", "a q-web\t"))
    texts = tmp_path / "data" / f"{file}.jsonl"
    texts.write_text(re.sub('"(q-web|clock)"', r'"a \1"', texts.read_text()))
    assert evaluate("--run-folder", tmp_path / "runs") == 2
    assert f"the {kind} id 'a " in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gbk"])
def test_files_arrive_whatever_the_console_can_show(
    evaluate: Command, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", printed)
    data = (tmp_path / "data").rename(tmp_path / "données 検索 😀 \udcff")
    given = ("--modes", "single_dense", "multi_dense", "--metrics", "AP", "--markdown", tmp_path / "table.md")
    assert evaluate(*given, "--json", tmp_path / "figures.json", data=data) == 0
    assert json.loads((tmp_path / "figures.json").read_text()).keys() == {"single_dense", "multi_dense"}
    assert "検索 😀" in (tmp_path / "table.md").read_text(encoding="utf-8")
    printed.flush()
    assert "single_dense" in printed.buffer.getvalue().decode(encoding)


def test_help_is_printed_on_any_console(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", printed)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["evaluate", "--help"])


def test_missing_data_and_malformed_baseline(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(data=tmp_path / "absent") == 2
    assert "absent: no such folder" in capsys.readouterr().err
    for content, words in (("{", "not valid JSON"), ('{"a": 1}', "expected {mode: {metric: {query id: number}}}")):
        (tmp_path / "baseline.json").write_text(content)
        assert evaluate("--baseline", tmp_path / "baseline.json") == 2
        assert words in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"multi_dense": {"nDCG@10": {"q-web": 1.0}}}')
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert evaluate("--metrics", "nDCG@10", "--counterpart", tmp_path / "other.json") == 2
    assert "needs the same queries on both sides; 3 are on one side only" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "data" / "corpus.jsonl").unlink()
    assert evaluate() == 2
    assert "holds no corpus file" in capsys.readouterr().err


def test_a_corpus_of_another_benchmark_is_refused(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "corpus.jsonl").write_text('{"_id": "x", "title": "", "text": "Something else."}\n')
    assert evaluate() == 2
    assert "the corpus holds none of the 5 passages judged in split 'test'" in capsys.readouterr().err


def test_duplicated_ids_are_refused(evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("queries", "corpus"):
        file = tmp_path / "data" / f"{name}.jsonl"
        before = file.read_text()
        file.write_text(before + before.splitlines()[0] + "\n")
        assert evaluate() == 2
        said = capsys.readouterr().err
        assert str(tmp_path / "data") in said
        assert json.loads(before.splitlines()[0])["_id"] in said
        file.write_text(before)


def test_ids_that_a_run_file_cannot_hold_cost_only_the_run_files(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store from elsewhere may have other ids than the corpus."""
    given = ("--modes", "single_dense", "--metrics", "AP", "--store")
    assert evaluate(*given, tmp_path / "made") == 0
    there = open_store(tmp_path / "made")
    (shard,) = there.shards()
    ids = ["a clock" if name == "clock" else name for name in shard.ids]
    contents = ShardContents(ids, shard.repr_hidden, shard.sparse_indices, shard.sparse_values)
    settings = vars(there.manifest.settings)
    settings["options"] = {name: value for name, value in settings["options"].items() if name != "shard_size"}
    write_store(tmp_path / "named", [contents], settings)
    files = ("--json", tmp_path / "figures.json", "--run-folder", tmp_path / "runs")
    assert evaluate(*given, tmp_path / "named", *files) == 2
    printed = capsys.readouterr()
    assert "the passage id 'a clock' cannot stand in a TREC run file" in printed.err
    assert json.loads((tmp_path / "figures.json").read_text()).keys() == {"single_dense"}
    assert "single_dense" in printed.out
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "interrupted. What is encoded is kept in "),
        (OSError(errno.ENOSPC, "No space left on device", "shard"), "No space left on device"),
    ],
)
def test_an_interruption_is_status_3(
    evaluate: Command,
    error: BaseException,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(command, "load_model", fail)
    assert evaluate("--store", tmp_path / "store") == 3
    said = capsys.readouterr().err
    assert words in said
    assert "run again to go on" in said


@pytest.mark.parametrize(("package", "arguments"), [("bm25s", ["--bm25"]), ("scipy.stats", [])])
def test_a_missing_package_is_said_with_the_extra(
    evaluate: Command,
    package: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert evaluate(*arguments) == 2
    said = capsys.readouterr().err
    assert package.split(".")[0] in said
    assert 'pip install -e ".[retrieval]"' in said
