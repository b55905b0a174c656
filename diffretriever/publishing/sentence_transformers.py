"""The small JSON files that make a release a sentence-transformers model.

A place serves one class, a release's root the one for dense vectors. On the Hub its branches "sparse" and
"multi-vector" hold the same files but for these. A folder has no branches: in it, folders of these names hold these
files, which lead to the release around them, and `st_diffretriever.py`.
"""

from __future__ import annotations

import json
from typing import Any

KINDS = ("dense", "sparse", "multi-vector")
# The class that loads each kind, and the similarity that gives the model's own scores: the cosine of the mean vectors
# (`single_dense`), the dot product of the sparse vectors (paper Eq. 3), the mean over the query's vectors of the best
# similarity among the passage's (paper Eq. 2; sentence-transformers' "maxsim" is the sum).
CLASSES = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multi-vector": "MultiVectorEncoder"}
SIMILARITIES = {"dense": "cosine", "sparse": "dot", "multi-vector": "meanmaxsim"}
# Role tags; st_diffretriever.py reads and strips them.
PROMPTS = {"query": "<|query|>", "document": "<|document|>"}
MODULE = "st_diffretriever.DiffRetrieverModule"
REQUIREMENTS = {"transformers": ">=4.54", "peft": ">=0.18"}  # sentence-transformers 6 checks them before it loads


def sentence_transformers_files(kind: str, config: dict[str, Any], inside: bool = False) -> dict[str, str]:
    """Return the files that a release needs for one class of sentence-transformers.

    Args:
        kind: "dense" (the release's root), "sparse" or "multi-vector" (the branches or folders of these names).
        config: the release's config.json.
        inside: the files are for a folder inside the release, which has no model of its own.

    Returns:
        Relative path to JSON text, with a line break at its end.

    Raises:
        ValueError: unknown kind, or a config that is no DiffRetriever release's.

    >>> print(sentence_transformers_files("sparse", {"model_type": "diffretriever"})["st_diffretriever.json"])
    {
      "kind": "sparse"
    }
    <BLANKLINE>
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; sentence-transformers has {', '.join(KINDS)}.")
    if config.get("model_type") != "diffretriever":
        raise ValueError(
            f'config.json: `model_type` must be "diffretriever", got {config.get("model_type")!r}; this is no release.'
        )
    settings = {
        "model_type": CLASSES[kind],
        "prompts": PROMPTS,
        "default_prompt_name": None,
        "similarity_fn_name": SIMILARITIES[kind],
        "requirements": REQUIREMENTS,
    }
    files: dict[str, Any] = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": MODULE}],
        "config_sentence_transformers.json": settings,
        "st_diffretriever.json": {"kind": kind, **({"release": ".."} if inside else {})},
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
