"""What users paste and run: the model card's example and the quickstart."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.nn.functional as F
from transformers.utils.logging import enable_progress_bar

import diffretriever
import publish
from diffretriever.cli.main import main
from diffretriever.publishing import build as building

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "checkpoints"
SMOLLM2 = "smollm2-135m-instruct"


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


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_the_imports_that_a_page_shows(page: str) -> None:
    """Written out in an example, or named in a sentence."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for module, names in re.findall(r"^from (diffretriever[\w.]*) import (.+)$", text, re.MULTILINE):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{page}: {module}.{name}"
    for module, name in re.findall(r"`(diffretriever(?:\.[a-z_]+)+)\.([A-Z]\w*)", text):
        assert hasattr(importlib.import_module(module), name), f"{page}: {module}.{name}"


@pytest.mark.slow
@pytest.mark.once
def test_quickstart_answers_every_question(smollm2: Path) -> None:
    """The README's first command."""
    run = fresh.run([ROOT / "examples" / "quickstart.py"], cwd="/")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("diffretriever-smollm2-135m-multi-q4-p4 on ")
    assert run.stdout.splitlines()[-1].startswith("The right passage comes first: 8 of 8 in fused, 8 in dense, ")
    assert "Loading weights" not in run.stderr


def test_quickstart_without_a_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing can be fetched, a release that is here whole stands in."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    quickstart = importlib.import_module("quickstart")
    monkeypatch.setattr(quickstart, "CHECKPOINTS", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert quickstart.shipped_release() == tmp_path / "diffretriever-llada-tiny-multi-q4-p4"


@pytest.fixture
def progress_bars() -> Iterator[None]:
    """What the test turns off in this process is on again for those after it."""
    yield
    enable_progress_bar()


@pytest.mark.usefixtures("progress_bars")
def test_quickstart_ranks_sensibly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In seconds, and the right passage near the top in every mode."""
    release = CHECKPOINTS / "diffretriever-llada-tiny-multi-q4-p4"
    monkeypatch.chdir("/")
    monkeypatch.setattr("sys.argv", ["quickstart.py", "--model", str(release)])
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    run = capsys.readouterr()
    blocks = dict(re.findall(r"^▸ (.*)\n((?:  .*\n)+)", run.out, re.MULTILINE))
    assert len(blocks) >= 8
    for query, passage in {"chess playing program": "chess", "SQL database engine": "database"}.items():
        assert re.findall(r"^  ✓ (dense|sparse|fused) +(\S+) ", blocks[query], re.MULTILINE) == [
            (mode, passage) for mode in ("dense", "sparse", "fused")
        ]
    assert re.search(r"words of the query: chess \d\.\d\d, playing", blocks["chess playing program"])
    assert re.search(r"encoded and scored in \d+\.\d s\.", run.out)
    right = {mode: run.out.count(f"  ✓ {mode} ") for mode in ("fused", "dense", "sparse")}
    counts = f"{right['fused']} of 8 in fused, {right['dense']} in dense, {right['sparse']} in sparse"
    assert run.out.splitlines()[-1] == f"The right passage comes first: {counts}."
    assert right["fused"] >= 6
    assert "Loading weights" not in run.err


def test_shipped_checkpoints_load_where_they_lie() -> None:
    """Each release in checkpoints/ links to this tree's code and is what publish.py would build."""
    releases = sorted(folder for folder in CHECKPOINTS.iterdir() if folder.name.startswith("diffretriever-"))
    assert [folder.name for folder in releases] == sorted(
        name for name, one in building.RELEASES.items() if one.is_local
    )
    assert len(releases) == 6
    for folder in releases:
        assert diffretriever.shipped_release(folder.name) == str(folder)
        code = list(folder.rglob("*.py"))
        assert len(code) > 14
        assert all(file.resolve() == ROOT / file.name for file in code)
    with pytest.raises(
        FileNotFoundError, match=r"other is not there; shipped are: .*dream-tiny-single.*pip install -e"
    ):
        diffretriever.shipped_release("other")


@pytest.mark.parametrize("name", [name for name in building.RELEASES if "tiny" in name])
def test_shipped_checkpoints_are_built_by_name(name: str, tmp_path: Path) -> None:
    assert publish.main(["build", name, "--output", str(tmp_path / name)]) == 0
    built, shipped = (json.loads((at / name / "config.json").read_text()) for at in (tmp_path, CHECKPOINTS))
    backbone = f"{shipped['backbone_type']}-tiny"
    assert built.pop("base_model_name_or_path") == str(CHECKPOINTS / backbone)
    assert shipped.pop("base_model_name_or_path") == f"../{backbone}"
    assert built == shipped
    cards = [(at / name / "README.md").read_text(encoding="utf-8") for at in (tmp_path, CHECKPOINTS)]
    assert cards[0] == cards[1]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in building.RELEASES if "smollm2" in name])
def test_releases_on_smollm2_are_built_by_name(name: str, smollm2: Path, tmp_path: Path) -> None:
    command = ["build", name, "--output", str(tmp_path / name), "--fingerprint", "never"]
    assert publish.main(command) == 0
    built, shipped = (json.loads((at / name / "config.json").read_text()) for at in (tmp_path, CHECKPOINTS))
    assert (built.pop("base_model_name_or_path"), shipped.pop("base_model_name_or_path")) == (
        str(smollm2),
        f"../{SMOLLM2}",
    )
    assert built == shipped
    built_card, shipped_card = ((at / name / "README.md").read_text(encoding="utf-8") for at in (tmp_path, CHECKPOINTS))
    assert built_card.replace(str(smollm2), f"../{SMOLLM2}") == shipped_card


