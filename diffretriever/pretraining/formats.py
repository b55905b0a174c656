"""The formats that a recipe's `backbone_type` can name."""

from __future__ import annotations

from .backbone_format import BackboneFormat
from .dream_format import DREAM
from .llada_format import LLADA

FORMATS: dict[str, BackboneFormat] = {"llada": LLADA, "dream": DREAM}
