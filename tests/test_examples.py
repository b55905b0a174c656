"""What users paste and run: the model card's example and the quickstart."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import publish

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "checkpoints"


def test_the_model_cards_example(load_release: Callable[..., Any]) -> None:
    """The released checkpoints' card, word for word from `model.eval()` to the scores."""
    model = load_release("tiny-llada", "llada-single")
    model.eval()

    queries = ["what causes the seasons on earth?"]
    passages = [
        "The tilt of Earth's axis relative to its orbital plane drives the seasons.",
        "Photosynthesis converts carbon dioxide and water into glucose using sunlight.",
    ]

    def encode(texts: list[str], is_query: bool) -> Any:
        ids, mask = model.tokenize(texts, is_query=is_query)
        dev = next(model.backbone.parameters()).device
        with torch.inference_mode():
            return model.encode(ids.to(dev), mask.to(dev), is_query=is_query, compute_sparse=False)

    q = encode(queries, is_query=True)
    p = encode(passages, is_query=False)
    qv = F.normalize(q["repr_hidden"].float(), dim=-1).mean(dim=1)
    pv = F.normalize(p["repr_hidden"].float(), dim=-1).mean(dim=1)
    scores = qv @ pv.T
    assert scores.shape == (1, 2)
    assert torch.allclose(scores, model.score(q, p, mode="single_dense"), atol=1e-6)


def test_quickstart_ranks_sensibly() -> None:
    """The README's first command: in seconds, and the right passage near the top in every mode."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd="/")
    assert run.returncode == 0, run.stderr
    blocks = dict(re.findall(r"^▸ (.*)\n((?:    .*\n)+)", run.stdout, re.MULTILINE))
    assert len(blocks) >= 8
    expected = {"chess playing program": "chess", "SQL database engine": "database"}
    for query, passage in expected.items():
        for mode, ranking in re.findall(r"    (dense|sparse|fused) +(.*)", blocks[query]):
            assert passage in ranking, f"{mode} ranking for {query!r}: {ranking}"
        assert re.search(rf"    fused +{passage} ", blocks[query])
    assert re.search(r"encoded and scored in \d+\.\d s\.", run.stdout)


def test_shipped_checkpoints_load_where_they_lie() -> None:
    """Each release in checkpoints/ links to this tree's code and is what publish.py would build."""
    releases = sorted(folder for folder in CHECKPOINTS.iterdir() if folder.name.startswith("diffretriever-"))
    assert [folder.name for folder in releases] == [
        "diffretriever-llada-tiny-multi-q4-p4",
        "diffretriever-llada-tiny-single",
    ]
    for folder in releases:
        for file in folder.glob("*.py"):
            assert file.resolve() == ROOT / file.name


@pytest.mark.parametrize("name", [name for name in publish.RELEASES if "tiny" in name])
def test_shipped_checkpoints_are_built_by_name(name: str, tmp_path: Path) -> None:
    assert publish.main(["build", name, "--out", str(tmp_path / name)]) == 0
    built, shipped = (json.loads((at / name / "config.json").read_text()) for at in (tmp_path, CHECKPOINTS))
    assert built.pop("base_model_name_or_path") == str(CHECKPOINTS / "llada-tiny")
    assert shipped.pop("base_model_name_or_path") == "../llada-tiny"
    assert built == shipped


def test_the_readmes_example() -> None:
    """The README's Python block runs as written, from the top of the tree."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    run = subprocess.run([sys.executable, "-c", block[1]], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    scores = torch.tensor(eval(run.stdout.split("Failed")[0].strip(), {"tensor": lambda rows: rows}))
    assert scores.shape == (1, 2)
    assert scores[0, 0] > scores[0, 1]  # the player before the HTTP daemon
