"""The command line itself: help, version, names of recipes, and readers that leave early."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoint_folders import ROOT, run_python

from diffretriever import __version__
from diffretriever.cli import publish
from diffretriever.cli.arguments import find_recipe
from diffretriever.cli.main import build_parser, main, run
from diffretriever.cli.parser import OLD_NAMES, Parser


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"diffretriever {__version__}\n"


def helps(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every command's parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from helps(one) if one._subparsers else [one]


def test_every_help_has_a_description_an_example_that_parses_and_the_exit_statuses() -> None:
    """As do the helps of publish.py, which names itself."""
    whole = build_parser()
    script = Parser(prog="publish.py")
    publish.add_commands(script)
    seen = [(parser, whole) for parser in helps(whole)] + [(parser, script) for parser in helps(script)]
    assert len(seen) == 29
    for parser, top in seen:
        text = parser.format_help()
        assert parser.description, parser.prog
        assert "Exit status: 0 done; 2 wrong input or options; 3 interrupted" in text
        program, *words = shlex.split(text.partition("Example:\n")[2].partition("\n\n")[0])
        assert (program, f"{program} {' '.join(words)}".startswith(parser.prog)) == (top.prog, True)
        assert top.parse_args(words)


@pytest.mark.parametrize("words", ["f q --top-k 2 r", "--top-k 2 f q r", "f --top-k 2 q r", "f q r --top-k 2"])
def test_questions_may_stand_behind_options(words: str) -> None:
    options = build_parser().parse_args(["demo", *words.split()])
    assert (options.passages, options.question, options.top_k) == (Path("f"), ["q", "r"], 2)


def test_helps_of_groups_have_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["plot"], ["publish"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        assert "Exit status: 0 done" in capsys.readouterr().out


@pytest.mark.once
def test_benchmarks_call_an_option_by_its_name_of_today() -> None:
    """Of the old names only --queries has another meaning as well: a store of queries."""
    found = []
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        for call in re.findall(r"add_argument\(\s*\"(--[^)]*)", file.read_text(encoding="utf-8")):
            name = call.partition('"')[0]
            if name in OLD_NAMES and not (name == "--queries" and "type=Path" in call):
                found.append(f"{file.name}: {name}")
    assert found == []


@pytest.mark.slow
def test_help_does_not_wait_for_torch() -> None:
    """And OpenMP's threads are told how to wait before torch starts them."""
    code = """import contextlib, os, sys
import diffretriever.cli.main as cli, publish
for main, words in ((publish.main, ["list"]), (cli.main, ["publish", "list"]), (cli.main, ["train", "--help"])):
    os.environ.pop("OMP_WAIT_POLICY", None)
    with contextlib.suppress(SystemExit):
        main(words)
    print("torch" in sys.modules, os.environ.get("OMP_WAIT_POLICY"))"""
    lines = run_python(code, python=sys.executable, PYTHONPATH=ROOT).splitlines()
    assert [line for line in lines if line.startswith(("True", "False"))] == ["False PASSIVE"] * 3


def test_recipes_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, name in (("training", "paper-single"), ("pretraining", "dream-tiny")):
        assert find_recipe(name, part) == ROOT / "diffretriever" / part / "recipes" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    Path("paper-single").write_text("")
    assert find_recipe("paper-single", "training") == Path("paper-single")  # a file of this name comes first
    with pytest.raises(
        FileNotFoundError, match=r"paper: no such recipe; expected a YAML file or one of .*paper-multi, "
    ):
        find_recipe("paper", "training")
    with pytest.raises(FileNotFoundError, match=r"expected a YAML file or one of dream-tiny, llada-tiny\."):
        find_recipe("paper-single.yaml", "pretraining")


