"""Releases and backbones from a Hub cache, offline, and local folders that are moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import (
    ADAPTERS,
    KINDS,
    PARITY,
    TEXTS,
    copy_backbone,
    edit_json,
    edit_weights,
    hub_repository,
    run_python,
    vectors,
)
from transformers import AutoModel

from diffretriever.publishing import build as building

Load = Callable[..., Any]
BACKBONES = {"llada": "some-lab/LLaDA-tiny", "dream": "other-lab/Dream-tiny"}


def load(name: Any, **options: Any) -> Any:
    return AutoModel.from_pretrained(name, trust_remote_code=True, torch_dtype=torch.float32, **options)


def same(model: Any, expected: Any) -> bool:
    return all(map(torch.equal, vectors(model), vectors(expected)))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


def built_for_hub(kind: str, folder: Path, **fields: Any) -> Path:
    """A release folder whose backbone is named by Hub id."""
    building.build(str(PARITY / "backbones" / f"tiny-{kind}"), folder, str(PARITY / "adapters" / ADAPTERS[kind]))
    edit_json(folder / "config.json", base_model_name_or_path=BACKBONES[kind], **fields)
    return folder


def other_weights(folder: Path) -> Path:
    """A LLaDA backbone whose weights are others than the parity one's."""
    base = copy_backbone("llada", folder)
    edit_weights(base / "model.safetensors", lambda t: t["model.transformer.blocks.1.up_proj.weight"].zero_())
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_by_hub_id(kind: str, cache: Path, tmp_path: Path, load_release: Load) -> None:
    hub_repository(cache, f"lab/release-{kind}", built_for_hub(kind, tmp_path / "release"))
    hub_repository(cache, BACKBONES[kind], PARITY / "backbones" / f"tiny-{kind}")
    model = load(f"lab/release-{kind}", cache_dir=cache)
    assert same(model, load_release(f"tiny-{kind}", ADAPTERS[kind]))
    assert model.config.name_or_path == f"lab/release-{kind}"
    assert same(load(f"lab/release-{kind}", cache_dir=str(cache), local_files_only=True), model)


FRESH = """
import json, sys, torch
from transformers import AutoModel, AutoConfig
texts = json.loads(sys.argv[1])
for name, kept in zip(sys.argv[2::2], sys.argv[3::2]):
    model = AutoModel.from_pretrained(name, trust_remote_code=True, torch_dtype=torch.float32)
    torch.save(list(model.encode_texts(texts, True).values()), kept)
"""


@pytest.mark.slow
def test_two_releases_by_hub_id_in_a_fresh_process(cache: Path, tmp_path: Path, load_release: Load) -> None:
    """As a user does it: HF_HOME set, no cache_dir, LLaDA and Dream in one process."""
    arguments: list[Any] = []
    for kind in KINDS:
        hub_repository(cache, f"lab/release-{kind}", built_for_hub(kind, tmp_path / kind))
        hub_repository(cache, BACKBONES[kind], PARITY / "backbones" / f"tiny-{kind}")
        arguments += [f"lab/release-{kind}", tmp_path / f"{kind}.pt"]
    run_python(FRESH, json.dumps(TEXTS), *arguments, HF_HOME=tmp_path / "home")
    for kind in KINDS:
        expected = vectors(load_release(f"tiny-{kind}", ADAPTERS[kind]))
        assert all(map(torch.equal, torch.load(tmp_path / f"{kind}.pt"), expected))


def test_revisions_of_release_and_backbone_are_apart(cache: Path, tmp_path: Path, load_release: Load) -> None:
    """The config pins the backbone; the release's own revision says nothing about it."""
    pinned = hub_repository(cache, BACKBONES["llada"], PARITY / "backbones" / "tiny-llada", refs=())
    newer = hub_repository(cache, BACKBONES["llada"], other_weights(tmp_path / "newer"))
    release = built_for_hub("llada", tmp_path / "release", base_model_revision=pinned)
    hub_repository(cache, "lab/revised", release, refs=("v1",))
    edit_json(release / "config.json", base_model_revision=None, num_query_masks=3)
    hub_repository(cache, "lab/revised", release, refs=("main",))
    expected = load_release("tiny-llada", "llada-q4p4")
    by_tag = load("lab/revised", revision="v1", cache_dir=cache)
    assert by_tag.config.num_query_masks == 4
    assert same(by_tag, expected)
    latest = load("lab/revised", cache_dir=cache)
    assert latest.config.num_query_masks == 3
    assert not torch.equal(latest.backbone.layers[1].mlp.up_proj.weight, expected.backbone.layers[1].mlp.up_proj.weight)
    overridden = load("lab/revised", revision="v1", cache_dir=cache, base_model_revision=newer)
    assert all(
        torch.equal(a, b) for a, b in zip(overridden.state_dict().values(), latest.state_dict().values(), strict=True)
    )
    edit_json(release / "config.json", base_model_revision="0" * 40)
    hub_repository(cache, "lab/pinned-elsewhere", release)
    with pytest.raises(OSError, match=r"some-lab/LLaDA-tiny \(revision 0{40}\) could not be had from the Hub nor from"):
        load("lab/pinned-elsewhere", cache_dir=cache)


