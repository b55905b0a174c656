"""A save replaces the earlier one at once or not at all, and touches nothing that no save wrote."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoint_folders import copy_adapter, copy_backbone, vectors
from safetensors.torch import save_file
from transformers import AutoModel, modeling_utils

Load = Callable[..., Any]


class Disk:
    """Counts what is written below a folder, and can fail at one of these steps, as a full disk does."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.fails_at, self.steps = -1, 0
        self.before_a_move: Callable[[], Any] = int

    def step(self, place: Any) -> None:
        if self.folder is None or not isinstance(place, (str, os.PathLike)):
            return
        if self.folder not in (Path(place), *Path(place).parents):
            return
        self.steps += 1
        if self.steps == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device", str(place))

    def audit(self, event: str, given: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        writes = event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+")
        if writes or (event == "os.mkdir" and not Path(given[0]).exists()):
            self.step(given[0])
        elif event == "os.rename":
            self.before_a_move()
            self.step(given[1])

    @contextmanager
    def watch(self, folder: Path, fails_at: int = -1) -> Iterator[None]:
        self.folder, self.fails_at, self.steps = folder, fails_at, 0
        try:
            yield
        finally:
            self.folder, self.before_a_move = None, int


DISK = Disk()
sys.addaudithook(DISK.audit)


@pytest.fixture(autouse=True)
def watched_flushes_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python does not announce: waiting for the disk, and the weights, which Rust writes."""
    flush, save = os.fsync, modeling_utils.safe_save_file

    def counted_flush(handle: int) -> None:
        DISK.step(DISK.folder)
        flush(handle)

    def counted_save(tensors: Any, file: Any, **options: Any) -> None:
        DISK.step(file)
        save(tensors, file, **options)

    monkeypatch.setattr(os, "fsync", counted_flush)
    monkeypatch.setattr(modeling_utils, "safe_save_file", counted_save)


def content(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def changed(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    other.config.max_length = 199
    return other


def test_a_filesystem_that_cannot_force_a_folders_names(
    load_release: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    load_release("tiny-llada", "llada-q4p4").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").is_file()


def test_a_system_that_forces_no_file_opened_for_reading(load_release: Load, tmp_path: Path) -> None:
    """As Windows."""

    def refuse(handle: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    windows = SimpleNamespace(**{**vars(os), "name": "nt", "fsync": refuse})
    model = load_release("tiny-llada", "llada-q4p4")
    with mock.patch.dict(type(model).save_pretrained.__globals__["copy_files"].__globals__, {"os": windows}):
        model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").is_file()


@pytest.fixture
def model(load_release: Load) -> Any:
    return load_release("tiny-llada", "llada-q4p4")


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "sizes"), [(1, ("5GB", "500KB")), (2, ("500KB", "300KB")), (3, ("500KB", "5GB"))], ids=str
)
def test_a_failure_at_every_write_leaves_the_earlier_save(
    first: int, sizes: tuple[str, str], model: Any, tmp_path: Path
) -> None:
    """Each case fails at every third write, and every write is of some case."""
    saved, other = tmp_path / "saved", changed(model)
    model.save_pretrained(saved, max_shard_size=sizes[0])
    (saved / "notes.txt").write_text("mine")
    (saved / "mine.safetensors").write_bytes(b"mine")
    before = content(saved)
    shutil.copytree(saved, tmp_path / "copy")
    with DISK.watch(tmp_path / "copy"):
        other.save_pretrained(tmp_path / "copy", max_shard_size=sizes[1])
        steps = DISK.steps
    assert steps > 60
    for step in range(first, steps + 1, 3):
        with pytest.raises(OSError, match="No space left"), DISK.watch(saved, step):
            other.save_pretrained(saved, max_shard_size=sizes[1])
        assert content(saved) == before, step
    other.save_pretrained(saved, max_shard_size=sizes[1])
    after = content(saved)
    assert {name for name in before if before[name] != after.get(name)} >= {"config.json"}
    assert (after["notes.txt"], after["mine.safetensors"]) == (before["notes.txt"], before["mine.safetensors"])
    assert ("model.safetensors" in after) == (sizes[1] == "5GB") != ("model.safetensors.index.json" in after)
    again = AutoModel.from_pretrained(saved, trust_remote_code=True, torch_dtype=torch.float32)
    assert again.config.max_length == 199
    assert all(torch.equal(a, b) for a, b in zip(vectors(again), vectors(other), strict=True))


def test_a_failure_in_a_new_folder_leaves_none(model: Any, tmp_path: Path) -> None:
    with DISK.watch(tmp_path / "first"):
        model.save_pretrained(tmp_path / "first")
        steps = DISK.steps
    for step in (*range(1, steps, 5), steps):
        with pytest.raises(OSError, match="No space left"), DISK.watch(tmp_path / "new", step):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists(), step


def test_a_save_that_is_killed_is_never_half_of_each(model: Any, tmp_path: Path) -> None:
    """Wherever it stops, a folder with a config.json holds the files of one save, and nothing is lost."""
    saved, states = tmp_path / "saved", []
    model.save_pretrained(saved, max_shard_size="500KB")
    before = content(saved)
    with DISK.watch(saved):
        DISK.before_a_move = lambda: states.append(content(saved))
        changed(model).save_pretrained(saved, max_shard_size="300KB")
    after = content(saved)
    assert len(states) > 30
    for state in states:
        here = {name: digest for name, digest in state.items() if ".saving-" not in name}
        assert "config.json" not in here or here in (before, after)
        assert set(before.items()) <= {(name.rsplit("/", 1)[-1], digest) for name, digest in state.items()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "holds model.safetensors, but no config.json that says whose it is"),
        ("pytorch_model.bin", "holds pytorch_model.bin, but no config.json"),
        ("model-00001-of-00009.safetensors", "holds model-00001-of-00009.safetensors, but no config.json"),
        ("tokenizer.json", "tokenizer.json was not written by an earlier save, and is not overwritten"),
        ("scoring.py", "scoring.py was not written by an earlier save"),
        ("chat_template.jinja", "chat_template.jinja was not written by an earlier save"),
    ],
)
def test_files_of_others_are_not_overwritten(name: str, words: str, model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(ValueError, match=words) as failure:
        model.save_pretrained(folder)
    assert str(folder) in str(failure.value)
    assert content(folder) == {name: hashlib.sha256(b"mine").hexdigest()}


@pytest.mark.parametrize("kind", ["backbone", "adapter", "broken", "list"])
def test_another_models_folder_is_refused(kind: str, model: Any, tmp_path: Path) -> None:
    if kind == "adapter":
        folder = copy_adapter("llada-q4p4", tmp_path / "other")
    else:
        folder = copy_backbone("llada", tmp_path / "other")
    if kind in ("broken", "list"):
        (folder / "config.json").write_text({"broken": "{", "list": "[" * 100_000 + "]" * 100_000}[kind])
    before = content(folder)
    with pytest.raises(ValueError, match=r"holds (another model|adapter_model\.safetensors, but no config\.json)"):
        model.save_pretrained(folder)
    assert content(folder) == before


def test_only_what_the_earlier_index_lists_is_removed(model: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size="500KB")
    listed = {name for name in content(saved) if name.startswith(("model-", "model."))}
    save_file({"x": torch.zeros(3)}, saved / "model-00007-of-00009.safetensors")
    (saved / "adapter").mkdir()
    (saved / "adapter" / "notes.txt").write_text("mine")
    model.save_pretrained(saved)
    names = set(content(saved))
    assert {"model-00007-of-00009.safetensors", "adapter/notes.txt", "model.safetensors"} <= names
    assert len(listed) > 2
    assert not listed & names


def test_an_index_cannot_have_files_of_others_removed(model: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size="500KB")
    (tmp_path / "precious.safetensors").write_text("mine")
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "../precious.safetensors"
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    model.save_pretrained(saved)
    assert (tmp_path / "precious.safetensors").read_text() == "mine"


def test_a_shard_that_is_not_listed_is_not_overwritten(model: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    model.save_pretrained(tmp_path / "other", max_shard_size="500KB")
    model.save_pretrained(saved)
    shard = sorted((tmp_path / "other").glob("model-*.safetensors"))[0].name
    (saved / shard).write_text("mine")
    before = content(saved)
    with pytest.raises(ValueError, match=f"{shard} was not written by an earlier save"):
        model.save_pretrained(saved, max_shard_size="500KB")
    assert content(saved) == before


def test_links_to_code_are_replaced_and_not_followed(model: Any, tmp_path: Path) -> None:
    """Releases inside the source tree link to its code."""
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    (tmp_path / "scoring.py").write_text("mine")
    (saved / "scoring.py").unlink()
    (saved / "scoring.py").symlink_to("../scoring.py")
    model.save_pretrained(saved)
    assert (tmp_path / "scoring.py").read_text() == "mine"
    assert not (saved / "scoring.py").is_symlink()


def test_only_the_main_process_writes(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_sentence_transformers_loads_what_was_saved(model: Any, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model.save_pretrained(tmp_path / "saved-for-st")
    options: Any = {"torch_dtype": torch.float32}
    loaded = sentence_transformers.SentenceTransformer(
        str(tmp_path / "saved-for-st"), trust_remote_code=True, model_kwargs=options
    )
    expected = torch.nn.functional.normalize(model.encode_texts(["a cat"], True).repr_hidden.mean(1), dim=-1)
    found = torch.from_numpy(loaded.encode_query(["a cat"]))
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
