"""Claims: one owner at a time, owners that died, filesystems without locks, and what is removed."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from faults import fault_at

from diffretriever.files import locks
from diffretriever.files.claims import Claims, living_owners

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    with Claims(folder) as first, Claims(folder) as second:
        assert first.take("a")
        assert not second.take("a")
        assert not first.take("a")
        assert second.take("b")
        first.release("a")
        assert second.take("a")
        assert (first.holds("a"), second.holds("a")) == (False, True)
    assert not folder.exists()


def test_many_threads_take_each_piece_once(tmp_path: Path) -> None:
    taken: list[str] = []

    def work(claims: Claims) -> None:
        taken.extend(name for name in map("piece-{}".format, range(40)) if claims.take(name))

    everyone = [Claims(tmp_path / "claims") for _ in range(6)]
    threads = [threading.Thread(target=work, args=(claims,)) for claims in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(f"piece-{number}" for number in range(40))
    for claims in everyone:
        claims.close()


def test_a_claim_that_is_given_up_while_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is then gone: a lock on it would keep nobody else out."""
    folder, opened = tmp_path / "claims", os.open
    with Claims(folder) as first, Claims(folder) as second, Claims(folder) as third:
        assert first.take("a")

        def late(*arguments: Any) -> int:
            handle = opened(*arguments)
            if first.holds("a"):
                first.release("a")
            return handle

        monkeypatch.setattr(os, "open", late)
        assert second.take("a")
        assert not third.take("a")


@needs_fork
def test_a_killed_owner_is_known_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        Claims(folder).take("a")
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with Claims(folder) as ours:
        assert not ours.take("a")
        assert living_owners(folder)[0].startswith(f"process {child} on ")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert living_owners(folder) == []
        assert ours.take("a")
        assert living_owners(folder)[0].startswith(f"process {os.getpid()} on ")
        with Claims(folder) as third:
            assert not third.take("a")
        ours.release("a")
        assert list(folder.iterdir()) == []  # the dead owner's claim goes with ours


@pytest.mark.parametrize("how", ["no fcntl", "no locks"])
def test_without_locks_everybody_gets_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Work is then done twice, and nobody waits for ever for the dead."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    if how == "no fcntl":
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    folder = tmp_path / "c"
    with Claims(folder) as first, Claims(folder) as second:
        assert (first.take("a"), second.take("a")) == (True, True)
        assert living_owners(folder) == []
        first.release("a")
    assert not folder.exists()


def test_other_failures_of_the_disk_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with Claims(tmp_path / "c") as ours, pytest.raises(OSError, match=r"No space left on device: '.*/c/a'"):
        ours.take("a")
    assert not (tmp_path / "c").exists()


def test_an_owner_that_is_being_written_is_said_without_its_number(tmp_path: Path) -> None:
    with Claims(tmp_path / "c") as ours:
        assert ours.take("a")
        (tmp_path / "c" / "a").write_text("")
        assert living_owners(tmp_path / "c") == ["process ? on an unknown machine"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_the_dead_are_told_from_the_living_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whoever reads a store that is not finished may not be the one who writes it, nor able to write there."""
    folder, opened = tmp_path / "claims", os.open

    def reads(path: Path, flags: int, *mode: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *mode)

    with Claims(folder) as ours:
        assert ours.take("living")
        (folder / "dead").write_text(json.dumps({"host": "here", "process": 7}))
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", reads)
            assert living_owners(folder) == [f"process {os.getpid()} on {platform.node()}"]


def test_only_claims_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    folder.mkdir()
    theirs = ["notes.txt", "a.x", "a.0.bak", "notes.2024", ".unfinished-notes", "c"]
    for name in theirs:
        (folder / name).write_text("somebody's")
    for name in ("a", "a.0", "a.1"):  # the last two as earlier versions named them
        (folder / name).write_text(json.dumps({"process": 7}))
    with Claims(folder) as ours:
        assert ours.take("b")
        ours.sweep({"a", "b"})
        assert (folder / "b").exists()
    assert {path.name for path in folder.iterdir()} == set(theirs)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "shard-000001").write_text("somebody's")
    (tmp_path / "claims").symlink_to("theirs")
    with pytest.raises(FileExistsError, match=r"claims: is a link; nothing is removed or replaced behind it"):
        Claims(tmp_path / "claims")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "a").symlink_to(tmp_path / "theirs" / "shard-000001")
    with Claims(tmp_path / "others") as ours, pytest.raises(OSError, match="others/a"):
        ours.take("a")
    assert (tmp_path / "theirs" / "shard-000001").read_text() == "somebody's"


def test_a_disk_that_failed_leaves_no_claim_that_cannot_be_taken(tmp_path: Path) -> None:
    for call in range(100):
        with fault_at(call, dies=False) as left, suppress(OSError), Claims(tmp_path / "claims") as ours:
            ours.take("a")
        with Claims(tmp_path / "claims") as ours:  # in the same process, which would still hold a forgotten lock
            assert ours.take("a"), call
        if left[0] >= 0:
            return
    pytest.fail("the faults never ended")
