"""Answers on disk as soon as they are given, and which of them still hold when asked again.

    answers/.NAME.partial-0.jsonl   while a benchmark is answered, one file per process; the first
                                    line says by which model and under which settings
    answers/NAME.jsonl              once it is done, in the order of the data
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from taid_vlm.benchmarks.answering import Answer, Answerer, Given, Seed
from taid_vlm.benchmarks.question import Question
from taid_vlm.errors import RecordError, TaidError, is_number
from taid_vlm.io.files import write_text
from taid_vlm.io.hashing import SHORT, file_sha256, folder_sha256, sha256
from taid_vlm.io.jsonl import dump_lines, need, read_lines
from taid_vlm.records.fingerprint import image_hash

FOLDER = "answers"
WEIGHTS = (".safetensors", ".json", ".jinja", ".model", ".txt")

Key = tuple[str, int]  # a question's id, and the seed it was answered with
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """An answer and the seconds that it took."""

    answer: Answer
    seconds: float


class AnswerStore:
    """The answers to one benchmark in a results folder.

    Args:
        identity: what answers depend on beside their question: the model and the settings. Those
            given under another identity are not used, `replaced` says which keys differ.
        hashes: of every question, by id; an answer to another text or image is not used.
        rank: which process this is.
    """

    def __init__(self, folder: Path, task: str, identity: Mapping[str, Any],
                 hashes: Mapping[str, str], rank: int = 0) -> None:
        self.folder, self.task, self.hashes = folder / FOLDER, task, hashes
        self.identity = flat(identity)
        self.path = self.folder / f".{task}.partial-{rank}.jsonl"
        self.final = self.folder / f"{task}.jsonl"
        self.answers: dict[Key, Stored] = {}
        self.replaced: list[str] = []
        self.reused = False  # whether answers of the final file are

    def load(self, finished: Mapping[str, Any] | None) -> None:
        """Take up what earlier calls left; `finished`: the identity of the final file, if any."""
        if finished is not None and self.final.exists() and self._same(flat(finished)):
            for line in _lines(self.final):
                for draw in line.get("repeats") or [line]:
                    self._take({"id": line.get("id"), "asked": line.get("asked"), **draw})
            self.reused = bool(self.answers)
        self.gather()

    def gather(self) -> None:
        """Take up the partial files, those of other processes too."""
        for path in self._partial_files():
            head, *lines = _lines(path) or [{}]
            if self._same(head):
                for line in lines:
                    self._take(line)

    def _partial_files(self) -> list[Path]:
        return sorted(self.folder.glob(f".{self.task}.partial-*.jsonl"))

    def _same(self, other: Mapping[str, Any]) -> bool:
        names = sorted({*other, *self.identity})
        changed = [f"{name}: {other.get(name)} -> {self.identity.get(name)}" for name in names
                   if other.get(name) != self.identity.get(name)]
        self.replaced += [change for change in changed if change not in self.replaced]
        return not changed

    def _take(self, stored: Line) -> None:
        line: dict[str, Any] = {
            "problem": "", "cut": False, "likelihoods": [], "seconds": 0.0, "thought": "",
            "thought_tokens": 0, "opened": False, "calls": [], **stored}
        place = f"answers to {self.task} in '{self.folder}'"
        need(line, place, {"id": str, "asked": str, "answer": str, "seed": int, "problem": str,
                           "cut": bool, "likelihoods": list, "seconds": (int, float),
                           "thought": str, "thought_tokens": int, "opened": bool,
                           "calls": list, **({"raw": str} if "raw" in line else {})})
        for pair in line["likelihoods"]:
            if not (isinstance(pair, list) and [*map(is_number, pair)] == [True, True]):
                raise TaidError(f"{place}: likelihoods must be pairs of numbers, got {pair!r:.60}.")
        known = self.hashes.get(line["id"])
        if known == line["asked"]:
            likelihoods = tuple((total, tokens) for total, tokens in line["likelihoods"])
            answer = Answer(line.get("raw", line["answer"]), line["problem"], line["cut"],
                            likelihoods, line["thought"], line["thought_tokens"], line["opened"],
                            tuple(line["calls"]))
            self.answers[line["id"], line["seed"]] = Stored(answer, line["seconds"])
        elif known is not None and "its text or image" not in self.replaced:
            self.replaced.append("its text or image")

    def line(self, key: Key) -> Line:
        """An answer as it stands in a file."""
        return {"id": key[0], "seed": key[1], "asked": self.hashes[key[0]],
                "seconds": self.answers[key].seconds, **answer_fields(self.answers[key].answer)}

    def open(self) -> None:
        """Begin this process's partial file with what it is to go on from, whole lines only."""
        write_text(dump_lines([self.identity, *map(self.line, self.answers)]), self.path)

    def add(self, given: Given, seed: int, seconds: float) -> None:
        """Keep answers that have just been given, at once."""
        new = {(question.id, seed): Stored(answer, seconds / len(given))
               for question, answer in given}
        self.answers |= new
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(dump_lines(map(self.line, new)))
        except OSError as error:
            raise TaidError(f"'{self.path}' could not be written: {error.strerror or error}"
                            ) from error

    def finish(self, lines: Sequence[Line]) -> None:
        """The final file, whole or not there; the partial ones are no longer needed."""
        write_text(dump_lines(lines), self.final)
        for path in self._partial_files():
            path.unlink()


    def discard(self, own: bool = False) -> None:
        """Take away partial files; `own`: this process's only. The final one stays."""
        for path in [self.path] if own else self._partial_files():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # if it is empty


