"""The table of releases that this repository knows, and what every release must keep to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

# What AutoModel imports, no more. A release ships the sentence-transformers face as well, which AutoModel never reads.
CODE_FILES = (
    "adapter_loading.py",
    "backbone_loading.py",
    "batching.py",
    "bidirectional_layers.py",
    "chat_template.py",
    "checked_files.py",
    "configuration_diffretriever.py",
    "device_copies.py",
    "modeling_diffretriever.py",
    "optimized_layers.py",
    "query_budgets.py",
    "release_code.py",
    "saved_folder.py",
    "scoring.py",
    "sparse_head.py",
    "tokenization_helpers.py",
)
SENTENCE_TRANSFORMERS_FILE = "st_diffretriever.py"
# The ranges of pyproject.toml: a release built or checked with other versions would say nothing about them.
LIBRARIES = {
    "torch": ">=2.6",
    "transformers": ">=4.54,<6",
    "peft": ">=0.18",
    "safetensors": ">=0.5",
    "huggingface_hub": ">=0.34",
}
MAIN, BRANCHES = "main", ("sparse", "multi-vector")  # of a repository; main has the files for dense vectors
BACKBONE_FOLDER = "backbone"  # where a release that brings its own backbone keeps it


@dataclass(frozen=True)
class Release:
    """A release that this repository knows.

    Args:
        base: the backbone's Hub id, or a folder of this source tree.
        adapter: where its adapter is: a Hub id, or a folder of this source tree.
        num_query_masks, num_passage_masks: K_q and K_p.
        max_length: tokens of prompt and text.
        mask_token: the special token that serves as [MASK] where the backbone has none.
        recommended_mode: the scoring mode that serves it best; None is `single_dense` for K = 1, else `multi_dense`.
        recommended_fusion_weight: the dense scores' share that serves it best in the fusion modes; None is half.
    """

    base: str
    adapter: str
    num_query_masks: int
    num_passage_masks: int
    max_length: int = 156
    recommended_mode: str | None = None
    mask_token: str | None = None
    recommended_fusion_weight: float | None = None

    @property
    def is_local(self) -> bool:
        """Whether backbone and adapter lie in this source tree."""
        return self.base.startswith("checkpoints/")


def _tiny(backbone: str, kind: str, num_query_masks: int, num_passage_masks: int) -> Release:
    """Name a release of this source tree; its backbone and adapter lie in checkpoints/."""
    adapter = f"checkpoints/diffretriever-{backbone}-tiny-{kind}/adapter"
    fused = "fusion_single_sparse_max" if kind == "single" else "fusion_multi_sparse_max"
    return Release(f"checkpoints/{backbone}-tiny", adapter, num_query_masks, num_passage_masks, 120, fused)


def _smollm2(kind: str, num_masks: int) -> Release:
    """Name a release of this source tree on a backbone that `diffretriever fetch-backbone` puts beside it."""
    adapter = f"checkpoints/diffretriever-smollm2-135m-{kind}/adapter"
    fused = "fusion_single_sparse_max" if kind == "single" else "fusion_multi_sparse_max"
    length, weight = (179, None) if kind == "single" else (279, 0.7)
    return Release(f"checkpoints/{SMOLLM2}", adapter, num_masks, num_masks, length, fused, "<empty_output>", weight)


SMOLLM2 = "smollm2-135m-instruct"
LLADA, DREAM = "GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B"
RELEASES = {
    "diffretriever-llada-8b-single": Release(LLADA, "ielabgroup/diffretriever-llada-8b-single", 1, 1),
    "diffretriever-llada-8b-multi-q4-p4": Release(LLADA, "ielabgroup/diffretriever-llada-8b-multi-q4-p4", 4, 4),
    "diffretriever-dream-7b-single": Release(DREAM, "ielabgroup/diffretriever-dream-7b-single", 1, 1),
    "diffretriever-dream-7b-multi-q4-p16": Release(DREAM, "ielabgroup/diffretriever-dream-7b-multi-q4-p16", 4, 16),
    "diffretriever-llada-tiny-single": _tiny("llada", "single", 1, 1),
    "diffretriever-llada-tiny-multi-q4-p4": _tiny("llada", "multi-q4-p4", 4, 4),
    "diffretriever-dream-tiny-single": _tiny("dream", "single", 1, 1),
    "diffretriever-dream-tiny-multi-q4-p16": _tiny("dream", "multi-q4-p16", 4, 16),
    "diffretriever-smollm2-135m-single": _smollm2("single", 1),
    "diffretriever-smollm2-135m-multi-q4-p4": _smollm2("multi-q4-p4", 4),
}


def check_name(what: str, value: str) -> None:
    """Refuse a name that some supported transformers cannot load.

    Raises:
        ValueError: the name holds a character other than letters, digits, - and _.

    >>> check_name("--name", "v1.0")
    Traceback (most recent call last):
    ...
    ValueError: --name: 'v1.0' may hold only letters, digits, - and _ (a dot breaks transformers 4.54).
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", value):
        raise ValueError(f"{what}: {value!r} may hold only letters, digits, - and _ (a dot breaks transformers 4.54).")


def check_repo_id(what: str, value: str) -> None:
    """Refuse a name that could not stand in a card's code: a Hub id or a folder's name is letters, digits, . _ and -.

    Raises:
        ValueError: another character, or more than one slash.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)?", value):
        raise ValueError(f"{what}: {value!r:.100} must be ORG/NAME, of letters, digits, . _ and -.")


def library_versions() -> dict[str, str]:
    """Return the installed version of each library that a release depends on.

    Raises:
        ImportError: one is not installed, or out of the range that releases support; the message has the pip command.
    """
    from packaging.specifiers import SpecifierSet

    versions = {}
    for name, wanted in LIBRARIES.items():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise ImportError(f'{name} is not installed: pip install "{name}{wanted}"') from error
        if not SpecifierSet(wanted).contains(versions[name], prereleases=True):
            raise ImportError(
                f'{name} {versions[name]} is installed, but releases need {wanted}: pip install "{name}{wanted}"'
            )
    return versions
