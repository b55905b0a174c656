"""Ids that occur twice, and the model's identity, each against something plain."""

from __future__ import annotations

import shutil
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import PARITY, edit_json, edit_weights, hub_repository, run_python
from hypothesis import given
from hypothesis import strategies as st

from diffretriever.data.ids import find_repeated, repeated_hashes
from diffretriever.files.hashes import hash64
from diffretriever.store.identity import hash_files


@given(st.lists(st.sampled_from([f"id-{number}" for number in range(40)]), max_size=60))
def test_repeated_ids_are_found_and_named(ids: list[str]) -> None:
    found = repeated_hashes(array("q", map(hash64, ids)))
    expected = {text_id for text_id, count in Counter(ids).items() if count > 1}
    assert found.tolist() == sorted(map(hash64, expected))
    named = find_repeated(ids, found)
    assert {text_id for text_id, _, _ in named} <= expected
    assert bool(named) == bool(expected)
    for text_id, first, second in named:
        assert ids[first - 1] == ids[second - 1] == text_id
        assert first == ids.index(text_id) + 1
        assert first < second


def test_different_ids_of_one_hash_are_not_taken_for_one() -> None:
    suspects = np.array([hash64("aa"), hash64("bb")])  # as if each shared its hash with another id
    assert find_repeated(["aa", "bb", "c"], suspects) == []
    assert find_repeated(["aa", "bb", "c", "bb"], suspects) == [("bb", 2, 4)]


def test_weights_are_known_by_their_content(build_release: Callable[..., Path], tmp_path: Path) -> None:
    adapter = build_release("tiny-llada", "llada-q4p4") / "adapter"
    copy = tmp_path / "another-name"
    copy.mkdir()
    (copy / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    assert hash_files(copy) == hash_files(adapter)

    def nudge(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values())).flatten()[0] += 1e-6

    edit_weights(copy / "adapter_model.safetensors", nudge)
    assert hash_files(copy) != hash_files(adapter)
    with pytest.raises(FileNotFoundError, match=r"no .safetensors files; the model's weights are no longer there"):
        hash_files(tmp_path)


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
