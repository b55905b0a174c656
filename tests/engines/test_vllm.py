"""vLLM, started as a user starts it on an exported release, gives the vectors of AutoModel, dense and sparse."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_folders import ROOT
from started_server import free_port, started
from transformers import AutoModel

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/engine vllm")
pytestmark = [pytest.mark.slow, pytest.mark.once]

from diffretriever.serving.plain_model import export_plain  # noqa: E402

RELEASES = ["diffretriever-llada-tiny-multi-q4-p4", "diffretriever-dream-tiny-multi-q4-p16"]
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
TEXTS = [
    "what causes the seasons on earth",
    "",
    'He said "stop" <|eot_id|><|im_end|><|endoftext|> <|mdm_mask|> and went on',
    "package manager for Debian systems with dependency resolution and signed archives",
    "no end " * 300,
    "naïve café 😀 日本語",
]


class Server:
    """vLLM on an exported release, and the release in this process."""

    def __init__(self, model: Any, folder: Path, address: str) -> None:
        self.model, self.folder, self.address = model, folder, address

    def ask(self, body: dict[str, Any]) -> Any:
        """Return what /pooling answers, or the status of a refusal and its words."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/pooling", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]


@pytest.fixture(scope="module", params=RELEASES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = AutoModel.from_pretrained(ROOT / "checkpoints" / request.param, torch_dtype=torch.float32)
    folder = tmp_path_factory.mktemp("vllm") / "plain"
    length = export_plain(model, folder)["max_model_len"]
    port = free_port()
    options = f"--runner pooling --dtype float32 --max-model-len {length} --host 127.0.0.1 --port {port}".split()
    options += "--enforce-eager --max-num-seqs 16 --max-num-batched-tokens 1024".split()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
    address = f"http://127.0.0.1:{port}"
    place = folder.parent  # where no other installation of this package lies
    environment = {**os.environ, **SMALL, **OFFLINE}
    with started(command, address, place / "server.log", 400, cwd=place, env=environment):
        yield Server(model, folder, address)


@pytest.mark.parametrize("side", ["query", "passage"])
def test_dense_and_sparse(server: Server, side: str) -> None:
    answer = server.ask({"data": {"side": side, "texts": TEXTS, "allow_empty": True}})["data"]
    ours = server.model.encode_texts(TEXTS, side == "query")
    for number, found in enumerate(answer["vectors"]):
        dense = np.frombuffer(base64.b64decode(found["dense"]), "<f4").reshape(ours.repr_hidden[number].shape)
        assert np.allclose(dense, ours.repr_hidden[number], atol=2e-6)
        kept = ours.sparse_values[number] > 0
        assert found["sparse"]["indices"] == ours.sparse_indices[number][kept].tolist()
        assert np.allclose(found["sparse"]["values"], ours.sparse_values[number][kept], atol=5e-6)


def test_without_the_plugin_s_requests(server: Server) -> None:
    """The README's own client, which sends token ids, is answered beside."""
    code = re.search(r"```python\n(.*?)```", (server.folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    defined: dict[str, Callable[..., Any]] = {}
    exec(code[1].rpartition("print(")[0], defined)
    for side in ("query", "passage"):
        found = torch.tensor(defined["encode"](TEXTS, side, server.address))
        assert torch.allclose(found, server.model.encode_texts(TEXTS, side == "query").repr_hidden, atol=2e-6)


@pytest.mark.parametrize(
    "data",
    [{"side": "sentence", "texts": ["a"]}, {"side": "query", "texts": [" "]}, {"side": "query", "texts": []}, []],
)
def test_a_wrong_request_is_the_asker_s(server: Server, data: Any) -> None:
    status, told = server.ask({"data": data})
    assert status == 400
    assert told.startswith('`data` must be {"side": "query" or "passage"')


def test_the_server_says_what_it_serves(server: Server) -> None:
    said = server.ask({"data": {"describe": True}})["data"]
    settings = said["description"]["settings"]["query"]
    assert settings["library_versions"]["vllm"].startswith("0.")
    assert settings["options"]["model_dtype"] == "float32"
    assert said["model"] == server.ask({"data": {"side": "query", "texts": ["a"]}})["data"]["model"]
