"""Answers that are yes or no: how they are read, and what is counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from taid_vlm.benchmarks.question import Judged, Question, Rule, Verdict, groups, one_by_one
from taid_vlm.errors import RecordError
from taid_vlm.evaluation.statistics import Estimate, mean_of, ratio_of

YES, NO = "yes", "no"
VLMEVALKIT = "open-compass/VLMEvalKit, vlmeval/dataset/utils/yorn.py"  # whence `as_word`
_WORDS = re.compile(r"[^\W_]+")

Reader = Callable[[str], str | None]


def first_sentence(answer: str) -> str:
    """POPE's official reading: "No", "no" or "not" before the first full stop is no; else yes.

    Source: AoiDragon/POPE, evaluate.py. An empty answer counts as yes, as it does there.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"} & set(words) else YES


def exactly(answer: str) -> str | None:
    """lmms-eval's reading of POPE: the answer is "yes" or "no", in whatever case."""
    answer = answer.lower().strip()
    return answer if answer in (YES, NO) else None


def as_word(answer: str) -> str | None:
    """Exactly one of "yes" and "no" occurs as a word, as in VLMEvalKit's YOrN_Extraction."""
    found = {YES, NO}.intersection(_WORDS.findall(answer.lower()))
    return found.pop() if len(found) == 1 else None


def first_letters(answer: str) -> str | None:
    """MME's official reading: "yes", else "no", within the first four characters.

    Source: BradyFU/Awesome-Multimodal-Large-Language-Models, calculation.py.
    """
    start = answer.lower()[:4]
    return YES if YES in start else NO if NO in start else None


def first_letters_or_initial(answer: str) -> str | None:
    """lmms-eval's reading of MME: like `first_letters` without full stops; "y" and "n" count."""
    answer = answer.lower().strip().replace(".", "")
    return {"y": YES, "n": NO}.get(answer) or first_letters(answer)


def yes_anywhere(answer: str) -> str:
    """lmms-eval's reading of HallusionBench without a judge: "yes" occurs, or it is no."""
    return YES if YES in answer.lower() else NO


def right_answer(text: str, where: str) -> str:
    """A data file's right answer as "yes" or "no"; raises RecordError for anything else."""
    answer = {"1": YES, "0": NO}.get(text, text.lower().rstrip("."))
    if answer not in (YES, NO):
        raise RecordError(f"{where}: the right answer is '{text}', neither yes (1) nor no (0).")
    return answer


def detection(judged: Sequence[Judged], unread_is_missed: bool = True) -> dict[str, Estimate]:
    """Accuracy, precision, recall and F1 of "yes", and the share of answers read as yes.

    A quotient of nothing by nothing is unknown (NaN): the precision of a model that never says
    yes, the recall where no right answer is yes. F1 is NaN only where both are.

    Args:
        unread_is_missed: an unreadable answer to a question whose answer is yes counts against
            recall; lmms-eval leaves it out.
    """
    said = [float(j.verdict.read == YES) for j in judged]
    wanted = [float(YES in j.question.answers and (unread_is_missed or j.verdict.read is not None))
              for j in judged]
    hit = [s * w for s, w in zip(said, wanted, strict=True)]
    images = groups(judged)
    return {
        "accuracy": mean_of([j.verdict.score for j in judged], images),
        "precision": ratio_of(hit, said, images),
        "recall": ratio_of(hit, wanted, images),
        "f1": ratio_of([2 * h for h in hit],
                       [s + w for s, w in zip(said, wanted, strict=True)], images),
        "yes_ratio": mean_of(said, images),
    }


def rule(
    name: str, reader: Reader, source: str,
    figures: Callable[[Sequence[Judged]], dict[str, Estimate]] = detection,
) -> Rule:
    """A rule that is right where what was read is the one accepted answer."""
    def judge(question: Question, answer: str) -> Verdict:
        read = reader(answer)
        return Verdict(float(read in question.answers), read)

    return Rule(name, 1, one_by_one(judge), figures, source)


WORD = rule("word", as_word, "own: exactly one of yes and no as a word")
