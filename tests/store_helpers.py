"""Made-up texts, what is in a folder, and a torch with other defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

WORDS = "the tilt of the axis gives the seasons their light and every river its own way to a quiet sea".split()


def made_up_texts(count: int) -> list[tuple[str, str]]:
    """Return ids and texts of many lengths; ids with blanks and other scripts."""
    texts = [" ".join(WORDS[(number * 7 + k) % len(WORDS)] for k in range(number * 5 % 23)) for number in range(count)]
    return [(f"id {number} é{'日本' * (number % 3)}", text) for number, text in enumerate(texts)]


def write_jsonl(file: Path, texts: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"_id": text_id, "text": text}, ensure_ascii=False) for text_id, text in texts]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def silent(message: str) -> None:
    """Take a message for nobody."""


@contextmanager
def other_defaults() -> Iterator[None]:
    """Have torch make tensors of another dtype, and on another device, unless it is told which."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # stands for `torch.set_default_device("cuda")`
            yield
    finally:
        torch.set_default_dtype(before)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, so that two folders can be compared."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
