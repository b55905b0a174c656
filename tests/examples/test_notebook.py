"""The notebook runs from the source tree, and the outputs stored in it are what it gives.

`PYTHONPATH=tests python tests/examples/test_notebook.py` stores them anew, and the README's picture, which is the same
cell's with the release on SmolLM2 (its backbone fetched, as examples/quickstart.py does it).
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import ROOT
from PIL import Image, PngImagePlugin
from transformers import AutoModel

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

PICTURE = ROOT / "docs" / "maxsim.png"
NOTEBOOK = ROOT / "examples" / "diffretriever.ipynb"
RELEASE = ROOT / "checkpoints" / "diffretriever-llada-tiny-multi-q4-p4"
PICTURED = ROOT / "checkpoints" / "diffretriever-smollm2-135m-multi-q4-p4"
LOADS = "AutoModel.from_pretrained(release, trust_remote_code=True"
LOADS_FLOAT32 = f"{LOADS}, dtype=torch.float32"  # many CPUs' default is bfloat16, whose digits are others
FIGURES = ["MaxSim of queries", "mean of maxima", "Sparse vector of", '"rank"']  # one figure to the cell with each


def run(notebook: Any, folder: Path) -> Any:
    """Execute a notebook in a folder, in a kernel of its own."""
    resources = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def execute(release: Path | None = None) -> Any:
    """Run the notebook as a user does: where it lies, with nothing set, or another release; in float32 on any CPU."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (loading,) = [cell for cell in notebook.cells if LOADS in cell.source]
    written, loading.source = loading.source, loading.source.replace(LOADS, LOADS_FLOAT32)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DIFFRETRIEVER_MODEL", raising=False)
        if release is not None:
            patch.setenv("DIFFRETRIEVER_MODEL", str(release))
        patch.setenv("OMP_NUM_THREADS", "1")
        done = run(notebook, NOTEBOOK.parent)
    loading.source = written
    return done


def store() -> None:
    """Write the notebook with its outputs; what other packages say to stderr is not the notebook's."""
    notebook = execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.read(NOTEBOOK, as_version=4).metadata
    nbformat.write(notebook, NOTEBOOK)
    drawn = io.BytesIO(base64.b64decode(pictures(code_cells(execute(PICTURED))[2])[0]))
    made_with = PngImagePlugin.PngInfo()
    made_with.add_text("adapter", adapter_of(PICTURED))
    Image.open(drawn).save(PICTURE, pnginfo=made_with, optimize=True)


def adapter_of(release: Path) -> str:
    """Return the SHA-256 of a release's adapter."""
    files: dict[str, str] = json.loads((release / "release.json").read_text())["files"]
    return files["adapter/adapter_model.safetensors"]


def pictures(cell: Any) -> list[str]:
    """Return the PNGs under a cell, in base64."""
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_stored_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, 8))
    assert all(cell.outputs for cell in code_cells(notebook))
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/|IProgress not found\.", NOTEBOOK.read_text())


def test_the_readmes_picture_is_of_the_release() -> None:
    with Image.open(PICTURE) as picture:
        assert picture.text["adapter"] == adapter_of(PICTURED)


@pytest.fixture(scope="module")
def executed() -> Any:
    return execute()


@pytest.mark.slow
@pytest.mark.once
def test_the_stored_outputs_are_current(executed: Any) -> None:
    """Word for word what is printed, but for a number's last digit, and a figure under the same cells."""
    stored = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    for old, new in zip(stored, code_cells(executed), strict=True):
        words, numbers = (
            [re.split(r"\d+\.\d+", printed(cell)) for cell in (old, new)],
            [re.findall(r"\d+\.\d+", printed(cell)) for cell in (old, new)],
        )
        assert words[0] == words[1]
        assert [float(number) for number in numbers[0]] == pytest.approx(list(map(float, numbers[1])), abs=2e-3)
        assert len(pictures(old)) == len(pictures(new))
        assert not [output for output in new.outputs if "IProgress" in output.get("text", "")]


@pytest.mark.slow
def test_figures(executed: Any) -> None:
    code = code_cells(executed)
    drawn = [cell for cell in code if pictures(cell)]
    assert len(drawn) == len(FIGURES)
    for cell, words in zip(drawn, FIGURES, strict=True):
        assert words in cell.source
        (png,) = pictures(cell)
        assert len(png) > 8000  # an empty figure's is shorter


@pytest.mark.slow
def test_what_it_prints_is_what_the_model_gives(executed: Any) -> None:
    code = code_cells(executed)
    assert printed(code[0]).strip() == f"release: {RELEASE.name}"
    written = re.search(r"^passages = .*?^\]\n", code[1].source, re.DOTALL | re.MULTILINE)
    assert written
    texts: dict[str, Any] = {}
    exec(written[0], texts)
    model = AutoModel.from_pretrained(RELEASE, trust_remote_code=True, dtype="float32")
    names, queries = list(texts["passages"]), texts["queries"]
    passages = model.encode_texts(list(texts["passages"].values()), is_query=False)
    encoded = model.encode_texts(queries, is_query=True)
    found = dict(line.split("dense ") for line in printed(code[-1]).splitlines())
    assert [query.strip() for query in found] == queries
    for mode, word in (("multi_dense", ""), ("sparse_max", "sparse "), ("fusion_multi_sparse_max", "fused ")):
        for scores, line in zip(model.score(encoded, passages, mode), found.values(), strict=True):
            best = names[int(scores.argmax())] if scores.max() > 0 else "–"  # no term in common
            assert word + best in line
    both = re.search(r"sum of products of shared words (\S+), sparse_max (\S+)", "".join(map(printed, code)))
    assert both
    assert abs(float(both[1]) - float(both[2])) < 2e-3
    assert float(both[1]) > 0


@pytest.mark.slow
def test_outside_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cell says what to set; a folder that the environment names is taken."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = code_cells(notebook)[:1]
    monkeypatch.delenv("DIFFRETRIEVER_MODEL", raising=False)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"set `release` to the folder or Hub id"):
        run(notebook, tmp_path)
    monkeypatch.setitem(os.environ, "DIFFRETRIEVER_MODEL", "some-lab/some-release")
    assert printed(run(notebook, tmp_path).cells[0]) == "release: some-release\n"


if __name__ == "__main__":
    store()
