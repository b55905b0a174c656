"""Recipes that are no YAML: one line that names the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from diffretriever.files.recipe import read_recipe


@dataclass
class Steps:
    """A recipe."""

    steps: int = 1


@pytest.mark.parametrize("content", [b"[" * 20_000, b"steps: \xff", b"steps: " + b"9" * 5000, b"steps: [", b"- 1"])
def test_what_is_no_recipe_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"recipe\.yaml: (not valid YAML|expected keys and values)"):
        read_recipe(tmp_path / "recipe.yaml", Steps)
