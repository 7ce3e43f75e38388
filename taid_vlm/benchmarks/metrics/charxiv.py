"""CharXiv's questions and what its judge is asked, in the words of the authors' own file.

The data hold numbers of templates; the templates are in princeton-nlp/CharXiv, src/constants.py
(a few assignments of texts, which are read and never run). VLMEvalKit's tables have both as texts.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.question import (
    JudgePrompt,
    Question,
    Rule,
    Verdict,
    accuracy,
    left_to_judge,
)
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import RecordError

FILE = "constants.py"
ANSWER = "{PREDICTION}"  # where VLMEvalKit's tables have the answer
WITHOUT_PLACE = (18, 19)  # about the layout of all subplots
_RUBRICS = {"title": (1,), "ocr": (2, 3, 4, 5, 6, 7), "quant": (8, 9, 10, 12, 14, 15, 17, 19),
            "bool": (11,), "enum": (13,), "trend": (16,), "layout": (18,)}
RUBRIC_OF = {number: name for name, numbers in _RUBRICS.items() for number in numbers}
_KINDS = {"Information Extraction": (1, 2, 3, 4, 5, 6, 7), "Enumeration": (8, 9, 13, 14, 15),
          "Counting": (10, 12, 19), "Pattern Recognition": (11, 16, 18), "Compositionality": (17,)}
KIND_OF = {number: name for name, numbers in _KINDS.items() for number in numbers}
REASONING_KINDS = {1: "Text-in-Chart", 2: "Text-in-General", 3: "Number-in-Chart",
                   4: "Number-in-General"}
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


def constants(row: Row) -> Mapping[str, Any]:
    """The authors' templates, from `constants.py` beside the data or in `src/` above them."""
    root = row.root
    places = [] if root is None else [root / FILE, root / "src" / FILE, root.parent / "src" / FILE]
    for place in places:
        if place.is_file():
            return _assigned(place)
    raise RecordError(
        f"{row.where}: CharXiv's data hold numbers of questions; their words are in "
        f"princeton-nlp/CharXiv, src/{FILE}. Put that file into the folder of the data, or take "
        "VLMEvalKit's table.")


@functools.lru_cache(8)
def _assigned(path: Path) -> dict[str, Any]:
    """What a file assigns to names, if it is written out; nothing of it is run."""
    found: dict[str, Any] = {}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise RecordError(f"'{path}' cannot be read ({error}).") from None
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def need(words: Mapping[str, Any], name: str, key: Any, where: str) -> str:
    """A template; raises RecordError where the authors' file has none."""
    try:
        return str(words[name] if key is None else words[name][key])
    except (LookupError, TypeError):
        raise RecordError(f"{where}: {FILE} has no {name}[{key!r}].") from None


def describing(words: Mapping[str, Any], number: int, row: Row) -> str:
    """A descriptive question about the subplot of a row."""
    template = need(words, "DESCRIPTIVE_RESP_INST", number, row.where)
    return template if number in WITHOUT_PLACE else template.format(_subplot(row))


def _subplot(row: Row) -> str:
    """Where to look: said in words, by row and column, or nowhere where there is one plot."""
    if "subplot_loc" in row and not isinstance(row["subplot_loc"], (list, tuple)):
        return f"For {row.text('subplot_loc')}, "
    at = list(row["subplot_loc"]) if "subplot_loc" in row else [
        row.integer("subplot_row"), row.integer("subplot_col")]
    return "For the current plot, " if at[0] == 0 else (
        f"For the subplot at row {at[0]} and column {at[1]}, ")


def grade_describing(words: Mapping[str, Any], number: int, gold: str, where: str) -> str:
    """What the judge is asked about one answer (the authors ask about five at once)."""
    prefix = need(words, "DESCRIPTIVE_GRADING_PREFIX", None, where)
    asked = {"<|NUM_TRIPLETS|>": "1", "<|JSON_KEYS|>": str(["extract_answer_T1", "score_T1"]),
             "<|OVERARCHING_QUESTION|>": need(words, "DESCRIPTIVE_GRADING_QMAP", number, where)}
    for place, text in asked.items():
        prefix = prefix.replace(place, text)
    rubric = need(words, "DESCRIPTIVE_GRADING_ICL", RUBRIC_OF.get(number), where)
    return f"{prefix}{rubric}T1:\nResponse 1: {ANSWER}\nGround Truth 1: {gold}\n\n"


def reasoning(words: Mapping[str, Any], kind: int, text: str, gold: str, where: str) -> str:
    """A reasoning question; of numbers in general it says how many decimals are wanted."""
    template, digits = need(words, "REASONING_RESP_INST", kind, where), gold.partition(".")[2]
    form = (f"a number with {len(digits)} decimal places." if "." in gold else "an exact integer.")
    return template.format(text, *([f"* Your final answer must be {form}"] * (kind == 4)))


def grade_reasoning(words: Mapping[str, Any], kind: int, text: str, gold: str, where: str) -> str:
    """What the judge is asked about an answer."""
    asked = need(words, "REASONING_GRADING_INST", kind, where)
    for place, part in {"<|question|>": text, "<|ground_truth|>": gold, "<|response|>": ANSWER
                        }.items():
        asked = asked.replace(place, part)
    return need(words, "REASONING_GRADING_PREFIX", None, where) + asked


def ask(template: str, question: Question, answer: str) -> str:
    """What the judge is asked; every question has a template of its own."""
    head, _, tail = str(question.extra["grading"]).rpartition(ANSWER)
    return f"{head}{answer.strip()}{tail}"


def read_score(question: Question, reply: str) -> Verdict | None:
    """The score 0 or 1 of the JSON object in a reply, and the answer that it extracted."""
    try:
        tree = json.loads(_OBJECT.search(reply)[0])  # type: ignore[index]
    except (TypeError, ValueError):
        return None
    scores = [value for key, value in tree.items() if key.startswith("score")]
    if len(scores) != 1 or isinstance(scores[0], bool) or scores[0] not in (0, 1):
        return None
    said = next((str(value) for key, value in tree.items() if key.startswith("extract")), "")
    return Verdict(float(scores[0]), said)


def rule(source: str) -> Rule:
    """An answer is worth what the judge says; both halves ask it in one way.

    Args:
        source: a file of the authors' repository.
    """
    return Rule("judge", 1, left_to_judge, accuracy, f"princeton-nlp/CharXiv, {source}",
                JudgePrompt("CharXiv", 1, ask, read_score, 256))
