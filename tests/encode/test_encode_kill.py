"""A process killed at any call that changes a file: what it leaves, and that only missing work is done again."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults import CHANGES
from store_helpers import folder_bytes, made_up_texts, silent

from diffretriever.encode.encode_store import encode_store
from diffretriever.files import durable
from diffretriever.store.store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def encode(model: Any, corpus: Path, folder: Path) -> Store:
    return encode_store(model, corpus, folder, shard_size=4, tokens_per_batch=300, tell=silent)


def kill_at(call: int) -> None:
    """Kill this process at its n-th change of the disk; a write has then written half of its bytes."""
    remaining = [call]

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] < 0:
                if name == "write":
                    original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return watched

    for name in CHANGES:
        setattr(os, name, watch(name, getattr(os, name)))


def encode_until(call: int, model: Any, corpus: Path, folder: Path) -> None:
    """Encode until killed."""
    kill_at(call)
    encode(model, corpus, folder)


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_encoded(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list to which the token ids of all encoded texts are added."""
    encoded: list[list[int]] = []
    original = model.encode_prepared

    def counting(prepared: list[Any], *arguments: Any, **options: Any) -> Any:
        encoded.extend(text.text_ids for text in prepared)
        return original(prepared, *arguments, **options)

    monkeypatch.setattr(model, "encode_prepared", counting)
    return encoded


@pytest.mark.slow
def test_killed_at_every_change_of_the_disk(
    tiny: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = folder_bytes(encode(tiny, corpus, tmp_path / "whole").folder)
    all_texts = [text.text_ids for text in tiny.texts.prepare([text for _, text in made_up_texts(11)], is_query=False)]
    encoded = count_encoded(tiny, monkeypatch)
    survivors = set()
    for call in range(1000):
        folder = tmp_path / f"killed-{call}"
        status = in_child(partial(encode_until, call, tiny, corpus, folder))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("shard-*.safetensors")}
        for name in kept:  # a shard that is there is whole
            assert (folder / name).read_bytes() == whole[name]
        if not (folder / "manifest.json").exists() and folder.exists():
            with pytest.raises((ValueError, FileNotFoundError), match=r"not finished|no store here"):
                Store.open(folder)
        encoded.clear()
        encode(tiny, corpus, folder)
        assert folder_bytes(folder) == whole
        missing = [text for number in range(3) if f"shard-{number:06d}.safetensors" not in kept for text in
                   all_texts[4 * number : 4 * number + 4]]  # fmt: skip
        assert sorted(encoded) == sorted(missing)
        assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
        survivors.add(len(kept))
    else:
        pytest.fail("the process never ended by itself")
    assert survivors == {0, 1, 2, 3}
    assert call > 60  # claims, plan, shards and manifest all change the disk


@pytest.mark.slow
def test_killed_again_and_again(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    whole = folder_bytes(encode(tiny, corpus, tmp_path / "whole").folder)
    numbers = random.Random(0)
    for series in range(4):
        folder = tmp_path / f"series-{series}"
        for _ in range(5):
            call = numbers.randrange(60)
            in_child(partial(encode_until, call, tiny, corpus, folder))
        encode(tiny, corpus, folder)
        assert folder_bytes(folder) == whole


def test_a_file_gets_its_name_only_after_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noting(name: str, original: Callable[..., Any], *arguments: Any) -> Any:
        calls.append(name)
        return original(*arguments)

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, partial(noting, name, getattr(os, name)))
    durable.write_whole(tmp_path / "file", [b"one", b"two"])
    assert calls == ["write", "write", "fsync", "replace", "fsync"]  # the last one is the folder's
    assert (tmp_path / "file").read_bytes() == b"onetwo"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_bytes_do_not_depend_on_who_encodes_a_shard(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    """Each shard is encoded by a process of its own, the last first."""
    whole = folder_bytes(encode(tiny, corpus, tmp_path / "whole").folder)
    folder = tmp_path / "parts"
    for keep in (2, 1, 0):
        encode(tiny, corpus, folder)
        for number in range(3):
            if number != keep and keep:
                (folder / f"shard-{number:06d}.safetensors").unlink()
    assert folder_bytes(folder) == whole
