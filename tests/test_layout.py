"""What keeps the repository readable: sizes of modules and functions, the flat files, one place that removes."""

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


REMOVING = {"unlink", "rmdir", "rmtree", "rename", "renames", "remove", "removedirs", "move"}  # of os, shutil, pathlib
WRITING = {"write_text", "write_bytes"}  # of pathlib: in place, and not forced to the disk


def changes_of_the_disk(source: str) -> Iterator[str]:
    """Yield the calls that remove, replace or write files without `files`."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        if (
            name in WRITING
            or (name in REMOVING and (owner in ("os", "shutil") or name not in ("remove", "move")))
            or (name == "replace" and (owner == "os" or (len(node.args) == 1 and not node.keywords)))
        ):
            yield f"line {node.lineno}: {ast.unparse(node.func)}"


PACKAGE = [module for module in MODULES if module.parts[0] == "diffretriever" and module.parts[1] != "files"]


@pytest.mark.parametrize("module", PACKAGE, ids=str)
def test_files_alone_removes_and_writes(module: Path) -> None:
    """Whoever removes or writes files does it through `diffretriever/files/`, which knows what is ours, and durably."""
    assert list(changes_of_the_disk((ROOT / module).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "call",
    ["os.replace(a, b)", "path.unlink()", "shutil.rmtree(a)", "path.replace(b)", "os.remove(a)", "path.write_text(t)"],
)
def test_such_calls_are_seen(call: str) -> None:
    assert len(list(changes_of_the_disk(call))) == 1
    assert not list(changes_of_the_disk("text.replace('a', 'b'); replace(config, a=1); items.remove(a)"))
