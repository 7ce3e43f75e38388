"""The adapter of a processor: generic, or one of the few exceptions that have to be spelled out."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from taid_vlm.adapters.adapter import ImageTextAdapter, ModelAdapter, TextAdapter
from taid_vlm.adapters.encoded import EncodedRow, Side
from taid_vlm.adapters.template import Rendered, TextSpan, has_chat_template
from taid_vlm.adapters.turns import Processor
from taid_vlm.adapters.video import FramesAdapter, TilesAdapter
from taid_vlm.errors import TaidError
from taid_vlm.records import ImageRef, Message, Record
from taid_vlm.records.images import GREY
from taid_vlm.records.videos import Picture

# a token that stands for features is not that much rarer in an image than any other; one that only
# marks where a row or an image ends is
MARKERS = 4


class TileListAdapter(ImageTextAdapter):
    """PerceptionLM: its processor cannot stack images with unequal numbers of tiles.

    The model only ever looks at all tiles in a row, so they are given as those of one image.
    """

    return_tensors = None
    takes_videos = False  # type: ignore[assignment]

    def _tensors(self, encoded: Mapping[str, Any]) -> dict[str, Tensor]:
        inputs = {key: torch.as_tensor(value) for key, value in encoded.items()
                  if key != "pixel_values"}
        if "pixel_values" in encoded:
            inputs["pixel_values"] = torch.cat(list(encoded["pixel_values"]))[None]
        return inputs


class PrefixAdapter(ImageTextAdapter):
    """PaliGemma: images, BOS, the question and a newline, then the answer.

    The prefix is seen both ways and the answer only backwards, which `token_type_ids` say (0 and
    1). The processor writes this text itself and has no place for records without an image (it
    refuses them, or in a batch puts their BOS in the middle of the text), so the same text is
    written here and only its tokenizer and its image processor are used.
    """

    one_question = ("is PaliGemma, which answers one question; give records of one user's and one "
                    "assistant's turn, or choose another model.")

    takes_videos = False  # type: ignore[assignment]
    answer_type = 1

    def __init__(
        self, processor: Processor, role: str, max_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if has_chat_template(processor):
            raise TaidError(f"{role}: PaliGemma takes a question and gives an answer, in a text of "
                            "its own; it cannot use a chat template.",
                            mend=f"Remove {role}.chat_template.")
        ModelAdapter.__init__(self, processor, role, max_length, chat_template_kwargs)

    @property
    def _added_bos(self) -> str:
        return self.tokenizer.bos_token

    def _render_text(self, text: str) -> Rendered:
        return self._with_answer(self._added_bos, text)

    def _join(self, record: Record) -> Rendered:
        return self._with_answer(self._prefix(record), record.answers[0],
                                 record.messages[1].weight)

    def _with_answer(self, prefix: str, answer: str, weight: float = 1.0) -> Rendered:
        start, end = len(prefix), len(prefix) + len(answer)
        return Rendered(prefix + answer + self.tokenizer.eos_token,
                        (TextSpan(start, end, 0, True, weight, (("text", start, end),)),))

    def _prefix(self, record: Record) -> str:
        images = self.processor.image_token * len(record.images)
        return images + self._added_bos + record.messages[0].text.strip() + "\n"

    def prompt(self, record: Record, turn: int) -> Rendered:
        return Rendered(self._prefix(record), ())

    def _process(  # type: ignore[no-untyped-def]
        self, rendered: Sequence[Rendered], images: Sequence[Sequence[Picture]],
        padding_side: Side, add_special: bool,
    ):
        prefixes, answers = [], []
        expansions = [self._image_spans(len(row)) for row in images]
        for item, spans in zip(rendered, expansions, strict=True):
            start = item.spans[0].start if item.spans else len(item.text)
            shown = "".join(span["replacement"] for span in spans)
            prefixes.append(shown + item.text[spans[-1]["span"][1] if spans else 0 : start])
            answers.append(item.text[start:])
        inputs = dict(self.tokenizer(
            prefixes, text_pair=answers if any(answers) else None, padding=True,
            padding_side=padding_side, add_special_tokens=False, return_token_type_ids=True,
            return_tensors="pt",
        ))
        flat = [image for row in images for image in row]
        if flat:
            inputs |= self.processor.image_processor(flat, return_tensors="pt")
        return inputs, expansions

    def _image_spans(self, count: int) -> list[dict[str, Any]]:
        """The expansions of `count` images in front, as a processor's text replacements."""
        token, each = self.processor.image_token, self.processor.image_seq_length
        old, new = len(token), len(token) * each
        return [{"span": (i * old, (i + 1) * old), "new_span": (i * new, (i + 1) * new),
                 "replacement": token * each} for i in range(count)]


