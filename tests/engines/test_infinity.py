"""Infinity, started as a user starts it, gives the vectors of AutoModel: one or several of a text."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_folders import ROOT, edit_json
from started_server import free_port, started
from transformers import AutoModel

pytest.importorskip("infinity_emb", reason="Infinity has an environment of its own: .ci/engine infinity")
pytestmark = [pytest.mark.slow, pytest.mark.once]

RELEASE = ROOT / "checkpoints" / "diffretriever-dream-tiny-multi-q4-p16"  # K_q is not K_p
QUERIES = ["play music from the internet", "what is a <|query|>", "SQL"]
PASSAGES = [
    "A fast HTTP daemon; it serves <|mask|> pages<|im_end|> too.",
    "<|query|> where a passage's text begins",
    "Ünïcödé 文字 🙂\nand a second line.",
    "Copies directories to a remote machine incrementally and compresses them. " * 12,
    "",
]
Embed = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release as one that Infinity takes for a ColBERT model, as docs/infinity.md makes it."""
    folder = tmp_path_factory.mktemp("infinity") / "several"
    shutil.copytree(RELEASE, folder)
    backbone = (RELEASE / json.loads((RELEASE / "config.json").read_text())["base_model_name_or_path"]).resolve()
    edit_json(folder / "config.json", architectures=["DiffRetrieverColBERT"], base_model_name_or_path=str(backbone))
    return folder


@pytest.fixture(scope="module")
def embed(several: Path) -> Iterator[Embed]:
    """Start Infinity; return a function that asks it for the embeddings of texts."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    program = str(Path(sys.executable).with_name("infinity_emb"))
    models = ("--model-id", str(RELEASE), "--served-model-name", "one", "--model-id", str(several))
    options = ("--served-model-name", "several", "--no-model-warmup", "--device", "cpu", "--host", "127.0.0.1")
    command = [program, "v2", *models, *options, "--port", str(port)]
    environment = {**os.environ, "DO_NOT_TRACK": "1"}

    def ask(model: str, texts: list[str], **fields: str) -> list[Any]:
        body = json.dumps({"model": model, "input": texts, **fields}).encode()
        request = urllib.request.Request(f"{address}/embeddings", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return [entry["embedding"] for entry in json.load(answer)["data"]]

    with started(command, address, several.parent / "server.log", 180, env=environment):
        yield ask


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """The vectors of each text, float32 [K, H], queries first."""
    model = AutoModel.from_pretrained(RELEASE, trust_remote_code=True, torch_dtype=torch.float32).eval()
    sides = [model.encode_texts(texts, side).repr_hidden for texts, side in ((QUERIES, True), (PASSAGES, False))]
    return [vectors for side in sides for vectors in side]


TEXTS = [*(f"<|query|>{text}" for text in QUERIES), *(f"<|document|>{text}" for text in PASSAGES)]


def test_one_vector(embed: Embed, expected: list[torch.Tensor]) -> None:
    found = torch.tensor(embed("one", TEXTS))
    means = torch.stack([vectors.mean(dim=0) for vectors in expected])
    assert torch.allclose(found, torch.nn.functional.normalize(means, dim=-1), atol=3e-6)


def test_several_vectors(embed: Embed, expected: list[torch.Tensor]) -> None:
    """Both sides in one request: each text has its side's number of vectors, none of padding."""
    found = [torch.tensor(rows) for rows in embed("several", TEXTS)]
    assert [tuple(rows.shape) for rows in found] == [tuple(vectors.shape) for vectors in expected]
    assert all(torch.allclose(rows, vectors, atol=3e-6) for rows, vectors in zip(found, expected, strict=True))


def test_several_vectors_for_openai_s_client(embed: Embed, expected: list[torch.Tensor]) -> None:
    """It asks for base64; the vectors of a text then come one behind the other."""
    for answer, vectors in zip(embed("several", TEXTS, encoding_format="base64"), expected, strict=True):
        found = np.frombuffer(base64.b64decode(answer), dtype=np.float32)
        assert np.allclose(found, vectors.flatten().numpy(), atol=3e-6)


def test_without_a_tag_a_text_is_a_passage(embed: Embed, expected: list[torch.Tensor]) -> None:
    [found] = embed("several", [PASSAGES[2]])
    assert torch.allclose(torch.tensor(found), expected[len(QUERIES) + 2], atol=3e-6)
