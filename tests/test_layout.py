"""What keeps the repository readable: the sizes of modules and functions, and the flat files' package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_folders import ROOT

MODULE_LINES, FUNCTION_LINES = 500, 60
FLAT = sorted(file.name for file in ROOT.glob("*.py") if file.name != "publish.py")
MODULES = sorted(
    file.relative_to(ROOT)
    for folder in (ROOT, *(ROOT / name for name in ("diffretriever", "benchmarks", "examples")))
    for file in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"))
    if not file.is_symlink() and "__pycache__" not in file.parts
)


def too_long(source: str) -> Iterator[str]:
    """Yield what is longer than it may be; blank lines and docstrings count, as a reader scrolls over them, too."""
    if (lines := source.count("\n")) > MODULE_LINES:
        yield f"the module has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name} (line {node.lineno}) has {lines} lines"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_nothing_is_longer_than_a_reader_can_hold(module: Path) -> None:
    assert list(too_long((ROOT / module).read_text(encoding="utf-8"))) == []


def test_the_flat_files_are_the_model_package() -> None:
    """Each flat file has its link for type checkers and editors, and its line for the wheel."""
    folder = ROOT / "diffretriever" / "model"
    links = {file.name: (ROOT / file.name).resolve() for file in folder.glob("*.py") if file.name != "__init__.py"}
    assert sorted(links) == FLAT
    assert all((folder / name).resolve() == target for name, target in links.items())
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert [name for name in FLAT if f'"{name}" = "diffretriever/model/{name}"' not in settings] == []
