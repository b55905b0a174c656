"""Distillation: the ranking that a stronger encoder gives each batch is learned, beside which passages answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..progress import no_loading_bars
from .candidates import gather_rows

LEFT_OUT = -1e4  # in place of -inf, whose difference from itself is no number; its exponential is 0 all the same


def distillation_loss(scores: torch.Tensor, teacher: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) over each query's candidates, mean over queries (Hinton et al., arXiv:1503.02531).

    Args:
        scores: float32 [Q, P], the student's, divided by its temperature.
        teacher: float32 [Q, P], the teacher's, divided by its own.
        excluded: bool [Q, P], candidates that are left out.
    """
    student, taught = (F.log_softmax(each.masked_fill(excluded, LEFT_OUT), dim=1) for each in (scores, teacher))
    return F.kl_div(student, taught, reduction="batchmean", log_target=True)


class Teacher:
    """A sentence-transformers model that scores the queries and passages of each batch.

    Args:
        name: its folder or Hub id.
        temperature: divides its scores.

    Attributes:
        sha256: of its weights' names and values.

    Raises:
        ValueError: it cannot be loaded; says why.
    """

    def __init__(self, name: str, temperature: float) -> None:
        from sentence_transformers import SentenceTransformer

        try:
            with no_loading_bars():
                self.model = SentenceTransformer(name, device="cpu")
        except (OSError, ValueError) as error:
            raise ValueError(f"teacher: {name} is no model that sentence-transformers loads: {error}") from error
        self.model.requires_grad_(False)
        self.temperature = temperature
        self.sha256 = weights_hash(self.model)

    def __call__(self, queries: Sequence[str], passages: Sequence[str], device: torch.device) -> torch.Tensor:
        """Score one process's queries against all processes' passages.

        Returns:
            float32 [Q, P], divided by the temperature, without gradient.
        """
        model: Any = self.model.to(device)
        settings = {"convert_to_tensor": True, "show_progress_bar": False, "device": str(device)}
        query = model.encode_query(list(queries), **settings).float().clone()  # [Q, D]; made in inference mode
        passage, _ = gather_rows(model.encode_document(list(passages), **settings).float().clone())  # [P, D]
        with torch.autocast(device.type, enabled=False):  # bfloat16 would round by what the temperature makes large
            scores: torch.Tensor = model.similarity(query, passage)
        return scores / self.temperature


def weights_hash(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
