"""Several processes on one store, some of them killed, stopped or started by a launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fresh
import pytest
from checkpoint_folders import ROOT
from full_disk import limit_files
from store_helpers import folder_bytes, made_up_texts, silent, write_jsonl

from diffretriever.encode.encode_store import encode_store
from diffretriever.store.store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


def encode(model: Any, corpus: Path, folder: Path) -> Store:
    return encode_store(model, corpus, folder, shard_size=4, tell=silent)


def start(work: Callable[[], object], model: Any = None, pause: float = 0.0) -> int:
    """Run in a forked process, whose model takes its time over each batch; returns the process's number."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    status = 1
    try:
        if model is not None:
            model.encode_prepared = partial(after_a_pause, model.encode_prepared, pause)
        result = work()
        status = result if isinstance(result, int) else 0
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)


def after_a_pause(encode_prepared: Callable[..., Any], pause: float, *texts: Any, **options: Any) -> Any:
    time.sleep(pause)
    return encode_prepared(*texts, **options)


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def whole(tiny: Any, tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A corpus of ten shards, and the store that one process makes of it."""
    corpus = write_jsonl(tmp_path / "ten.jsonl", made_up_texts(40))
    return corpus, folder_bytes(encode(tiny, corpus, tmp_path / "whole").folder)


def owners(folder: Path) -> dict[int, str]:
    """Return {process: claim} as the claim files say."""
    found = {}
    for file in folder.glob("claims/shard-*"):
        with contextlib.suppress(FileNotFoundError, ValueError):  # given back since it was listed, or being written
            found[json.loads(file.read_text())["process"]] = file.name
    return found


def test_three_processes_one_killed_one_stopped_for_a_while(
    tiny: Any, whole: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    corpus, expected = whole
    folder = tmp_path / "s"
    victim, sleeper, helper = (start(lambda: encode(tiny, corpus, folder), tiny, pause=0.3) for _ in range(3))
    wait_for(lambda: {victim, sleeper, helper} <= set(owners(folder)))  # all three are at work
    os.kill(sleeper, signal.SIGSTOP)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(list(folder.glob("shard-*"))) >= 8)
    os.kill(sleeper, signal.SIGCONT)
    assert status_of(victim) == -signal.SIGKILL
    assert (status_of(sleeper), status_of(helper)) == (0, 0)
    assert folder_bytes(folder) == expected


def test_the_one_that_is_left_finishes(tiny: Any, whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    corpus, expected = whole
    folder = tmp_path / "s"
    children = [start(lambda: encode(tiny, corpus, folder), tiny, pause=0.3) for _ in range(3)]
    wait_for(lambda: set(children) <= set(owners(folder)))
    for child in children:
        os.kill(child, signal.SIGKILL)
        status_of(child)
    assert len(owners(folder)) >= 3  # claims of the dead
    encode(tiny, corpus, folder)
    assert folder_bytes(folder) == expected


def test_processes_that_end_at_the_same_moment(tiny: Any, tmp_path: Path) -> None:
    """The last step, tidying up above all, must not pull files away from under the others."""
    corpus = write_jsonl(tmp_path / "two.jsonl", made_up_texts(3))
    expected = folder_bytes(encode(tiny, corpus, tmp_path / "whole").folder)
    for turn in range(8):
        folder = tmp_path / f"turn-{turn}"
        children = [start(partial(encode, tiny, corpus, folder)) for _ in range(4)]
        assert [status_of(child) for child in children] == [0, 0, 0, 0]
        assert folder_bytes(folder) == expected


def test_a_store_that_begins_while_its_folder_is_looked_at(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "two.jsonl", made_up_texts(3))
    folder, listed = tmp_path / "s", Path.iterdir

    def late(self: Path) -> Any:  # another process writes its plan just before this one lists the folder
        if self == folder and not list(listed(self)):
            monkeypatch.setattr(Path, "iterdir", listed)
            encode(tiny, corpus, folder)
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", late)
    assert folder_bytes(encode(tiny, corpus, folder).folder) == folder_bytes(folder)
    assert Path.iterdir is listed  # it came to that


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_by_the_user_or_a_scheduler(
    tiny: Any,
    whole: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    corpus, expected = whole
    folder = tmp_path / "s"
    monkeypatch.setattr("diffretriever.cli.load_model.load_model", lambda options, **settings: tiny)
    arguments = ("encode", "--model", "m", "--input", corpus, "--output", folder, "--shard-size", 4)
    child = start(lambda: command(*arguments), tiny, pause=0.05)
    wait_for(lambda: len(list(folder.glob("shard-*"))) >= 2)
    os.kill(child, number)
    assert status_of(child) == 3
    assert f"interrupted. Finished shards are kept in {folder}. Run the same command again" in capfd.readouterr().err
    assert not (folder / "claims").exists()
    assert not list(folder.glob(".*"))
    assert command(*arguments) == 0
    assert folder_bytes(folder) == expected


def test_a_disk_quota(
    tiny: Any,
    whole: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    corpus, expected = whole
    monkeypatch.setattr("diffretriever.cli.load_model.load_model", lambda options, **settings: tiny)
    arguments = ("encode", "--model", "m", "--input", corpus, "--output", tmp_path / "s", "--shard-size", 4, "--quiet")

    def limited() -> int:
        smallest = min(len(content) for name, content in expected.items() if name.startswith("shard"))
        limit_files(smallest - 100)
        return command(*arguments)

    assert status_of(start(limited)) == 3
    said = capfd.readouterr().err
    assert "File too large; nothing of this file is kept. Make room: " in said
    assert "shard-00000" in said
    assert not list((tmp_path / "s").glob("shard-*"))
    assert command(*arguments) == 0
    assert folder_bytes(tmp_path / "s") == expected


RUN = """
import sys
from diffretriever.cli import main as cli
from diffretriever.cli import encode as encode_command
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_accelerate_launches_several_processes(
    build_release: Callable[..., Path], tmp_path: Path, command: Callable[..., int]
) -> None:
    corpus = write_jsonl(tmp_path / "ten.jsonl", made_up_texts(40))
    release = build_release("tiny-llada", "llada-q4p4")
    arguments = ["encode", "--model", str(release), "--input", str(corpus), "--shard-size", "4", "--output"]
    assert command(*arguments, tmp_path / "whole") == 0
    (tmp_path / "run.py").write_text(RUN)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    here = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = fresh.run([*launch, tmp_path / "run.py", *arguments, tmp_path / "s"], env=here)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("40 texts in 10 shards") == 2  # both processes worked to the end
    assert folder_bytes(tmp_path / "s") == folder_bytes(tmp_path / "whole")
