"""LLaDA and Dream as DiffEmbed reads them: the DiffRetriever model itself, which knows them, without its masks."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModel
from transformers.dynamic_module_utils import get_relative_import_files

from ..model import modeling_diffretriever
from ..model.configuration_diffretriever import AUTO_MAP, DiffRetrieverConfig

CODE = Path(modeling_diffretriever.__file__)
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
        FileNotFoundError, ValueError: as loading a release does; or a release comes without its code.
    """
    if merge is not None:
        kwargs["merge_adapter"] = merge
    if adapter is not None:
        kwargs["adapter_name_or_path"] = str(adapter)
    if kind == "diffretriever":
        if not (folder / CODE.name).is_file():
            raise ValueError(
                f"{folder} is a DiffRetriever release without its code, which is not fetched from the Hub here. Fetch "
                "it whole (hf download) and give that folder, or give the release's backbone."
            )
        return AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs)
    config = DiffRetrieverConfig(base_model_name_or_path=str(folder), max_length=PROMPT_ROOM)
    config.auto_map, config.architectures = AUTO_MAP, ["DiffRetriever"]
    with tempfile.TemporaryDirectory() as scratch:
        release = Path(scratch) / "zero-shot-diffretriever"
        release.mkdir()
        config.save_pretrained(release)
        for source in (CODE, *map(Path, get_relative_import_files(CODE))):
            shutil.copyfile(source, release / source.name)
        return AutoModel.from_pretrained(release, trust_remote_code=True, **kwargs)
