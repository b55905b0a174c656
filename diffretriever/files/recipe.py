"""Recipes: YAML files read into dataclasses, every key and type checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .fields import fill

Recipe = TypeVar("Recipe")


def read_recipe(path: str | Path, kind: type[Recipe], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        kind: the recipe's dataclass; dataclasses may be nested in it.
        overrides: values that replace those of the file.

    Raises:
        FileNotFoundError: the file is absent.
        ValueError: a key the recipe does not have, or a value of another type; names the file and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; expected a YAML file")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except RecursionError as error:
        raise ValueError(f"{path}: not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # also no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if isinstance(given, dict):
        given.update(overrides or {})
    return fill(kind, given, str(path))
