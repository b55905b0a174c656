"""What is installed from a wheel is whole: it needs no source tree to build, check, encode, search and train."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import fresh
import pytest
from checkpoint_folders import ROOT, copy_adapter, copy_backbone

from diffretriever import __version__
from diffretriever.publishing.releases import CODE_FILES, SENTENCE_TRANSFORMERS_FILE

FLAT_FILES = (*CODE_FILES, SENTENCE_TRANSFORMERS_FILE)


def build(kind: str, source: Path, out: Path, version: str = "standard") -> Path:
    """Build a wheel or sdist with the project's build backend, without a network."""
    backend = pytest.importorskip("hatchling.builders." + kind)
    builder = {"wheel": "WheelBuilder", "sdist": "SdistBuilder"}[kind]
    made = getattr(backend, builder)(str(source)).build(directory=str(out), versions=[version])
    return Path(next(made))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as pip does it."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder


COMMANDS = """
import json, sys
import diffretriever.model.scoring
from diffretriever.cli.main import main

assert diffretriever.model.scoring.__file__ == sys.argv[1], diffretriever.model.scoring.__file__
for status, command in json.loads(sys.argv[2]):
    assert main(command.split()) == status, command
"""


def run(installed: Path, folder: Path, commands: list[tuple[int, str]]) -> str:
    """Run commands of the unpacked wheel in a fresh process and a folder of their own.

    Args:
        installed: the unpacked wheel.
        folder: the working directory.
        commands: the exit status that each must have, and its words.

    Returns:
        All that was printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    place = installed / "diffretriever" / "model" / "scoring.py"
    done = fresh.run(["-c", COMMANDS, place, json.dumps(commands)], cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_a_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in packed.infolist())
        for name in FLAT_FILES:
            assert packed.read(f"diffretriever/model/{name}") == (ROOT / name).read_bytes()
        about = next(name for name in names if name.endswith("/METADATA"))
        told = packed.read(about).decode()
        assert f"\nVersion: {__version__}\n" in told
        assert "\nLicense-Expression: MIT\n" in told
        assert "\nClassifier: Typing :: Typed\n" in told
        assert "diffretriever/py.typed" in names
    kinds = {".py", ".yaml", ".json", ".jinja"}
    files = [file for file in (ROOT / "diffretriever").rglob("*") if file.suffix in kinds and not file.is_symlink()]
    assert len(files) > 100
    assert {str(file.relative_to(ROOT)) for file in files} <= names
    assert not [name for name in names if not name.startswith("diffretriever")]


def test_an_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", ROOT, tmp_path / "dist")) as packed:
        assert not any(entry.issym() or entry.islnk() for entry in packed)
        packed.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", tree, tmp_path / "again")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {name: first.read(name) for name in first.namelist()} == {
            name: second.read(name) for name in second.namelist()
        }


EDITABLE = """
import importlib.util, site, sys

site.addsitedir(sys.argv[1])
for name in ("diffretriever", "diffretriever.model.scoring"):
    print(importlib.util.find_spec(name).origin)
"""


def test_an_editable_install_is_the_source_tree(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", ROOT, tmp_path, "editable")) as packed:
        packed.extractall(tmp_path / "site-packages")
    command = [sys.executable, "-I", "-S", "-c", EDITABLE, str(tmp_path / "site-packages")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ROOT / "diffretriever" / "__init__.py"), str(ROOT / "scoring.py")]


@pytest.mark.slow
def test_the_package_works_alone(installed: Path, tmp_path: Path) -> None:
    """Build, check, encode, search and train with nothing of the source tree in reach."""
    copy_backbone("llada", tmp_path / "backbone")
    copy_adapter("llada-single", tmp_path / "adapter")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "a web server"}\n{"_id": "b", "text": "a clock"}\n')
    pairs = [{"query": f"query {n}", "positive": f"text {n}", "negatives": ["wrong"]} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    small = "--set max_steps=1 --set global_batch_size=4 --set max_length=140"
    tiny = "diffretriever-llada-tiny-single"
    said = run(
        installed,
        tmp_path,
        [
            (0, "publish list"),
            (0, "publish build --base backbone --adapter adapter --output release"),
            (0, "publish check release"),
            (0, "encode --model release --input corpus.jsonl --output store"),
            (0, "search --model release --store store --json clock"),
            (0, "publish build --base backbone --output zero-shot"),
            (0, f"train --recipe llada-tiny-single {small} --model zero-shot --pairs pairs.jsonl --output trained"),
            (2, f"publish build {tiny} --output tiny"),
        ],
    )
    assert "its vectors in a fresh process are those of the build" in said
    (answer,) = (json.loads(line) for line in said.splitlines() if line.startswith('{"query"'))
    assert {hit["id"] for hit in answer["hits"]} == {"a", "b"}
    assert (tmp_path / "trained" / "adapter_model.safetensors").is_file()
    assert f"{tiny} is made of checkpoints/llada-tiny in DiffRetriever's source tree" in said
    assert "run publish.py in a checkout, or give `publish build` --base and --adapter" in said
