"""What is written durably: whatever call fails, the old content or the new is there, and the next try ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Died, fault_at

from diffretriever.evaluation.plots import style
from diffretriever.evaluation.runs import write_run
from diffretriever.files.durable import publish_folder, write_json
from diffretriever.pretraining import neighbours
from diffretriever.search.export import write_lines
from diffretriever.training.checkpoints import newest_whole, partial_checkpoint, publish_checkpoint, remove_partial

OLD, NEW = "old", "new"
Writer = Callable[[Path, str], Any]


class Figure:
    """A picture whose bytes are a text; matplotlib's own takes a quarter of a second."""

    def __init__(self, text: str) -> None:
        self.text = text

    def savefig(self, file: Any, **_: Any) -> None:
        file.write(self.text.encode())


def write_folder(place: Path, text: str) -> None:
    made = place.parent / "aside" / place.name
    made.mkdir(parents=True, exist_ok=True)
    (made / "file").write_text(text)
    publish_folder(made, place)


def write_checkpoint(folder: Path, text: str) -> None:
    step = 1 + (text == NEW)
    remove_partial(folder)
    made = partial_checkpoint(folder, step)
    made.mkdir(parents=True)
    (made / "state").write_text(text)
    publish_checkpoint(folder, step, keep=1, record={})


def read_checkpoint(folder: Path) -> str:
    found = newest_whole(folder, pytest.fail)
    assert found is not None
    return (found[0] / "state").read_text()


FILES: dict[str, tuple[str, Writer]] = {
    "json": ("a.json", lambda place, text: write_json(place, [text])),
    "lines": ("a.jsonl", lambda place, text: write_lines(place, iter([text, "second"]))),
    "run": ("a.trec", lambda place, text: write_run(place, {text: {"p": 1.0}}, "tag")),
    "plot": ("a.svg", lambda place, text: style.save(Figure(text), place)),
}


def each_fault(write: Callable[[], Any], check: Callable[[], Any]) -> int:
    """Call `write` with every possible fault and `check` after each; return how many there are."""
    for call in range(200):
        for dies in (False, True):
            with fault_at(call, dies) as left:
                if dies:
                    with suppress(Died):
                        write()
                else:
                    with suppress(OSError):
                        write()
            check()
        if left[0] >= 0:
            return call
    pytest.fail("the faults never ended")


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_the_old_one_or_the_new_one(kind: str, tmp_path: Path) -> None:
    name, write = FILES[kind]
    write(tmp_path / "expected" / name, OLD)
    old, place = (tmp_path / "expected" / name).read_bytes(), tmp_path / "made" / name
    write(place, NEW)
    new = place.read_bytes()

    def check() -> None:
        assert place.read_bytes() in (old, new)
        write(place, OLD)
        assert place.read_bytes() == old

    check()
    assert each_fault(lambda: write(place, NEW), check) > 4


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    write_folder(place, OLD)

    def check() -> None:
        there = place if place.is_dir() else tmp_path / "aside" / "folder.replaced"  # died between the two names
        assert (there / "file").read_text() in (OLD, NEW)
        write_folder(place, OLD)
        assert [file.read_text() for file in place.iterdir()] == [OLD]

    assert each_fault(lambda: write_folder(place, NEW), check) > 4


def test_a_whole_checkpoint_is_always_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD)

    def check() -> None:
        assert read_checkpoint(tmp_path) in (OLD, NEW)
        write_checkpoint(tmp_path, OLD)
        assert read_checkpoint(tmp_path) == OLD

    assert each_fault(lambda: write_checkpoint(tmp_path, NEW), check) > 10


def test_neighbours_are_whole_or_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "bm25_neighbours", lambda *_: np.arange(3))
    numbers = iter(range(1000))
    data = ["data"]

    def write() -> Any:
        return neighbours.cached_neighbours([], [], 2, tmp_path, data)

    def check() -> None:
        assert write().tolist() == [0, 1, 2]
        data[0] = f"data {next(numbers)}"  # to be written anew

    assert each_fault(write, check) > 10
