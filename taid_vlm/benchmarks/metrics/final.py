"""Where a long answer says its final answer, by named patterns; the last place of a kind counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\}){1,400})\}")
_HASHES = re.compile(r"^\s*#{4}[ \t]*(\S.*)$", re.MULTILINE)
_SAYS = re.compile(
    r"\b(?:answer|result|solution)\b[\s*_\"']{0,8}(?:(?:is|are|was|would\s+be|should\s+be|must\s+be"
    r"|equals)\b|[=:])[\s*_:\"']{0,8}(?:(?:therefore|thus|approximately|about)\s+)?(?=\S)",
    re.IGNORECASE)
_BOLD = re.compile(r"\*\*(?!\s)([^*\n]{1,200}?)(?<!\s)\*\*")
_END = re.compile(r"\n|(?<=[^\W\d_])\.(?=\s|$)(?!\s*\d)|(?<=\d)\.(?=\s|$)|[;!?](?=\s|$)")
LATEX_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}")
_AROUND = " \t\r\n*_`\"'“”‘’"


def _last(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.findall(text)
    return str(found[-1]) if found else ""


def _said(text: str) -> str:
    """To the end of the sentence after the last "the answer is" or "answer:"."""
    ends = [match.end() for match in _SAYS.finditer(text)]
    return _END.split(text[ends[-1]:].lstrip(_AROUND), maxsplit=1)[0] if ends else ""


PATTERNS: Mapping[str, Callable[[str], str]] = {
    "boxed": lambda text: _last(_BOXED, text),  # \boxed{14}
    "hashes": lambda text: _last(_HASHES, text),  # GSM8K's "#### 14"
    "answer_is": _said,  # "the answer is 14", "Answer: 14", "**Final answer:** 14"
    "bold": lambda text: _last(_BOLD, text),  # **14**
    "last_line": lambda text: text.strip().rsplit("\n", 1)[-1],
    "whole": lambda text: text,
}


def final_texts(answer: str, names: Sequence[str]) -> Iterator[str]:
    """What those patterns find, in their order, without quotes and markup around it."""
    for name in names:
        text = LATEX_TEXT.sub(r"\1", PATTERNS[name](answer)).lstrip(_AROUND)
        if text := text.rstrip(f"{_AROUND}."):
            yield text
