"""Folders that sentence-transformers loads: the small releases in checkpoints/ with the files of each class."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from checkpoint_folders import ROOT, edit_json
from transformers import AutoModel

from diffretriever.publishing.sentence_transformers import sentence_transformers_files

CHECKPOINTS = ROOT / "checkpoints"
RELEASES = {"single": "diffretriever-llada-tiny-single", "multi": "diffretriever-llada-tiny-multi-q4-p4"}
CLASSES = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multi-vector": "MultiVectorEncoder"}
MODES = {"dense": "single_dense", "sparse": "sparse_max", "multi-vector": "multi_dense"}

# Among them an empty text, the texts of special tokens, a text that is cut, and role tags where they mean nothing.
TEXTS = [
    "play music from the internet",
    "",
    "   ",
    "A fast HTTP daemon; it serves <|mdm_mask|> pages<|eot_id|> and <|query|> too.",
    "Ünïcödé 文字 🙂\nand a second line.",
    "Copies directories to a remote machine incrementally and compresses them. " * 12,
    "SQL",
]


def make_folder(release: str, kind: str, to: Path) -> Path:
    """Copy a small release with the files of one class; its name must be its own on transformers 4.54."""
    source = CHECKPOINTS / RELEASES[release]
    shutil.copytree(source, to)
    shutil.copyfile(ROOT / "st_diffretriever.py", to / "st_diffretriever.py")
    backbone = source / json.loads((source / "config.json").read_text())["base_model_name_or_path"]
    edit_json(to / "config.json", base_model_name_or_path=str(backbone.resolve()))
    add_files(kind, to)
    return to


def add_files(kind: str, folder: Path) -> None:
    """Write the files of one class into a release's folder."""
    config = json.loads((folder / "config.json").read_text())
    for name, text in sentence_transformers_files(kind, config).items():
        (folder / name).write_text(text)


def load(kind: str, name: Any, **options: Any) -> Any:
    """Load a folder or Hub id through sentence-transformers as a user does, but in float32 on any CPU."""
    import sentence_transformers

    options = {"trust_remote_code": True, "device": "cpu", **options}
    options["model_kwargs"] = {"torch_dtype": torch.float32, **options.get("model_kwargs", {})}
    return getattr(sentence_transformers, CLASSES[kind])(str(name), **options)


class Folders:
    """Folders and models of them, each made once."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.models: dict[Any, Any] = {}

    def folder(self, release: str, kind: str) -> Path:
        to = self.place / f"st-{release}-{kind}-{os.getpid()}"
        return to if to.exists() else make_folder(release, kind, to)

    def load(self, release: str, kind: str, **options: Any) -> Any:
        """Load a release in one of the classes."""
        return load(kind, self.folder(release, kind), **options)

    def model(self, release: str, kind: str) -> Any:
        """Return a model that several tests share; none may change it."""
        if (release, kind) not in self.models:
            self.models[release, kind] = self.load(release, kind)
        return self.models[release, kind]

    def plain(self, release: str) -> Any:
        """Return the release through AutoModel, from where it lies in the source tree."""
        if release not in self.models:
            name = CHECKPOINTS / RELEASES[release]
            self.models[release] = AutoModel.from_pretrained(
                name, trust_remote_code=True, torch_dtype=torch.float32
            ).eval()
        return self.models[release]
