"""Prompts: which answers of which records are to be written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.store import path_hash
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError, TaidError
from taid_vlm.io.hashing import SHORT
from taid_vlm.io.jsonl import parse_json
from taid_vlm.records import Message, Record, StreamedRecords, first_rows, open_records
from taid_vlm.records.fingerprint import record_hash
from taid_vlm.records.record import Malformed

Turns = Literal["each", "last"]
STAND_IN = Message("assistant", ("yes",))  # where a record has no answer yet
_KEYS = """On the command line: --data '{"path": "FILE", "columns": {"prompt": "COLUMN"}}'."""
_WITHOUT_EFFECT = {"weight", "teacher", "streaming"}
NO_QUESTION, NOT_LEARNED = "nothing is asked", "no answer is learned"


@dataclass(frozen=True)
class Prompt(Question):
    """One answer that is to be written; its record is read when it is asked for, so that images
    wait on the disk.

    index, turn: which record, and which of its answers. size: images and characters before it.
    sha256: of all that stands before the answer.
    """

    records: Any = field(default=None, repr=False, compare=False)
    index: int = 0
    turn: int = 0
    size: tuple[int, int] = (0, 0)
    sha256: str = ""

    def asked(self) -> tuple[Record, int]:
        """The record up to the answer, with its own answer or one that stands in for it."""
        record = self.records[self.index]
        before = record.before(self.turn)
        own = record.messages[len(before) :][:1]
        answer = own[0] if own and not own[0].is_empty else replace(
            STAND_IN, weight=own[0].weight if own else 1.0)
        return replace(record, messages=(*before, answer),
                       images=record.images_before(self.turn)), self.turn

    @property
    def length(self) -> tuple[int, int]:
        return self.size

    @property
    def reference(self) -> str:
        """The record's own answer, "" where it has none."""
        answers = self.records[self.index].answers
        return answers[self.turn] if self.turn < len(answers) else ""


@dataclass(frozen=True)
class Prompts:
    """rows: of the source. left_out: records without a prompt, by reason. sees: whether a prompt
    has an image or a video."""

    source: DataSource
    asked: Sequence[Prompt]
    rows: int
    left_out: Counter[str]
    sees: bool


def parse_source(
    data: str, max_records: int | None = None, video_frames: int | None = None
) -> DataSource:
    """A path or name, or the keys of `data.train` as JSON; raises TaidError."""
    keys: Any = {"path": data}
    if data.lstrip().startswith("{"):
        keys = parse_json(data, "--data")
    for key in _WITHOUT_EFFECT & keys.keys():
        raise TaidError(f"--data: {key} has no effect here; leave it out.")
    options = {"max_records": max_records,
               "video": None if video_frames is None else {"frames": video_frames}}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given.keys() & keys.keys():
        raise TaidError(f"--data: {key} stands twice, in it and as an option.")
    try:
        return DataSource(**{**keys, **given})
    except TaidError as error:
        raise TaidError(f"--data: {error}") from None


def read_prompts(source: DataSource, turns: Turns) -> Prompts:
    """All prompts of a source.

    Args:
        turns: "each" answer that is learned, after the data's own words up to it, or the "last"
            one. A conversation that ends with a question is answered there alone.

    Raises:
        TaidError: no records, streamed ones, or none that asks anything.
    """
    try:
        records = open_records(source, prompts=True)
    except RecordError as error:
        raise RecordError(error.message, mend=error.mend or _KEYS * ("columns" in error.message)
                          ) from None
    if isinstance(records, StreamedRecords):
        raise TaidError(f"--data: '{source.shown}' cannot be streamed here; leave streaming out.")
    asked, left_out = list[Prompt](), Counter[str]()
    for index, row in enumerate(first_rows(records)):
        wanted, why = ([], row.reason) if isinstance(row, Malformed) else _wanted(row, turns)
        left_out.update([] if wanted else [why])
        asked += [_prompt(records, index, row, turn) for turn in wanted
                  if isinstance(row, Record)]
    if not asked:
        counted = ", ".join(f"{n} x {reason}" for reason, n in left_out.items())
        raise TaidError(f"--data: no record of '{source.shown}' asks for an answer: {counted}.")
    for name, number in Counter(prompt.id for prompt in asked).items():
        if number > 1:
            raise TaidError(f"--data: two records are called '{name}'; name their files so that "
                            "they, or the folders they lie in, tell them apart.")
    return Prompts(source, asked, len(records), left_out,
                   any(prompt.size[0] for prompt in asked))


def _wanted(record: Record, turns: Turns) -> tuple[list[int], str]:
    """Which answers are to be written; why where that is none."""
    if not record.messages:
        return [], NO_QUESTION
    wanted = record.learned if turns == "each" else record.learned[-1:]
    if record.messages[-1].role != "assistant":
        wanted = [len(record.answers)]
    elif not wanted:
        return [], NOT_LEARNED
    return [turn for turn in wanted if record.before(turn)], NO_QUESTION


def _prompt(records: Any, index: int, record: Record, turn: int) -> Prompt:
    before, images = tuple(record.before(turn)), record.images_before(turn)
    shown = replace(record, messages=before, images=images, categories=())
    return Prompt(f"{record.source}/{turn}", (), records=records, index=index, turn=turn,
                  size=(len(images), sum(len(message.text) for message in before)),
                  sha256=record_hash(shown, path_hash).hex()[:SHORT])
