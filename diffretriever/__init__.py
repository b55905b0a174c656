"""Diffusion language models as retrievers: data, stores, search, evaluation, training and releases."""

__version__ = "0.1.0"

from .registration import register_with_transformers
from .shipped import shipped_release

__all__ = ["shipped_release"]

register_with_transformers()
