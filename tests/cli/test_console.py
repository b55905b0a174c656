"""What reaches the terminal: bars, threads that were chosen, and warnings that the user can act on."""

from __future__ import annotations

import argparse
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffretriever.cli.console import read_questions
from diffretriever.cli.main import run
from diffretriever.cli.threads import choose_threads, wait_asleep
from diffretriever.progress import no_loading_bars, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "drawn"), [(Terminal(), True), (io.StringIO(), False)])
def test_a_bar_is_drawn_on_a_terminal_and_written_elsewhere(
    stream: io.StringIO, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(300, "query", "mine", initial=100) as bar:
        for _ in range(20):
            bar.set_postfix_str("loss 0.5", refresh=False)
            bar.update(10)
    shown = stream.getvalue()
    assert "mine: " in shown
    assert "300/300" in shown
    assert "loss 0.5" in shown
    assert ("\r" in shown) == drawn
    if not drawn:
        assert [line.startswith("mine: 300/300 query [") for line in shown.splitlines()] == [True]  # not one a step


def test_no_bar_where_none_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    progress_bar(3, "query", "mine", show=False).close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "width", "chosen"), [(None, 4096, 4), (None, 192, 3), (None, 64, 1), (None, 16, 1), (2, 64, 2)]
)
def test_threads_follow_the_width_and_are_said(
    asked: int | None, width: int, chosen: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    choose_threads(asked, width)
    assert taken == [chosen]
    said = capsys.readouterr().err
    assert said.startswith(f"{chosen} CPU thread") if asked is None else said == ""
    assert ("; --threads N takes N" in said) == (asked is None)


def test_what_the_user_says_of_waiting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "torch")
    for before, after in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        wait_asleep(environment := dict(before))
        assert environment == {"OMP_WAIT_POLICY": after}


def command(work: Callable[[], object]) -> argparse.Namespace:
    return argparse.Namespace(run=lambda options: work() and 0, again="")


def test_commands_keep_back_what_their_user_cannot_act_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> bool:
        for module in ("torch.jit._script", "transformers.x", "diffretriever.store", "torchlike"):
            warnings.warn_explicit(f"from {module}", FutureWarning, "file.py", 1, module)
        logging.getLogger("bitsandbytes.backends").warning("no kernels")
        return True

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert run(command(work), "diffretriever x") == 0
        assert [str(one.message) for one in shown] == ["from diffretriever.store", "from torchlike"]
        work()  # the library keeps nothing back
        assert len(shown) == 6
    assert caplog.messages == ["no kernels"]


def test_bars_of_loading_come_back() -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.is_progress_bar_enabled()
    with no_loading_bars():
        assert not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled() == before


def test_a_byte_of_another_encoding_ends_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"chess\ncaf\xe9\n\nsql engine\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", given)
    assert list(read_questions("store")) == ["chess", "caf\N{REPLACEMENT CHARACTER}", "sql engine"]
