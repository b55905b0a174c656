"""The command line itself: help, version, names of recipes, and readers that leave early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_folders import ROOT, run_python

from diffretriever import __version__
from diffretriever.cli.arguments import find_recipe
from diffretriever.cli.main import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"diffretriever {__version__}\n"


@pytest.mark.parametrize("command", ["encode", "train", "plot budget", "publish push"])
def test_help_has_the_exit_statuses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "Exit status: 0 done; 2 wrong input or options; 3 interrupted" in capsys.readouterr().out


@pytest.mark.slow
def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, diffretriever.cli.main as cli; cli.build_parser(); print('torch' in sys.modules)"
    assert run_python(code, PYTHONPATH=ROOT) == "False\n"


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