EXCEPTIONS: dict[str, type[ImageTextAdapter]] = {
    "Gemma3Processor": FramesAdapter,
    "PaliGemmaProcessor": PrefixAdapter,
    "PerceptionLMProcessor": TileListAdapter,
    "SmolVLMProcessor": TilesAdapter,
}


def make_adapter(
    processor: Processor, role: str, max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ModelAdapter:
    """TextAdapter for a tokenizer, ImageTextAdapter (or an exception) for a processor.

    Args:
        processor: a tokenizer, or a processor with one.
        role: what messages call the model.
        max_length: tokens of the longest row; None: no bound but the model's own.
        chat_template_kwargs: variables of the model's chat template.

    Raises:
        TaidError: neither a tokenizer nor a processor with one.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from taid_vlm.adapters import make_adapter
        >>> from taid_vlm.demo.demo import data_folder
        >>> from taid_vlm.records import parse_record
        >>> folder = data_folder() / "models/words-student"
        >>> adapter = make_adapter(AutoTokenizer.from_pretrained(folder), "student")
        >>> record = parse_record({"question": "is it red?", "answer": "no"}, "here")
        >>> rendered = adapter.render(record)
        >>> rendered.text
        '[Q]is it red?[A]no[END]'
        >>> [row] = adapter.encode([rendered], [[]]).rows
        >>> len(row.ids)
        8
    """
    kind: type[ModelAdapter]
    if isinstance(processor, PreTrainedTokenizerBase):
        kind = TextAdapter
    elif isinstance(processor, ProcessorMixin) and hasattr(processor, "tokenizer"):
        kind = EXCEPTIONS.get(type(processor).__name__, ImageTextAdapter)
    else:
        raise TaidError(
            f"{role}: {type(processor).__name__} is neither a tokenizer nor a processor with one.")
    return kind(processor, role, max_length, chat_template_kwargs)


def probe_image(adapter: ModelAdapter, width: int, height: int) -> EncodedRow | None:
    """A question about a blank image of this size (in pixels) and its answer; None where it is
    refused."""
    blank = Image.new("RGB", (width, height), GREY)
    question, answer = Message("user", (None, "what")), Message("assistant", ("yes",))
    record = Record("probe", (question, answer), (ImageRef(blank, "probe"),))
    with contextlib.suppress(Exception):  # processors raise anything
        return adapter.encode([adapter.render(record)], [[blank]]).rows[0]
    return None


def check_image_token(adapter: ModelAdapter, config: PretrainedConfig) -> None:
    """Raise TaidError where an image becomes other tokens than the model puts its features for:
    a tokenizer that has lost that token, or has it under another number."""
    number = getattr(config, "image_token_id", None)
    own = type(config).__module__.startswith("transformers.")  # others may mean something else
    row = probe_image(adapter, 224, 224) if own and adapter.sees_images else None
    if row is None or not row.images or type(number) is not int:
        return
    counts = Counter(token for token, (a, _) in zip(row.ids, row.byte_spans, strict=True)
                     if any(start <= a < end for start, end in row.images))
    most, times = max(counts.items(), key=lambda item: item[1], default=(number, 0))
    if counts[number] * MARKERS < times:
        names = adapter.tokenizer.convert_ids_to_tokens([number, most])
        raise TaidError(
            f"{adapter.role}: '{adapter.tokenizer.name_or_path}': config.json's image_token_id is "
            f"{number}, which is {names[0]!r} in tokenizer.json, but an image becomes {names[1]!r} "
            f"({most}): the image token is missing there, or has another number. Put the model's "
            f"own tokenizer beside it, or set {adapter.role}.processor_name_or_path.")