def test_adapter_by_hub_id(cache: Path, tmp_path: Path, load_release: Load) -> None:
    hub_repository(cache, "lab/an-adapter", PARITY / "adapters" / "llada-q4p4")
    building.build(str(PARITY / "backbones" / "tiny-llada"), tmp_path / "zero-for-hub-adapter")
    model = load(tmp_path / "zero-for-hub-adapter", adapter_name_or_path="lab/an-adapter", cache_dir=cache)
    assert same(model, load_release("tiny-llada", "llada-q4p4"))


def test_backbone_not_in_the_cache(cache: Path, tmp_path: Path) -> None:
    release = built_for_hub("llada", tmp_path / "release-without-backbone")
    words = r"some-lab/LLaDA-tiny could not be had from the Hub nor from its cache.*hf download some-lab/LLaDA-tiny"
    with pytest.raises(OSError, match=words):
        load(release, cache_dir=cache)
    with pytest.raises(OSError, match="find them in the cached files"):
        load("lab/no-release", cache_dir=cache)


def test_backbone_partly_in_the_cache(cache: Path, tmp_path: Path) -> None:
    """A download that was cut off: the snapshot is there, its weights are not."""
    release = built_for_hub("llada", tmp_path / "release-with-part")
    part = copy_backbone("llada", tmp_path / "part")
    (part / "model.safetensors").unlink()
    hub_repository(cache, BACKBONES["llada"], part)
    with pytest.raises(
        FileNotFoundError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        load(release, cache_dir=cache)


# ------------------------------------------------------------------------------------------ folders that move


@pytest.fixture
def siblings(tmp_path: Path) -> Path:
    """A folder with a backbone and, beside it, a release of it."""
    place = tmp_path / "siblings"
    copy_backbone("llada", place / "backbone")
    adapter = str(PARITY / "adapters" / "llada-q4p4")
    building.build(str(place / "backbone"), place / f"release-{tmp_path.name}", adapter)
    return place


def release_in(place: Path) -> Path:
    return next(place.glob("release-*"))


def test_siblings_move_together(siblings: Path, tmp_path: Path, load_release: Load) -> None:
    fields = json.loads((release_in(siblings) / "config.json").read_text())
    assert fields["base_model_name_or_path"] == "../backbone"
    assert fields["base_model_revision"] is None
    moved = siblings.rename(tmp_path / "moved")
    assert same(load(release_in(moved)), load_release("tiny-llada", "llada-q4p4"))


def test_moved_away_alone(siblings: Path, tmp_path: Path, load_release: Load) -> None:
    alone = shutil.move(release_in(siblings), tmp_path / "elsewhere" / release_in(siblings).name)
    with pytest.raises(
        FileNotFoundError, match=r"backbone is not there.*moved, pass its new place as `base_model_name"
    ):
        load(alone)
    model = load(alone, base_model_name_or_path=siblings / "backbone")
    assert same(model, load_release("tiny-llada", "llada-q4p4"))


def test_absolute_backbone_and_moved_release(tmp_path: Path, load_release: Load) -> None:
    base = copy_backbone("llada", tmp_path / "far" / "away" / "backbone")
    release = tmp_path / f"release-{tmp_path.name}"
    building.build(str(base), release, str(PARITY / "adapters" / "llada-q4p4"))
    assert json.loads((release / "config.json").read_text())["base_model_name_or_path"] == str(base)
    moved = shutil.move(release, tmp_path / "deep" / "er" / release.name)
    assert same(load(moved), load_release("tiny-llada", "llada-q4p4"))


def test_any_working_directory(siblings: Path, load_release: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_release("tiny-llada", "llada-q4p4")
    name = release_in(siblings).name
    for directory, path in ((siblings, f"./{name}"), (siblings, name), (siblings / name, "../" + name)):
        monkeypatch.chdir(directory)
        assert same(load(path), expected)
    monkeypatch.chdir(siblings / "backbone")
    assert same(load(f"../{name}", base_model_name_or_path="."), expected)
    assert same(load(f"../{name}", adapter_name_or_path=f"../{name}/adapter"), expected)


def test_through_a_symbolic_link(siblings: Path, tmp_path: Path, load_release: Load) -> None:
    link = tmp_path / "elsewhere" / f"link-{tmp_path.name}"
    link.parent.mkdir()
    link.symlink_to(release_in(siblings))
    assert same(load(link), load_release("tiny-llada", "llada-q4p4"))


def test_adapter_folder_gone(siblings: Path) -> None:
    shutil.rmtree(release_in(siblings) / "adapter")
    with pytest.raises(FileNotFoundError, match=r"adapter is not there.*`adapter_name_or_path` \(adapter\)"):
        load(release_in(siblings))


def test_two_folders_of_one_name(tmp_path: Path) -> None:
    """transformers 4.54 runs one module for both; each still loads its own weights and settings."""
    models = []
    for kind, place in zip(KINDS, ("one", "two"), strict=True):
        release = tmp_path / place / f"same-name-{tmp_path.name}"
        building.build(str(PARITY / "backbones" / f"tiny-{kind}"), release, str(PARITY / "adapters" / ADAPTERS[kind]))
        models.append(load(release))
    assert [model.config.backbone_type for model in models] == list(KINDS)
    assert all(model.encode_texts(TEXTS, True).repr_hidden.isfinite().all() for model in models)
