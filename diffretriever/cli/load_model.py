"""The model of a command, on the device that the command's process should use."""

from __future__ import annotations

import os
from typing import Any


def load_model(release: str, device: str | None = None, **settings: Any) -> Any:
    """Load a release through `AutoModel`.

    Args:
        release: Hub id or folder.
        device: "cpu", "cuda:1", "auto" and so on; None is this process's accelerator (accelerate and torchrun number
            their processes), else the CPU.
        settings: for `from_pretrained`; those that are None were not given.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError, ValueError: as the model's `from_pretrained`.
    """
    import torch
    from transformers import AutoModel

    if device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    settings["device_map"] = None if device == "cpu" else device
    given = {name: value for name, value in settings.items() if value is not None}
    return AutoModel.from_pretrained(release, trust_remote_code=True, **given)
