"""Modality adapters: a record through one model's own template, processor and tokenizer."""

from taid_vlm.adapters.adapter import (
    ImageTextAdapter,
    ModelAdapter,
    TextAdapter,
    check_spelled,
)
from taid_vlm.adapters.continued import Continuation, continued_record
from taid_vlm.adapters.encoded import AnswerSpan, AnswerToken, EncodedBatch, EncodedRow, Side
from taid_vlm.adapters.expansions import SeenSizes
from taid_vlm.adapters.families import check_image_token, make_adapter, probe_image
from taid_vlm.adapters.grids import GlobalViews, View
from taid_vlm.adapters.template import Rendered, agree
from taid_vlm.adapters.texts import PROBE_WORDS
from taid_vlm.adapters.tokens import TOKENIZER_PROBES, TokenTable, check_reloaded
from taid_vlm.adapters.turns import Processor, Supervise, check_kwargs

__all__ = [
    "PROBE_WORDS", "TOKENIZER_PROBES", "AnswerSpan", "AnswerToken", "Continuation", "EncodedBatch",
    "EncodedRow", "GlobalViews", "ImageTextAdapter", "ModelAdapter", "Processor", "Rendered",
    "SeenSizes", "Side", "Supervise", "TextAdapter", "TokenTable", "View", "agree",
    "check_image_token", "check_kwargs", "check_reloaded", "check_spelled", "continued_record",
    "make_adapter", "probe_image",
]