def test_a_polite_stop_leaves_no_temporary_folder(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[Path] = []

    def work(options: argparse.Namespace) -> int:
        with tempfile.TemporaryDirectory() as folder:
            made.append(Path(folder))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert run(argparse.Namespace(run=work, again="Again."), "diffretriever evaluate") == 3
    assert "diffretriever evaluate: interrupted. Again." in capsys.readouterr().err
    assert not made[0].exists()
    assert signal.getsignal(signal.SIGTERM) == before
    with ThreadPoolExecutor(1) as other:  # where signals cannot be handled
        asked = argparse.Namespace(run=lambda _: 0, again="Again.")
        assert other.submit(run, asked, "diffretriever evaluate").result() == 0


@pytest.mark.parametrize("names", [["stdout"], ["stdin", "stdout", "stderr"]])
def test_a_service_may_have_no_standard_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    (tmp_path / "grid.json").write_text('{"1,4": 0.7}')
    for name in names:
        monkeypatch.setattr(sys, name, None)
    given = ["plot", "budget", "--input", str(tmp_path / "grid.json"), "--output"]
    assert main([*given, str(tmp_path / "grid.svg")]) == 0
    assert main([*given, str(tmp_path / "grid.txt")]) == 2
    assert (tmp_path / "grid.svg").stat().st_size > 0
    for name in names:
        getattr(sys, name).close()


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`diffretriever publish list | head -c 0`."""
    code = "import sys; from diffretriever.cli.main import main; sys.stdin.read(); sys.exit(main(['publish', 'list']))"
    command = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert command.stdin is not None
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    command.stdin.close()
    assert command.stderr.read() == b""
    assert command.wait() == 0


def wrong(words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a refused command line prints to stderr."""
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("words", "usage", "said"),
    [
        ("search --topk 3 x", "diffretriever search", "unknown option --topk; did you mean --top-k?"),
        ("search --collectio c", "diffretriever search", "unknown option --collectio; did you mean --collection?"),
        ("encode --inptu=x", "diffretriever encode", "unknown option --inptu; did you mean --input?"),
        ("publish build --outptu x", "diffretriever publish build", "did you mean --output?"),
        ("train --qqqqqq", "diffretriever train", "unknown option --qqqqqq"),
        ("serach x", "diffretriever", "did you mean search?"),
        ("evaluate --model m --data d --modes sparse_mx", "diffretriever evaluate", "did you mean sparse_max?"),
        ("search --mode multi_dens x", "diffretriever search", "did you mean multi_dense?"),
        ("compress a --store s --output o", "diffretriever compress", "unexpected: a"),
        ("compress --runs x --store s --output o", "diffretriever compress", "unknown option --runs"),  # not its own
    ],
)
def test_wrong_words_get_the_commands_usage_and_a_suggestion(
    words: str, usage: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = wrong(words, capsys)
    assert printed[0].startswith(f"usage: {usage} [-h]")
    assert printed[-1].startswith(f"{usage}: error: ")
    assert printed[-1].endswith(said)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encode --model m --input i --out o --queries --num-masks 3", {"output": Path("o"), "num_query_masks": 3}),
        ("encode --model m --input i --out=o --num-masks=3", {"output": Path("o"), "num_passage_masks": 3}),
        ("search --store s --num-masks 2 -- --out", {"num_query_masks": 2, "question": ["--out"]}),
        ("evaluate --model m --data d --runs r", {"run_folder": Path("r")}),
        ("select-budget --model m --data d --out o --passages 9", {"num_passages": 9, "output": Path("o")}),
    ],
)
def test_old_names_work_with_a_note(old: str, new: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    options = vars(build_parser().parse_args(old.split()))
    assert {name: options[name] for name in new} == new
    notes = capsys.readouterr().err.splitlines()
    given = [
        name for name in ("--out", "--num-masks", "--runs", "--passages") if f" {name}" in old.partition(" -- ")[0]
    ]
    assert len(notes) == len(given)
    assert all("now; the old name works until version" in note for note in notes)


def test_an_old_name_is_read_as_its_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert wrong("train --recipe r --model m --pairs p --out", capsys)[-1].endswith("--output: expected one argument")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "encode --model m --input i --output o --queries --num-passage-masks 3",
            "say --num-query-masks, not --num-pa",
        ),
        ("encode --model m --input i --output o --num-query-masks 3", "say --num-passage-masks, not --num-query-masks"),
    ],
)
def test_the_other_sides_masks_are_no_slip_of_the_tongue(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_threads_are_counted_from_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--threads", "-1"])
    assert stop.value.code == 2
    assert "argument --threads: expected a whole number of at least 1, got '-1'" in capsys.readouterr().err
