"""The whole way, as a maintainer and a user go it: push by name from the command line, load by Hub id, and check."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import fresh
import pytest
import torch
from checkpoint_folders import ROOT
from fake_hub import TOKEN, FakeHub
from transformers import AutoModel

import publish

NAME = "diffretriever-llada-tiny-single"
LOAD = """
import json, sys
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel

name, texts = "lab/tiny", ["an audio player", "a web server"]
float32 = {"torch_dtype": torch.float32}
model = AutoModel.from_pretrained(name, trust_remote_code=True, revision="v1.0", **float32)
found = {"dense": model.encode_texts(texts, is_query=True)["repr_hidden"][:, 0].tolist()}
try:
    from sentence_transformers import SparseEncoder
except ImportError:
    pass
else:
    encoder = SparseEncoder(name, revision="v1.0-sparse", trust_remote_code=True, model_kwargs=float32)
    found["terms"] = (encoder.encode_query(texts).to_dense() > 0).sum(dim=1).tolist()
found["snapshot"] = snapshot_download(name, revision="v1.0")
model.push_to_hub("lab/again")  # transformers' own way
again = AutoModel.from_pretrained("lab/again", trust_remote_code=True, **float32)
found["again"] = again.encode_texts(texts, is_query=True)["repr_hidden"][:, 0].tolist()
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture
def server() -> Iterator[FakeHub]:
    found = FakeHub()
    found.tokens[TOKEN] = {"name": "someone", "role": "write"}
    yield found
    found.close()


def run(server: FakeHub, tmp_path: Path, *command: str) -> str:
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = fresh.run(command, env=environment, cwd=tmp_path)
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.slow
def test_push_load_check(server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(server, tmp_path, str(ROOT / "publish.py"), "push", NAME, "--repo-id", "lab/tiny", "--tag", "v1.0")
    assert "ok: its vectors in a fresh process are those of the build" in said
    assert said.count("the card's code runs") + said.count("needs another sentence-transformers") == 4
    assert said.count("the card's code runs") >= 2
    assert "lab/tiny: the tag v1.0 names commit" in said
    assert {file.name for file in tmp_path.iterdir()} <= {"home"}  # nothing else is left behind
    run(server, tmp_path, "-c", LOAD, str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    here = AutoModel.from_pretrained(ROOT / "checkpoints" / NAME, trust_remote_code=True, torch_dtype=torch.float32)
    out = here.encode_texts(["an audio player", "a web server"], is_query=True)
    for way in ("dense", "again"):
        assert torch.allclose(torch.tensor(found[way]), out["repr_hidden"][:, 0], atol=1e-5), way
    if "terms" in found:
        assert found["terms"] == (out["sparse_values"] > 0).sum(dim=1).tolist()
    assert publish.main(["check", found["snapshot"], "--no-load"]) == 0
    assert "files are as they were built" in capsys.readouterr().out
    for file in (tmp_path / "home").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
