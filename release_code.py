"""The code that a release brings, and whether it computes what this code does: its own is run for none but who asks."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module

# The modules that compute vectors. What the others decide (which files are read, which batches are made) shows in the
# model itself, or only rounds otherwise.
COMPUTING = (
    "modeling_diffretriever",
    "bidirectional_layers",
    "optimized_layers",
    "sparse_head",
    "tokenization_helpers",
    "query_budgets",
    "adapter_loading",
    "backbone_loading",
)
LARGEST_FILE = 1 << 17  # bytes of code that are read; Python 3.10 dies of 800,000 that are one expression


def other_code(folder: Path) -> list[str]:
    """Return the names of a release's files that compute otherwise than this code, or cannot be compared.

    Args:
        folder: of the release; one that brings no code differs in nothing.
    """
    here, differing = Path(__file__).parent, []
    for name in COMPUTING:
        theirs, ours = folder / f"{name}.py", here / f"{name}.py"
        if theirs.is_file() and not theirs.samefile(ours) and not _does_the_same(theirs, ours):
            differing.append(theirs.name)
    return differing


def _does_the_same(theirs: Path, ours: Path) -> bool:
    if theirs.stat().st_size > LARGEST_FILE:
        return False
    text, own = theirs.read_bytes(), ours.read_bytes()
    return text == own or _digest(text) == _digest(own)


def load_other(folder: Path, differing: list[str], trusted: bool, given: Mapping[str, Any]) -> Any:
    """Load a release with its own code, where the caller trusts it.

    Args:
        folder: of the release.
        differing: of `other_code`.
        trusted: the caller passed `trust_remote_code=True`.
        given: what `from_pretrained` was given.

    Raises:
        ValueError: the caller did not.
    """
    if not trusted:
        raise ValueError(
            f"{folder} was built with other code than this: {', '.join(differing)} would compute otherwise. Upgrade "
            "diffretriever, build the release again with publish.py, or trust its own code and run that: "
            "trust_remote_code=True, or --trust-remote-code for a command."
        )
    own: Any = get_class_from_dynamic_module("modeling_diffretriever.DiffRetriever", str(folder))
    config = given.get("config")
    chosen = {name: getattr(config, name) for name in getattr(config, "overrides", ())}
    return own.from_pretrained(folder, **{**given, **chosen, "config": None})


def hash_code(file: Path) -> str:
    """Return the SHA-256 of what a Python file does, as 64 hexadecimal digits.

    Comments, docstrings and the words of errors do not count, nor does the version of Python.
    """
    return _digest(file.read_bytes())


@functools.lru_cache(maxsize=64)  # read anew each time, and each content taken apart once
def _digest(code: bytes) -> str:
    try:
        told = json.dumps(_essence(ast.parse(code))).encode()
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a stranger's file: equal to itself alone
        told = code
    return hashlib.sha256(told).hexdigest()


def _essence(node: Any) -> Any:
    """Return a syntax tree as lists, without what changes no result and what some versions of Python leave out."""
    if isinstance(node, list):
        return [_essence(entry) for entry in node if not _is_text(entry)]
    if isinstance(node, ast.Raise):
        return "Raise"
    if isinstance(node, ast.AST):
        fields = {
            name: _essence(value) for name, value in ast.iter_fields(node) if name not in ("kind", "type_comment")
        }
        return [type(node).__name__, {name: value for name, value in fields.items() if value not in (None, [])}]
    return repr(node)


def _is_text(entry: Any) -> bool:
    """Return whether a statement is a text alone: a docstring."""
    return isinstance(entry, ast.Expr) and isinstance(entry.value, ast.Constant) and isinstance(entry.value.value, str)
