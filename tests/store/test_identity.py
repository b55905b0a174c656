"""Which model made a store: told by the files it was really loaded from."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PARITY, copy_backbone, edit_json, edit_weights, hub_repository, run_python, shard
from store_helpers import made_up_texts, silent, write_jsonl
from transformers import AutoModel

from diffretriever.encode.encode_store import encode_store
from diffretriever.publishing import build as building
from diffretriever.store.identity import check_searchable, describe_model, hash_files, hash_weights


def load(release: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(release, trust_remote_code=True, torch_dtype=torch.float32, **options)


def test_weights_are_known_by_their_content(build_release: Callable[..., Path], tmp_path: Path) -> None:
    adapter = build_release("tiny-llada", "llada-q4p4") / "adapter"
    copy = tmp_path / "another-name" / "adapter_model.safetensors"
    copy.parent.mkdir()
    copy.write_bytes((adapter / copy.name).read_bytes())
    assert hash_files([copy]) == hash_files([adapter / copy.name])

    def nudge(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values())).flatten()[0] += 1e-6

    edit_weights(copy, nudge)
    assert hash_files([copy]) != hash_files([adapter / copy.name])
    copy.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        hash_files([copy])


def test_every_shard_counts_whatever_it_is_called(tmp_path: Path) -> None:
    folder = copy_backbone("llada", tmp_path / "sharded")
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00003.safetensors", "second.part"))
    last = folder / "second.part"
    (folder / "model-00002-of-00003.safetensors").rename(last)
    before = hash_weights(folder)
    edit_weights(last, lambda tensors: next(iter(tensors.values())).mul_(2))
    assert hash_weights(folder) != before
    (folder / "of-another-model.safetensors").write_bytes(b"x")
    last.unlink()
    with pytest.raises(FileNotFoundError, match=r"second\.part"):
        hash_weights(folder)


@pytest.mark.parametrize("place", ["hub/models--lab--x", "elsewhere/models--lab--x", "hub/deeper/models--lab--x"])
def test_names_of_files_are_believed_in_the_cache_of_the_hub_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    blob, folder = tmp_path / place / "blobs" / ("ab" * 32), tmp_path / place / "snapshots" / ("c" * 40)
    blob.parent.mkdir(parents=True)
    folder.mkdir(parents=True)
    blob.write_bytes(b"one")
    weights = folder / "model.safetensors"
    weights.symlink_to(os.path.relpath(blob, folder))
    before = hash_files([weights])
    blob.write_bytes(b"another")
    assert (hash_files([weights]) == before) == (place == "hub/models--lab--x")


@pytest.mark.parametrize(
    ("option", "folder"), [("adapter_name_or_path", "adapter"), ("base_model_name_or_path", "backbone")]
)
def test_a_folder_of_the_working_directory_is_not_taken_for_the_release_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, folder: str
) -> None:
    """What the caller names starts at the working directory, what the release names starts at the release."""
    release, own = tmp_path / f"release-{tmp_path.name}", PARITY / "backbones" / "tiny-llada"
    building.build(str(own), release, str(PARITY / "adapters" / "llada-q4p4"))
    shutil.copytree(own, release / "backbone")
    edit_json(release / "config.json", base_model_name_or_path="backbone")
    other = tmp_path / "work" / folder
    shutil.copytree(release / folder, other)

    def nudge(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values())).flatten()[0] += 1.0

    edit_weights(next(other.glob("*.safetensors")), nudge)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", made_up_texts(3))
    encode_store(load(release), corpus, tmp_path / "store", tell=silent)
    monkeypatch.chdir(other.parent)
    chosen = load(release, **{option: folder})
    loaded = {"adapter_name_or_path": chosen.loaded_from.adapter, "base_model_name_or_path": chosen.loaded_from.weights}
    assert loaded[option] == other.resolve()
    monkeypatch.chdir(tmp_path)  # a relative name would now mean nothing
    with pytest.raises(ValueError, match=r"as it is no longer: other `(adapter|weights)`. Give"):
        encode_store(chosen, corpus, tmp_path / "store", tell=silent)
    with pytest.raises(
        ValueError,
        match=r"store: its passages were made by .* as it is no longer: other `(adapter|weights)`. Encode both",
    ):
        check_searchable(
            describe_model(load(release), False, "float16"), describe_model(chosen, True, "float16"), "store"
        )
    encode_store(load(release), corpus, tmp_path / "store", tell=silent)


def test_a_model_that_was_not_loaded_from_files_is_refused(load_release: Callable[..., Any]) -> None:
    model = copy.copy(load_release("tiny-llada", "llada-q4p4"))
    model.loaded_from = None
    with pytest.raises(ValueError, match=r"does not say which files it was made from. Load it with AutoModel"):
        describe_model(model, False, "float16")


DESCRIBE = """
import sys
from transformers import AutoModel
from diffretriever.store.identity import describe_model
for name, revision in (("org/release", None), ("org/release", "v2"), (sys.argv[1], None)):
    model = AutoModel.from_pretrained(name, trust_remote_code=True, revision=revision)
    settings = describe_model(model, False, "float16")
    print(settings.model, settings.revision, settings.weights_sha256, settings.adapter_sha256)
"""


@pytest.mark.slow
def test_a_release_on_the_hub_and_its_copy_are_one_model(build_release: Callable[..., Path], tmp_path: Path) -> None:
    release = tmp_path / "copied-release"
    shutil.copytree(build_release("tiny-llada", "llada-q4p4"), release)
    hub_repository(tmp_path, "org/backbone", PARITY / "backbones" / "tiny-llada")
    edit_json(release / "config.json", base_model_name_or_path="org/backbone")
    commits = [hub_repository(tmp_path, "org/release", release, refs=(ref,)) for ref in ("main", "v2")]
    printed = run_python(DESCRIBE, release, HF_HUB_CACHE=tmp_path, HF_MODULES_CACHE=tmp_path / "modules")
    rows = [line.split() for line in printed.splitlines()]
    assert [row[:2] for row in rows] == [
        ["org/release", commits[0]],
        ["org/release", commits[1]],
        [str(release), "None"],
    ]
    assert rows[0][2:] == rows[1][2:] == rows[2][2:]
    assert all(len(digest) == 64 for row in rows for digest in row[2:])


def test_queries_of_another_model_cannot_search_the_store(load_release: Callable[..., Any]) -> None:
    tiny = load_release("tiny-llada", "llada-q4p4")
    passages = describe_model(tiny, False, "float16")
    check_searchable(passages, describe_model(tiny, True, "float32"), "store")
    other = describe_model(load_release("tiny-llada"), True, "float32")
    with pytest.raises(
        ValueError, match=r"store: its passages were made by model '.*q4p4.*', not '.*tiny-llada.*': `adapter`.*prompts"
    ):
        check_searchable(passages, other, "store")
