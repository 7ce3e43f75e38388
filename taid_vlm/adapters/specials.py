"""Special tokens in texts: which ones an answer may hold, and which no text may spell."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from taid_vlm.adapters.encoded import EncodedRow
from taid_vlm.adapters.turns import Processor
from taid_vlm.errors import SampleDropped
from taid_vlm.records import Record

MEDIA_TOKEN, CONTROL = "image token in a text", "special token inside an answer"
_CONTROLS = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
_MEDIA = ("image", "video", "audio")
_OF_THOUGHT = re.compile("think|thought|reason|channel", re.IGNORECASE)


def media_tokens(processor: Processor) -> frozenset[str]:
    """What stands for images, video and sound in a model's texts."""
    names = (getattr(processor, f"{kind}_token", None) for kind in _MEDIA)
    return frozenset(str(name) for name in names if name)


def refuse_media_tokens(record: Record, tokens: Iterable[str], role: str) -> None:
    """Raise SampleDropped for a text that spells one: it could not be told from an image."""
    texts = [part for message in record.messages for part in message.parts if part]
    for text in (*texts, record.text or ""):
        for token in tokens:
            if token in text:
                raise SampleDropped(
                    MEDIA_TOKEN, f"{record.source}: the text holds '{token}', which stands for an "
                    f"image in the {role}, and there is no image for it")


def control_ids(
    tokenizer: PreTrainedTokenizerBase, media: Iterable[str], end_of_turn: int | None,
    probe: EncodedRow | None,
) -> frozenset[int]:
    """Special tokens that an answer cannot hold: those that begin and end texts and turns, and
    those that stand for images. Others (boxes, tools, thoughts) are learned as any token.

    Args:
        probe: a question and its answer; all that its template prints before the answer is meant.
    """
    names = [getattr(tokenizer, f"{kind}_token", None) for kind in _CONTROLS]
    ids = {*tokenizer.convert_tokens_to_ids([name for name in (*names, *media) if name]),
           end_of_turn}
    if probe is not None and probe.answers[0].tokens:
        before = probe.ids[: probe.answers[0].tokens[0].position - probe.offset]
        ids |= {index for index, name in zip(before, tokenizer.convert_ids_to_tokens(before),
                                             strict=True) if not _OF_THOUGHT.search(name)}
    return frozenset(index for index in ids if index is not None)
