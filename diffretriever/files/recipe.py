"""Recipes: YAML files read into dataclasses, every key and type checked before any work begins."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

Recipe = TypeVar("Recipe")


def read_recipe(path: str | Path, kind: type[Recipe], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        kind: the recipe's dataclass; dataclasses may be nested in it.
        overrides: values that replace those of the file (None: not given).

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
        given.update({key: value for key, value in (overrides or {}).items() if value is not None})
    return _build(kind, given, str(path))


def _build(kind: type[Recipe], given: Any, where: str) -> Recipe:
    """Fill a dataclass from a dict, recursively."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected keys and values, got {type(given).__name__}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(given.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; the recipe has {', '.join(sorted(hints))}")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in given.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one value against its type; whole numbers and strings like 1e-3 pass as floats."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where)
    if isinstance(hint, types.UnionType):
        return None if value is None else _convert(typing.get_args(hint)[0], value, where)
    if typing.get_origin(hint) is list:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where} must be a list with at least one entry, got {value!r}")
        return [_convert(typing.get_args(hint)[0], each, f"{where}[{n}]") for n, each in enumerate(value)]
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{where} must be a number, got {value!r}") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value
