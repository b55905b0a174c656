"""What a file says, JSON or YAML, read into a dataclass: every key and type checked, one line that names the field."""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def fill(kind: type[Kind], given: Any, where: str, *, others: bool = False) -> Kind:
    """Fill a dataclass from keys and values; dataclasses may be nested in it.

    Args:
        kind: the dataclass. What its types do not say, its `__post_init__` may refuse.
        given: from the file, whatever it is.
        where: names the file, for messages.
        others: pass over keys that the dataclass does not have.

    Raises:
        ValueError: a key is missing or unknown, or a value is of another type or refused.

    >>> fill(Kind, [1], "a.json")
    Traceback (most recent call last):
    ...
    ValueError: a.json: expected keys and values, got list
    """
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected keys and values, got {type(given).__name__}")
    hints = _hints(kind)  # type: ignore[arg-type]  # classes are hashable
    unknown = sorted(str(key) for key in given.keys() - hints.keys())
    if unknown and not others:
        raise ValueError(f"{where}: unknown key {unknown[0]!r:.80}; expected {', '.join(sorted(hints))}")
    missing = [name for name in _required(kind) if name not in given]
    if missing:
        raise ValueError(f"{where}: lacks `{missing[0]}`")
    values = {key: _convert(hint, given[key], f"{where}: {key}", others) for key, hint in hints.items() if key in given}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


_hints = cache(typing.get_type_hints)  # a manifest has a million entries of one kind


def _required(kind: Any) -> list[str]:
    absent = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return [field.name for field in fields if field.default is absent and field.default_factory is absent]


def _convert(hint: Any, value: Any, where: str, others: bool) -> Any:
    """Check one value against its type; whole numbers and strings like 1e-3 pass as floats."""
    if dataclasses.is_dataclass(hint):
        return fill(typing.cast(type[Any], hint), value, where, others=others)
    if isinstance(hint, types.UnionType):
        return None if value is None else _convert(typing.get_args(hint)[0], value, where, others)
    inner, outer = typing.get_args(hint), typing.get_origin(hint)
    if outer in (list, tuple):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where} must be a list with at least one entry, got {value!r:.80}")
        return outer(_convert(inner[0], each, f"{where}[{n}]", others) for n, each in enumerate(value))
    if outer is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be keys and values, got {value!r:.80}")
        return {key: _convert(inner[1], each, f"{where}.{key}", others) for key, each in value.items()}
    if hint is Any:
        return value
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{where} must be a number, got {value!r:.80}") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r:.80}")
    return value
