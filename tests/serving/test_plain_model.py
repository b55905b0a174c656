"""A release exported as a plain Llama or Qwen2: read by transformers' own classes it gives our vectors."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import stat
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_backbones import TEXTS, make_adapter, make_backbone
from faults import fault_at
from transformers import AutoModel, LlamaModel, Qwen2Model

from diffretriever.cli.main import main
from diffretriever.files.sealed import check_seal
from diffretriever.publishing import build as building
from diffretriever.serving.plain_model import export_plain

RELEASES = {"llada": ("tiny-llada", "llada-q4p4"), "dream": ("tiny-dream", "dream-q4p16")}
MASKS = {"llama-tied": "<|reserved_token_0|>", "qwen2": "<|object_ref_start|>"}
KINDS = (*RELEASES, *MASKS)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, load_release: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of each kind of backbone one, with an adapter that touches the head where it may."""
    kind = request.param
    if kind in RELEASES:
        return load_release(*RELEASES[kind])
    folder = tmp_path_factory.mktemp("native")
    backbone = make_backbone(kind, folder / kind)
    adapter = make_adapter(backbone, folder / "adapter", head=kind == "qwen2")
    budgets: dict[str, Any] = {"num_query_masks": 2, "num_passage_masks": 3, "max_length": 156}
    building.build(str(backbone), folder / f"plain-{kind}", str(adapter), mask_token=MASKS[kind], **budgets)
    return AutoModel.from_pretrained(folder / f"plain-{kind}", trust_remote_code=True, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def exported(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "plain"
    export_plain(model, folder)
    return folder


def readme_code(folder: Path) -> dict[str, Any]:
    """Run the Python of the folder's README, but for its last line, which asks a server."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    *lines, call = code[1].strip().splitlines()
    assert call.startswith("print(encode(")
    defined: dict[str, Any] = {}
    exec("\n".join(lines), defined)
    return defined


@pytest.mark.parametrize("side", ["query", "passage"])
def test_transformers_own_classes_give_our_vectors(model: Any, exported: Path, side: str) -> None:
    """Run under a mask that hides nothing, at the prompt ids that the README makes."""
    facts = json.loads((exported / "serving.json").read_text())
    plain, report = AutoModel.from_pretrained(
        exported, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(plain) in (LlamaModel, Qwen2Model)
    assert not report["missing_keys"]
    prompt_ids = readme_code(exported)["prompt_ids"]
    texts = [*TEXTS, "no end " * 300]
    ours = model.encode_texts(texts, side == "query")
    sequences = [prompt_ids(text, side) for text in texts]
    assert sequences == model.texts.tokenize(texts, side == "query")
    assert len(sequences[-1]) <= facts["max_model_len"] <= len(sequences[-1]) + 20  # the other side's prompt is longer
    for number, ids in enumerate(sequences):
        with torch.no_grad():
            states = plain(torch.tensor([ids]), attention_mask=torch.zeros(1, 1, len(ids), len(ids)))[0][0]  # [L, H]
        at_masks = states[torch.tensor(ids) == facts["mask_id"]]  # [K, H]
        found = torch.nn.functional.normalize(at_masks, dim=-1)
        assert torch.allclose(found, ours.repr_hidden[number], atol=2e-6)


def test_the_head_comes_along_for_who_wants_logits(model: Any, exported: Path) -> None:
    """As LlamaForCausalLM and Qwen2ForCausalLM name it, with the adapter in it."""
    from safetensors.torch import load_file

    weights = load_file(exported / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)
    assert all(name.startswith(("model.", "lm_head.")) for name in weights)


@pytest.mark.once
def test_the_config_says_how_the_attention_sees(exported: Path) -> None:
    """vLLM takes the causal mask off where `is_causal` is false, and pools where the architecture is a *Model."""
    config = json.loads((exported / "config.json").read_text())
    assert config["is_causal"] is False
    assert config["architectures"] in (["LlamaModel"], ["Qwen2Model"])
    assert "auto_map" not in config
    assert {file.suffix for file in exported.iterdir()} <= {".json", ".jinja", ".md", ".safetensors"}


@pytest.mark.once
def test_the_readme_asks_a_server(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's /pooling wants it, whose answers may come in any order."""
    asked: list[Any] = []

    def answer(request: Any) -> io.BytesIO:
        asked.append((request.full_url, json.loads(request.data)))
        return io.BytesIO(b'{"data": [{"index": 1, "data": [[0.5]]}, {"index": 0, "data": [[0.25]]}]}')

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    code = readme_code(exported)
    assert code["encode"](["one", "two"], "passage", "http://host:1") == [[[0.25]], [[0.5]]]
    [(address, body)] = asked
    assert address == "http://host:1/pooling"
    assert body["input"] == [code["prompt_ids"](text, "passage") for text in ("one", "two")]
    assert (body["model"], body["task"]) == (str(exported.resolve()), "token_embed")


@pytest.mark.once
def test_the_folder_is_sealed_and_readable_by_a_server_of_another_user(exported: Path) -> None:
    assert check_seal(exported)["made_from"]
    modes = {stat.S_IMODE(file.stat().st_mode) for file in exported.iterdir()}
    assert modes == {stat.S_IMODE((exported / "config.json").stat().st_mode)}


@pytest.mark.once
def test_the_command_says_how_to_start(
    build_release: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, output = build_release("tiny-llada", "llada-q4p4"), tmp_path / "a plain model"
    assert main(["export-vllm", str(release), "--output", str(output), "--dtype", "float32"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    given = dict(zip(words[3::2], words[4::2], strict=True))
    facts = json.loads((output / "serving.json").read_text())
    assert json.loads(given["--pooler-config"]) == facts["pooler_config"]
    assert facts["pooler_config"]["step_tag_id"] == facts["mask_id"] in facts["prompts"]["query"]["after"]
    assert (given["--model"], given["--dtype"], given["--runner"]) == (str(output), "float32", "pooling")
    assert shlex.join(words).replace("'", "") in (output / "README.md").read_text().replace("'", "")
    assert main(["export-vllm", str(release), "--output", str(output)]) == 2
    assert "is there and not empty; choose another folder" in capsys.readouterr().err


@pytest.mark.once
def test_a_full_disk_leaves_all_or_nothing(load_release: Callable[..., Any], tmp_path: Path) -> None:
    tiny = load_release("tiny-llada", "llada-q4p4")
    with fault_at(10**6, dies=False) as left:
        export_plain(tiny, tmp_path / "whole")
    changes = 10**6 - left[0]
    for call in range(0, changes, 12):
        place = tmp_path / f"cut-{call}"
        with contextlib.suppress(OSError), fault_at(call, dies=False):
            export_plain(tiny, place)
        assert not place.exists() or check_seal(place)
        if not place.exists():
            place.mkdir()  # an empty folder is taken
            export_plain(tiny, place)
        assert check_seal(place)


@pytest.mark.once
@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_denoise_steps", 2, r"takes 2 forward passes a text"),
        ("query_budget_table", {"length": [], "entropy": [], "num_query_masks": [[2]]}, r"--num-query-masks K"),
    ],
)
def test_what_one_pass_over_a_fixed_prompt_does_not_serve_is_refused(
    field: str, value: Any, told: str, load_release: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = load_release("tiny-llada", "llada-q4p4")
    monkeypatch.setattr(tiny.config, field, value)
    with pytest.raises(ValueError, match=told):
        export_plain(tiny, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_a_baseline_is_no_diffretriever(tmp_path: Path) -> None:
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="SimpleNamespace cannot be exported; a DiffRetriever can"):
        export_plain(SimpleNamespace(config=SimpleNamespace(model_type="promptreps")), tmp_path / "plain")
