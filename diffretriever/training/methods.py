"""What training asks of a model beside `baselines.contract`: DiffRetriever's answers and the baselines'."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..baselines import Baseline
from ..model.sparse_head import states_at_masks


class TextStates(NamedTuple):
    """The states of b texts that become their vectors.

    Args:
        states: [b, K, H], with gradient, not normalised.
        frozen: bool [b, K], states that carry none (see `sparse_head.states_at_masks`); None where all do.
        exists: bool [b, K], which states the texts have; None where they have all.
    """

    states: torch.Tensor
    frozen: torch.Tensor | None
    exists: torch.Tensor | None


@singledispatch
def read_states(model: Any, chunk: Mapping[str, torch.Tensor], is_query: bool) -> TextStates:
    """Read a batch with gradient.

    Args:
        model: a DiffRetriever or a baseline.
        chunk: "ids" and "mask" int64 [b, L], left-padded, "positions" of the masks int64 [b, K] (none in a baseline's).
        is_query: the side.
    """
    states, frozen = states_at_masks(model, chunk["ids"], chunk["mask"], chunk["positions"])
    return TextStates(states, frozen if model.config.num_denoise_steps > 1 else None, None)


@read_states.register
def _(model: Baseline, chunk: Mapping[str, torch.Tensor], is_query: bool) -> TextStates:
    out = model(chunk["ids"], chunk["mask"], is_query)
    assert out.states is not None
    return TextStates(out.states, None, out.repr_mask)


def adapted(model: Any) -> Any:
    """Return the module whose layers get LoRA matrices and whose names the adapter's weights have."""
    return model.backbone if isinstance(model, Baseline) else model


def backbone_type(model: Any) -> str | None:
    """Return what DiffRetriever calls the backbone's kind, whose names the adapter has; None for transformers' own."""
    kind: str | None = getattr(adapted(model).config, "backbone_type", None)
    return kind


def base_name(model: Any) -> str:
    """Return the backbone's name.

    Raises:
        ValueError: the model has an adapter already, merged or not.
    """
    weights = adapted(model).config
    base = getattr(weights, "base_model_name_or_path", model.config.base_model_name_or_path)
    if model.loaded_from.adapter is not None or base is None:
        raise ValueError(
            f"{model.config.name_or_path} holds an adapter already; training starts from a zero-shot release, as "
            "`publish.py build --base BACKBONE --output DIR` makes one, or by another method from a backbone. To go on "
            f"from its adapter, give the zero-shot release as --model and --adapter {model.config.name_or_path}"
        )
    return Path(base).name if base.startswith((".", "/")) else str(base)
