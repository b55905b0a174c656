"""Texts in, dense and sparse vectors out, around an engine that knows neither."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_backbones import TEXTS
from served import PlainEngine

from diffretriever.files.sealed import seal
from diffretriever.serving.plain_model import export_plain
from diffretriever.serving.text_server import TextServer
from diffretriever.store.identity import describe_model
from diffretriever.store.manifest import Settings

pytestmark = pytest.mark.once


@pytest.mark.parametrize(("side", "is_query"), [("query", True), ("passage", False), ("document", False)])
def test_vectors_are_those_of_encode_texts(side: str, is_query: bool, tiny: Any, engine: PlainEngine) -> None:
    texts = [*TEXTS, "no end " * 300]
    answer = engine({"side": side, "texts": texts, "allow_empty": True})
    ours = tiny.encode_texts(texts, is_query)
    assert len(answer["vectors"]) == len(texts)
    for number, found in enumerate(answer["vectors"]):
        dense = np.frombuffer(base64.b64decode(found["dense"]), "<f4").reshape(ours.repr_hidden[number].shape)
        assert np.allclose(dense, ours.repr_hidden[number], atol=2e-6)
        kept = ours.sparse_values[number] > 0
        assert found["sparse"]["indices"] == ours.sparse_indices[number][kept].tolist()
        assert np.allclose(found["sparse"]["values"], ours.sparse_values[number][kept], atol=5e-6)
    assert [found["tokens"] for found in answer["vectors"]][-1] == tiny.texts.layouts[is_query].room


def test_a_description_is_what_stores_of_the_release_say(tiny: Any, engine: PlainEngine) -> None:
    """Exported or not, it is one model."""
    answer = engine({"describe": True})
    for side, is_query in (("query", True), ("passage", False)):
        said = Settings(**answer["description"]["settings"][side])
        assert said.differences(describe_model(tiny, is_query, "float32")) == {}
        assert said.library_versions["vllm"] == "in this process"
    assert answer["model"] == engine({"side": "query", "texts": ["a"]})["model"]
    assert answer["description"]["mode"] == "multi_dense"


def test_another_dtype_is_another_model(plain: Path, engine: PlainEngine) -> None:
    """Its vectors are rounded otherwise; a store is told so."""
    other = TextServer(plain, torch.bfloat16, {})
    [said] = [other.answer([(other.prompts({"describe": True})[0], torch.zeros(1, 1))])]
    assert said["description"]["settings"]["query"]["options"]["model_dtype"] == "bfloat16"
    assert said["model"] != engine({"describe": True})["model"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"side": "sentence", "texts": ["a"]}, "`side` is 'sentence'"),
        ({"side": ["query"], "texts": ["a"]}, r"`side` is \['query'\]"),
        ({"side": "query", "texts": []}, r"`texts` is \[\]"),
        ({"side": "query", "texts": "a"}, "`texts` is 'a'"),
        ({"side": "query", "texts": ["a", None]}, r"`texts\[1\]` is None"),
        ({"side": "query", "texts": ["a", " \n"]}, r"`texts\[1\]` has no words"),
        ({"side": "passage", "texts": [""], "allow_empty": "yes"}, r"`texts\[0\]` has no words"),
        ({"texts": ["a"]}, r"got \['texts'\]"),
        ({"side": "query", "texts": ["a"], "top_k": 3}, r"got \['side', 'texts', 'top_k'\]"),
        ({"describe": 1}, r"got \['describe'\]"),
        (["a"], "got list"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(data: Any, told: str, engine: PlainEngine) -> None:
    with pytest.raises(ValueError, match=f'`data` must be {{"side": "query" or "passage".*{told}'):
        engine(data)


def test_what_is_not_finite_is_no_answer(engine: PlainEngine) -> None:
    [ids] = engine.server.prompts({"side": "query", "texts": ["a"]})
    with pytest.raises(RuntimeError, match="not finite"):
        engine.server.answer([(ids, torch.full((4, 48), torch.nan))])


def test_an_altered_folder_is_not_served(plain: Path, tmp_path: Path) -> None:
    """It says which model it is, and another's weights would say the same."""
    folder = Path(shutil.copytree(plain, tmp_path / "plain"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\x00\x00\x80\x3f" * 2)
    with pytest.raises(ValueError, match=r"holds model\.safetensors with other content than was written.*export it"):
        TextServer(folder, torch.float32, {})
    (folder / "serving.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no serving\.json; .*export-vllm RELEASE"):
        TextServer(folder, torch.float32, {})


def test_an_export_of_other_code_is_not_served(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "plain"))
    facts = json.loads((folder / "serving.json").read_text())
    facts["settings"]["passage"]["model_parts"]["code"]["sparse_head"] = "0" * 64
    (folder / "serving.json").write_text(json.dumps(facts))
    seal(folder, {})
    with pytest.raises(ValueError, match=r"exported with other code of diffretriever \(sparse_head\); export it again"):
        TextServer(folder, torch.float32, {})


def test_the_head_may_be_stored_in_another_dtype_than_is_served(
    load_release: Callable[..., Any], tmp_path: Path
) -> None:
    """bfloat16 weights served in float32: the logits are float32's, too."""
    halved = load_release("tiny-llada", "llada-q4p4", torch_dtype=torch.bfloat16)
    export_plain(halved, tmp_path / "plain")
    engine = PlainEngine(tmp_path / "plain")
    whole = load_release("tiny-llada", "llada-q4p4", torch_dtype=torch.bfloat16, merge_adapter=True).float()
    try:
        expected = whole.encode_texts(TEXTS[:1], True)
    finally:
        whole.bfloat16()
    [found] = engine({"side": "query", "texts": TEXTS[:1]})["vectors"]
    kept = expected.sparse_values[0] > 0
    assert found["sparse"]["indices"] == expected.sparse_indices[0][kept].tolist()
    assert np.allclose(found["sparse"]["values"], expected.sparse_values[0][kept], atol=5e-6)
