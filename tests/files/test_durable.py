"""Files and folders that appear whole or not at all, forced to the disk before they get their name."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffretriever.files.durable import (
    check_place,
    publish_folder,
    remove_temporaries,
    temporary_name,
    write_json,
    write_text,
    write_whole,
)
from diffretriever.files.removal import remove_folder


def test_json_and_text_make_their_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "folder" / "values.json", {"ä": [1]})
    assert json.loads((tmp_path / "new" / "folder" / "values.json").read_text(encoding="utf-8")) == {"ä": [1]}
    write_text(tmp_path / "other" / "text.md", "ä †\n")
    assert (tmp_path / "other" / "text.md").read_bytes() == "ä †\n".encode()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    pipe, output, link = tmp_path / "pipe", tmp_path / "stdout", tmp_path / "link"
    os.mkfifo(pipe)
    output.symlink_to("/proc/self/fd/1")  # as /dev/stdout is, wherever that leads
    link.symlink_to(pipe)
    for place in (pipe, output, link):
        for refused in (lambda: write_text(place, "text"), lambda: check_place(place)):  # noqa: B023
            with pytest.raises(FileExistsError, match=f"{place}: is a device or a pipe"):
                refused()
    assert pipe.is_fifo()
    assert [os.readlink(output), os.readlink(link)] == ["/proc/self/fd/1", str(pipe)]
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "file").write_text("old")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_an_error_names_the_file_that_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written may be read from a file that fails, and is not what could not be written."""

    def refuse(path: Path, *_: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def read(error: OSError) -> Iterator[bytes]:
        yield b"first"
        raise error

    for error in (OSError("shard-3: the file cannot be mapped"), OSError(errno.EIO, "Input/output error", "shard-3")):
        with pytest.raises(OSError, match="shard-3") as found:
            write_whole(tmp_path / "out", read(error))
        assert found.value is error
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"file'$"):
        write_whole(tmp_path / "file" / "out", [b""])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(PermissionError, match=r"Permission denied: '.*/out'$"):
            write_whole(tmp_path / "out", [b""])


def test_a_filesystem_that_cannot_force_a_folders_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SMB's: a file's bytes it can, and where it cannot that is an error."""
    fsync, refused = os.fsync, [stat.S_ISDIR]

    def refuse(handle: int) -> None:
        if refused[0](os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "made" / "file", "text")
    publish_folder(tmp_path / "made", tmp_path / "name")
    assert (tmp_path / "name" / "file").read_text() == "text"
    refused[0] = stat.S_ISREG
    with pytest.raises(OSError, match=r"Invalid argument: '.*/file'"):
        write_text(tmp_path / "file", "text")
    with pytest.raises(OSError, match="Invalid argument"):
        publish_folder(tmp_path / "name", tmp_path / "other")


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, place = tmp_path / "aside", tmp_path / "name"
    (made / "inner").mkdir(parents=True)
    for file in (made / "one", made / "inner" / "two"):
        file.write_text(file.name)
    place.mkdir()
    (place / "old").touch()
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        fsync(handle)

    def noted_replace(source: Any, target: Any) -> None:
        done.append("named")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    publish_folder(made, place)
    assert sorted(path.relative_to(place).as_posix() for path in place.rglob("*")) == ["inner", "inner/two", "one"]
    assert (place / "inner" / "two").read_text() == "two"
    assert not made.exists()
    assert sorted(done[:4]) == ["aside", "aside/inner", "aside/inner/two", "aside/one"]
    assert done[4:] == ["named", "named", "."]  # the old one leaves its name, the new one takes it
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_what_is_replaced_stays_until_its_successor_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, place = tmp_path / "scratch" / "name", tmp_path / "name"
    for folder, text in ((made, "new"), (place, "old")):
        folder.mkdir(parents=True)
        (folder / "file").write_text(text)
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(source) == made:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(made, place)
    assert (place / "file").read_text() == "old"
    monkeypatch.setattr(os, "replace", replace)
    publish_folder(made, place)
    assert (place / "file").read_text() == "new"
    assert not list((tmp_path / "scratch").iterdir())


def test_what_is_behind_a_link_is_neither_replaced_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    made = tmp_path / "aside" / "name"
    made.mkdir(parents=True)
    (tmp_path / "name").symlink_to("theirs")
    for work in (lambda: publish_folder(made, tmp_path / "name"), lambda: remove_folder(tmp_path / "name")):
        with pytest.raises(FileExistsError, match=r"name: is a link; nothing is removed"):
            work()
    assert (tmp_path / "name" / "file").exists()
    assert made.is_dir()


def test_only_our_own_unfinished_files_are_removed(tmp_path: Path) -> None:
    ours = temporary_name(tmp_path / "a.json")
    forgotten = tmp_path / f".unfinished-a.json-{'0' * 8}-{'0' * 12}"  # another machine's
    theirs = [tmp_path / name for name in (".unfinished-notes", ".unfinished-thesis-draft-2.txt", "a.json")]
    for file in (ours, forgotten, *theirs):
        file.touch()
        os.utime(file, (1, 1))
    folder = tmp_path / f".unfinished-folder-{'0' * 8}-{'0' * 12}"
    folder.mkdir()
    os.utime(folder, (1, 1))
    remove_temporaries(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*theirs, folder])


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        write_text(tmp_path / "folder", "text")
    assert str(raised.value) == f"[Errno 21] Is a directory: '{tmp_path / 'folder'}'"
