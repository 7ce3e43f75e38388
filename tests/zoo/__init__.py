"""Small models of real families, built offline from configs with their real processor classes."""

from .families import (
    CORE_FAMILIES,
    CORE_TEXT_FAMILIES,
    TEXT_FAMILIES,
    VLM_FAMILIES,
    Built,
    build,
    save,
)
from .tokenizers import make_tokenizer

__all__ = [
    "CORE_FAMILIES",
    "CORE_TEXT_FAMILIES",
    "TEXT_FAMILIES",
    "VLM_FAMILIES",
    "Built",
    "build",
    "make_tokenizer",
    "save",
]
