"""Modality adapters: a record through one model's own template, processor and tokenizer."""

from taid_vlm.adapters.adapter import (
    PROBE_WORDS,
    AnswerSpan,
    AnswerToken,
    EncodedBatch,
    EncodedRow,
    ImageTextAdapter,
    ModelAdapter,
    Side,
    TextAdapter,
    check_spelled,
    make_adapter,
)
from taid_vlm.adapters.template import Processor, Rendered, Supervise
from taid_vlm.adapters.tokens import TokenTable

__all__ = [
    "PROBE_WORDS",
    "AnswerSpan",
    "AnswerToken",
    "EncodedBatch",
    "EncodedRow",
    "ImageTextAdapter",
    "ModelAdapter",
    "Processor",
    "Rendered",
    "Side",
    "Supervise",
    "TextAdapter",
    "TokenTable",
    "check_spelled",
    "make_adapter",
]