def keep_answers(
    store: AnswerStore, questions: Sequence[Question], seeds: Mapping[int, Seed],
    open_answerer: Callable[[], Answerer], label: str, shown: bool = True,
) -> None:
    """Ask what has no answer yet, and keep answers as they come.

    Args:
        seeds: what answers are drawn with, by the number that they are kept under.
        open_answerer: called where there is anything to ask.
        shown: whether this process shows its progress.
    """
    done = {number: {question.id for question in questions
                     if (question.id, number) in store.answers} for number in seeds}
    known = sum(map(len, done.values()))
    if known == len(questions) * len(seeds):
        return
    answerer = open_answerer()
    store.open()
    with tqdm(total=len(questions) * len(seeds), initial=known, unit="question", desc=label,
              disable=None if shown else True) as bar:  # None: where a terminal is
        try:
            for number, seed in seeds.items():
                since = time.perf_counter()
                for given in answerer.answers(questions, done[number], seed):
                    now = time.perf_counter()
                    store.add(given, number, now - since)
                    bar.update(sum(question.id not in done[number] for question, _ in given))
                    since = now
        except TaidError:
            if not store.answers:
                store.discard(own=True)
            raise


def answer_fields(answer: Answer) -> dict[str, Any]:
    """An answer as it stands in a line; what says nothing is left out."""
    rest = {key: value for key, value in asdict(answer).items() if key != "text" and value}
    return {"answer": answer.text, **rest}


def _lines(path: Path) -> list[Line]:
    """The whole lines of a file; the last one may be torn by an interruption."""
    try:
        return [line for _, line in read_lines(path, torn=True)]
    except RecordError as error:
        raise TaidError(f"'{path}' is damaged ({error}); remove it to answer anew.") from None


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, in JSON's own types."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {
            f"{above}{key}": value}
    return leaves


# ----- fingerprints -------------------------------------------------------------------------


def question_hash(question: Question) -> str:
    """Of everything a model is shown: the texts and the images' bytes, in their order."""
    images = iter(question.images)
    prompt = (b"text\0" + part.encode() + b"\0" if part is not None else
              b"image\0" + image_hash(next(images), path_hash) for part in question.prompt)
    choices = (b"choice\0" + choice.encode() + b"\0" for choice in question.choices)
    return sha256([*prompt, *choices]).hex()[:SHORT]


def path_hash(path: Path) -> bytes:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return b"missing"
    return _same_file_hash(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1 << 16)
def _same_file_hash(path: Path, changed: int, size: int) -> bytes:
    """Many questions may be about one image."""
    return file_sha256(path) if path.is_file() else b"missing"


def data_hash(path: Path) -> str | None:
    """sha256 of a data file, or of a folder's files and their names; None for a hub's name."""
    if path.is_file():
        return file_sha256(path).hex()
    return folder_sha256(path, path.rglob("*")).hex() if path.is_dir() else None


def weights_hash(folder: Path) -> str:
    """Of the files that make a saved model answer as it does: weights, configuration, processor.

    All their bytes: a header alone would be the same after another epoch of training.
    """
    return folder_sha256(folder, (f for f in folder.iterdir() if f.suffix in WEIGHTS)).hex()
