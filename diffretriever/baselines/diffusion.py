"""LLaDA and Dream as DiffEmbed reads them: the DiffRetriever model itself, which knows them, without its masks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModel

from ..model.configuration_diffretriever import DiffRetrieverConfig

PROMPT_ROOM = 1024  # tokens; any retrieval prompt fits, and none is read


def load_diffusion(folder: Path, kind: str, adapter: Path | None, merge: bool | None, **kwargs: Any) -> Any:
    """Load a release, or a backbone in LLaDA's or Dream's own format through a zero-shot release of it.

    Args:
        folder: of the release or backbone.
        kind: "diffretriever", "llada" or "dream", as its config.json says.
        adapter: folder of a LoRA adapter in peft's format, under the backbone's own names; None leaves a release its
            own.
        merge: as for `Adapter.add_to`.
        kwargs: for `AutoModel.from_pretrained`.

    Returns:
        A DiffRetriever, in eval mode.

    Raises:
        FileNotFoundError, ValueError: as loading a release does.
    """
    if merge is not None:
        kwargs["merge_adapter"] = merge
    if adapter is not None:
        kwargs["adapter_name_or_path"] = str(adapter)
    if kind == "diffretriever":
        return AutoModel.from_pretrained(folder, **kwargs)
    config = DiffRetrieverConfig(base_model_name_or_path=str(folder), max_length=PROMPT_ROOM)
    with tempfile.TemporaryDirectory() as scratch:
        release = Path(scratch) / "zero-shot-diffretriever"
        release.mkdir()
        config.save_pretrained(release)
        return AutoModel.from_pretrained(release, **kwargs)
