"""MATH-Vision's rule: the final answer out of a response, and whether it is the right one.

Source: mathllm/MATH-V, evaluation/evaluate.py and evaluation/utils.py (lmms-eval's
`mathvision_standard_eval` is the same rule). The order of the steps decides, so it is kept.
"""

from __future__ import annotations

import re

from taid_vlm.benchmarks.metrics.latex import LONGEST, value_of
from taid_vlm.benchmarks.metrics.text import as_number
from taid_vlm.benchmarks.question import Question, Rule, Verdict, one_by_one

OPTIONS = "ABCDE"
_FLAGS = tuple(flag for noun in ("final answer is", "answer is", "correct answer is",
                                 "answer should be") for flag in (f"the {noun}", f"The {noun}"))
_REWRITTEN = (  # twice in part: what collapsed backslashes uncover goes as well
    (" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", ""),
    ("\\text", ""), ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("{m}^3", ""), ("m^3", ""), ("{units}", ""),
    ("units", ""), ("{km}", ""), ("km", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"),
    ("dfrac", "frac"), ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""),
    ("\\$", ""), ("$", ""), ("\\%", ""), ("{.", "{0."),
)
_BRACKETED = (re.compile(r"\(([a-e])\)"), re.compile(r"\{([a-e])\}"))
_QUOTIENT = re.compile(r"(-?[1-9]\d{0,99}|0)/(-?[1-9]\d{0,99}|0)")


def read_answer(response: str) -> str:
    """The final answer of a response, normalised; "" where nothing is left."""
    answer = _letter_at_an_end(response.strip())
    tail = answer.rsplit("is ", 1)[-1].rstrip(".")
    if as_number(tail) is not None:
        answer = tail
    if "oxed{" not in answer:
        answer = _after_flags(answer)
    elif answer.count("oxed{") > 1:
        answer = "\\boxed{" + answer.rsplit("oxed{", 1)[-1]
    answer = _normalised(answer.lower())
    for bracketed in _BRACKETED:
        answer = bracketed.sub(r"\1", answer)
    return answer.rstrip(".").lstrip(":").strip()


def same_answer(answer: str, gold: str) -> bool:
    """Whether two answers are the same text, or the same value to two decimals.

    Tuples are compared part by part.
    """
    answer, gold = answer.lower().strip(), gold.lower().strip()
    if not answer or not gold:
        return False
    if answer == gold:
        return True
    values, wanted = _values(answer), _values(gold)
    return None not in values and values == wanted


def is_right(answer: str, gold: str, choices: tuple[str, ...] = ()) -> bool:
    """The official verdict on an answer that `read_answer` gave: letter or option's text."""
    value = choices[OPTIONS.index(gold)] if choices else ""
    return same_answer(answer, gold) or same_answer(answer, value)


def is_readable(answer: str, choices: tuple[str, ...] = ()) -> bool:
    """Whether a short answer is there, which names an option where there are any."""
    if not 0 < len(answer) <= LONGEST:
        return False
    named = (*OPTIONS[:len(choices)].lower(), *choices)
    return not choices or any(same_answer(answer, option) for option in named)


def _letter_at_an_end(answer: str) -> str:
    return next((x for x in OPTIONS if answer.endswith((f" {x}.", f" ({x}).")) or
                 answer.startswith((f"{x}\n", f"({x})\n", f"({x}) {x}\n"))), answer)


def _after_flags(answer: str) -> str:
    for flag in _FLAGS:
        _, found, after = answer.rpartition(flag)
        answer = after.strip()
        if found:
            answer = answer.split("\n")[0].split(". ")[0]
    return answer


def _normalised(answer: str) -> str:
    answer = _unboxed(answer.replace("{}", ""))
    answer = answer.rsplit("=", 1)[-1].rsplit("\\approx", 1)[-1]
    for old, new in _REWRITTEN:
        answer = answer.replace(old, new)
    answer = f"0{answer}" if answer.startswith(".") else answer
    if "sqrt" in answer:  # only then: the published verdicts are of this order
        answer = _with_braces(answer)
    answer = "\\frac{1}{2}" if answer == "0.5" else answer
    quotient = _QUOTIENT.fullmatch(answer)
    return f"\\frac{{{quotient[1]}}}{{{quotient[2]}}}" if quotient else answer


def _with_braces(answer: str) -> str:
    """Braces around the single characters that roots and fractions are taken of without."""
    head, *parts = answer.split("\\sqrt")
    roots = [part if part[:1] in ("", "{") else f"{{{part[0]}}}{part[1:]}" for part in parts]
    head, *parts = "\\sqrt".join((head, *roots)).split("\\frac")
    if any(part[:1] != "{" and len(part) < 2 for part in parts):
        return "\\frac".join((head, *parts))
    return "\\frac".join((head, *map(_fraction_with_braces, parts)))


def _fraction_with_braces(part: str) -> str:
    below = part[1:] if part[1:2] == "{" else f"{{{part[1:2]}}}{part[2:]}"
    return part if part[0] == "{" else f"{{{part[0]}}}{below}"


def _unboxed(answer: str) -> str:
    start, end = answer.find("oxed{"), answer.rfind("}")
    if 0 <= start < end:
        answer = answer[start + len("oxed{"):end]
    opening, closing = answer.find("{"), answer.find("}")
    return answer[:closing] if closing >= 0 and not 0 <= opening < closing else answer


def _values(text: str) -> list[float | None]:
    """The values of a tuple or list, or of a single expression, to two decimals."""
    parts = text[1:-1].split(",") if text[:1] + text[-1:] in ("()", "[]") else []
    values = [value_of(part) for part in (parts if len(parts) > 1 else [text])]
    return [None if value is None else round(value, 2) for value in values]


def _judge(question: Question, answer: str) -> Verdict:
    read = read_answer(answer)
    if is_right(read, question.answers[0], question.choices):
        return Verdict(1.0, read)
    return Verdict(0.0, read if is_readable(read, question.choices) else None)


OFFICIAL = Rule("official", 1, one_by_one(_judge), source="mathllm/MATH-V, evaluation/evaluate.py")
