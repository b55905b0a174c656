"""Claims: one owner at a time, dead owners on this machine and elsewhere, filesystems without links or locks."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from faults import fault_at

from diffretriever.files import claims as module
from diffretriever.files import locks
from diffretriever.files.claims import Claims, living_owners

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


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


@needs_fork
def test_a_killed_owner_on_this_machine_is_known_at_once(tmp_path: Path) -> None:
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
        with Claims(folder) as third:
            assert not third.take("a")
        ours.release("a")
        assert list(folder.iterdir()) == []  # the dead owner's claim goes with ours


def elsewhere(folder: Path, name: str = "a.0") -> Path:
    """Make a claim of another machine's process."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(json.dumps({"machine": "other 1", "host": "other", "process": 7, "locked": True}))
    return file


def test_a_silent_machine_loses_its_claim_after_the_lease_of_our_clock(tmp_path: Path) -> None:
    file, clock = elsewhere(tmp_path / "claims"), Clock()
    os.utime(file, (1, 1))  # its clock may be decades off: only the change counts
    with Claims(file.parent, lease=60, clock=clock) as ours:
        assert not ours.take("a")
        clock.now += 59
        assert not ours.take("a")
        os.utime(file, (2, 2))  # a sign of life
        clock.now += 2
        assert not ours.take("a")
        clock.now += 60
        assert not ours.take("a")
        clock.now += 1
        assert ours.take("a")
        assert not ours.take("a")


def test_of_two_observers_of_a_dead_owner_one_gets_the_claim(tmp_path: Path) -> None:
    folder = elsewhere(tmp_path / "claims").parent
    clock, taken = Clock(), []

    def late() -> float:  # asked once the second has seen the dead owner's claim, and before it takes it
        if clock.now > 1060:
            taken.append(first.take("a"))
        return clock.now

    with Claims(folder, lease=60, clock=clock) as first, Claims(folder, lease=60, clock=late) as second:
        assert not first.take("a")
        assert not second.take("a")
        clock.now += 61
        assert not second.take("a")
        assert taken == [True]
        assert not second.take("a")


def test_an_owner_shows_signs_of_life(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    with Claims(folder, lease=0.12) as ours:
        assert ours.take("a")
        os.utime(folder / "a.0", (1, 1))
        deadline = time.monotonic() + 10
        while (folder / "a.0").stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (folder / "a.0").stat().st_mtime > 2


def test_an_owner_that_was_taken_for_dead_may_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    with Claims(folder) as ours:
        assert ours.take("a")
        (folder / "a.0").unlink()
        ours.release("a")
        assert not ours.holds("a")


@pytest.mark.parametrize("links", [True, False])
def test_without_links_or_locks_claims_still_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(locks, "fcntl", None)
    clock = Clock()
    with Claims(tmp_path / "c", 60, clock) as first, Claims(tmp_path / "c", 60, clock) as second:
        assert first.take("a")
        assert not second.take("a")
        assert json.loads((tmp_path / "c" / "a.0").read_text())["locked"] is False
        clock.now += 61
        assert second.take("a")  # the first's heart has not beaten on this clock
        first.release("a")
        second.release("a")


def test_other_failures_of_the_disk_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "link", fail)
    with Claims(tmp_path / "c") as ours, pytest.raises(OSError, match=r"No space left on device: '.*/c/a.0'"):
        ours.take("a")
    assert not (tmp_path / "c").exists()


def test_a_claim_that_is_being_written_counts_as_alive(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.0").write_text("")
    with Claims(tmp_path / "c") as ours:
        assert not ours.take("a")
    assert living_owners(tmp_path / "c")[0].startswith("process ? on an unknown machine")


def test_only_claims_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    folder.mkdir()
    theirs = ["notes.txt", "a.x", "a.0.bak", "notes.2024", ".unfinished-notes", "a"]
    for name in theirs:
        (folder / name).write_text("somebody's")
        os.utime(folder / name, (1, 1))
    (folder / "a.0").write_text("{}")
    os.symlink(tmp_path, folder / f".unfinished-a.0-{'0' * 8}-{'0' * 12}")
    with Claims(folder, lease=0.0, clock=Clock()) as ours:
        assert ours.take("b")
        assert len(living_owners(folder)) == 2
        ours.sweep({"a", "b"})
        assert (folder / "b.0").exists()
        ours.release("b")
    left = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert left == set(theirs)


def test_a_link_to_a_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "shard-000001.0").touch()
    (tmp_path / "claims").symlink_to("theirs")
    with pytest.raises(FileExistsError, match=r"claims: is a link; nothing is removed or replaced behind it"):
        Claims(tmp_path / "claims")
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["shard-000001.0"]


def test_a_disk_that_failed_leaves_no_claim_that_cannot_be_taken(tmp_path: Path) -> None:
    for call in range(100):
        with fault_at(call, dies=False) as left, suppress(OSError), Claims(tmp_path / "claims") as ours:
            ours.take("a")
        with Claims(tmp_path / "claims") as ours:  # in the same process, which would still hold a forgotten lock
            assert ours.take("a"), call
        if left[0] >= 0:
            return
    pytest.fail("the faults never ended")