def test_a_release_whose_backbone_is_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    name = "diffretriever-smollm2-135m-multi-q4-p4"
    (tmp_path / "checkpoints" / name).symlink_to(CHECKPOINTS / name)
    monkeypatch.setattr(building, "SOURCE", tmp_path)
    assert publish.main(["build", name, "--output", str(tmp_path / "out")]) == 2
    command = f"diffretriever fetch-backbone {SMOLLM2} --output {tmp_path / 'checkpoints' / SMOLLM2}"
    assert f"the backbone checkpoints/{SMOLLM2} is not here yet; fetch it: {command}" in capsys.readouterr().err


README = (ROOT / "README.md").read_text()
METHODS = (CHECKPOINTS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", range(README.count("```python\n")))
def test_the_readmes_python_blocks(
    number: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each runs as written, from the top of the tree, puts the right passage first, and prints what a comment says."""
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    if "smollm2" in block:
        request.getfixturevalue("smollm2")
    monkeypatch.chdir(ROOT)
    exec(block, {"__name__": "__main__"})
    printed, said = (
        [[float(number) for number in row.split(",")] for row in re.findall(r"\[([\d., ]+)\]", text)]
        for text in (capsys.readouterr().out, block.partition("# tensor(")[2])
    )
    assert [row.index(max(row)) for row in printed] == [0, 1]
    for row, values in zip(said, printed, strict=bool(said)):
        assert row == pytest.approx(values, abs=0.02)  # bfloat16 where the CPU multiplies it


@pytest.mark.parametrize("name", ["llada-tiny-single", "llada-tiny-multi-q4-p4"])
def test_the_readmes_picture_has_the_cards_figures(name: str) -> None:
    drawn = json.loads((ROOT / "docs" / "quality" / f"{name}.json").read_text())
    assert drawn.pop("bm25")["nDCG@10"] == pytest.approx(0.740, abs=6e-4)
    results = json.loads((CHECKPOINTS / "figures.json").read_text())[f"diffretriever-{name}"]["results"]
    known = {row["mode"]: row["value"] for row in results if row["dataset"].startswith("Debian")}
    assert len(drawn) == 3
    assert {mode: row["nDCG@10"] for mode, row in drawn.items()} == pytest.approx(
        {mode: known[mode] for mode in drawn}, abs=6e-4
    )


def row_of_the_methods(row: str) -> tuple[str, str]:
    """Return the dense and the fused figure of the table's first row of that name, without the seeds' range."""
    cell = r"([\d.]*)(?: \([\d.]+-[\d.]+\))? *"
    table = re.search(rf"^\| {row} \| {cell}\| {cell}\| {cell}\|", METHODS, re.MULTILINE)
    assert table is not None
    return table[1], table[3]


@pytest.mark.parametrize(
    ("drawn", "row"),
    [
        ("diffretriever-4-masks", "DiffRetriever, 4 masks"),
        ("diffretriever-1-mask", "DiffRetriever, 1 mask"),
        ("promptreps-4-words", "PromptReps, up to 4 words"),
        ("diffembed", "DiffEmbed"),
        ("repllama", "RepLLaMA"),
        ("promptreps-20-words-zero-shot", "PromptReps, up to 20 words"),
    ],
)
def test_the_picture_of_the_methods_has_the_tables_figures(drawn: str, row: str) -> None:
    shown = json.loads((ROOT / "docs" / "methods" / f"{drawn}.json").read_text())
    values = {mode.partition("_")[0] == "fusion": f"{point['nDCG@10']:.3f}" for mode, point in shown.items()}
    assert values == {fused: value for fused, value in enumerate(row_of_the_methods(row)) if value}


def test_the_readme_has_the_tables_figures() -> None:
    rows = ("DiffRetriever, 4 masks", "DiffRetriever, 1 mask", "PromptReps, up to 4 words", "DiffEmbed", "RepLLaMA")
    four, one, words, mean, repllama = map(row_of_the_methods, rows)
    said = f"4 masks have {four[0]} dense and {four[1]} fused, one {one[0]} and {one[1]}, "
    said += (
        f"PromptReps of 4 words (4 passes) {words[0]} and {words[1]}, mean pooling {mean[0]}, RepLLaMA {repllama[0]}."
    )
    assert said in README


def test_the_readme_is_read_in_a_minute() -> None:
    """And its badges say what pyproject.toml says."""
    assert len(README.splitlines()) <= 150
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    badges = dict(re.findall(r"badge/(\w+)-([\w.+]+)-", README))
    assert f'requires-python = ">={badges["python"].rstrip("+")}"' in settings
    oldest, newest = badges["transformers"].split("_to_")
    assert f'"transformers>={oldest},<{int(newest) + 1}"' in settings
    assert f'license = "{badges["licence"]}"' in settings


def test_the_readmes_search_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a corpus to a search: each line of the section, but for the installation."""
    section = re.search(r"## From a corpus to a search\n+```bash\n(.*?)```", README, re.DOTALL)
    assert section
    commands = [line for line in section[1].splitlines() if not line.startswith("pip ")]
    assert len(commands) == 3
    for name in ("checkpoints", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    printed = []
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "diffretriever"
        assert main(arguments) == 0
        printed.append(capsys.readouterr().out)
    assert "16 texts" in printed[0]
    assert re.match(r" 1  1\.0000  astronomy\n", printed[1])
    figures = json.loads((tmp_path / "results.json").read_text())
    assert {"multi_dense", "sparse_max", "bm25"} <= set(figures)
