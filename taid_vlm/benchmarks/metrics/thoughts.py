"""Thoughts, taken off an answer by named rules with versions, before any rule judges it.

A rule knows what opens and what closes a thought of some families. Templates of DeepSeek-R1 and
Qwen3 put the opening mark into the prompt, so that an answer may hold the closing one alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import NamedTuple

from taid_vlm.errors import TaidError, nearest

KEEP, AUTO, AUTO_VERSION = "keep", "auto", 1


class Taken(NamedTuple):
    """An answer without its thoughts.

    cut: the text ends inside a thought, so that there is no answer.
    """

    answer: str
    thought: str
    cut: bool


@dataclass(frozen=True)
class ThoughtRule:
    """What opens and what closes a thought, as regular expressions; `version` is counted up
    whenever an answer comes out differently."""

    opens: str
    closes: str
    version: int = 1

    @property
    def pattern(self) -> re.Pattern[str]:
        return _compiled(self.opens, self.closes)

    def lacks_opening(self, text: str) -> bool:
        """Whether the first mark closes a thought of some words."""
        first = self.pattern.search(text)
        return first is not None and _closes(first) and bool(text[: first.start()].strip())

    def take(self, text: str, opened: bool) -> Taken | None:
        """The last piece of text outside all thoughts, and the thoughts; None without a mark.

        A mark that closes what nothing opened since the last one closes all text before it: the
        prompt, or the model, left the opening one out.
        """
        marks = _meant(text, list(self.pattern.finditer(text)))
        if not marks:
            return None
        inside, since = opened or _closes(marks[0]), 0
        outside: list[str] = []
        thoughts: list[str] = []
        for mark in marks:
            if _closes(mark) or not inside:
                (thoughts if _closes(mark) else outside).append(text[since: mark.start()])
                inside, since = not _closes(mark), mark.end()
        (thoughts if inside else outside).append(text[since:])
        answer = next((piece for piece in reversed(outside) if piece.strip()), "").strip()
        thought = "\n\n".join(piece.strip() for piece in thoughts if piece.strip())
        return Taken(answer, thought, inside and not answer)


def _closes(mark: re.Match[str]) -> bool:
    return mark["closes"] is not None


def _meant(text: str, marks: list[re.Match[str]]) -> list[re.Match[str]]:
    """Without quoted ones: opening marks within a line that nothing closes."""
    closed = max((mark.start() for mark in marks if _closes(mark)), default=-1)
    return [mark for mark in marks if mark.start() <= closed
            or text[max(0, mark.start() - 8): mark.start()].rstrip(" \t")[-1:] in ("", "\n")]


@cache
def _compiled(opens: str, closes: str) -> re.Pattern[str]:
    return re.compile(f"(?:{opens})|(?P<closes>{closes})", re.IGNORECASE)


def _tag(name: str) -> ThoughtRule:
    return ThoughtRule(f"<{name}>", f"</{name}>")


_CHANNEL = r"(?:<\|end\|>)?(?:<\|start\|>)?(?:assistant)?<\|channel\|>"
_HERE = r"Here(?:'s|’s| is) my"
RULES: Mapping[str, ThoughtRule] = {
    # DeepSeek-R1, Qwen3 and Qwen3-VL, QwQ, GLM-4.1V, MiMo-VL, InternVL 3.5, Ovis 2.5, Keye-VL,
    # MiniCPM-V 4.5, ERNIE 4.5, Kimi-K2, Granite 3.3, Hunyuan, MiniMax, Nemotron, Olmo 3, Step 3
    "think": _tag("think"),
    "thinking": _tag("thinking"),
    "thought": _tag("thought"),  # EXAONE Deep, Marco-o1
    "reasoning": _tag("reasoning"),  # LLaVA-CoT, Reka Flash 3
    "seed-oss": _tag("seed:think"),
    "kimi-vl": ThoughtRule("◁think▷", "◁/think▷"),
    "magistral": ThoughtRule(r"\[THINK\]", r"\[/THINK\]"),
    # also after a decoding that left special tokens out: "analysisWe ... assistantfinalB"
    "gpt-oss": ThoughtRule(
        rf"{_CHANNEL}(?:analysis|commentary)[^<]*<\|message\|>|\Aanalysis(?=(?-i:[A-Z\"']))",
        rf"{_CHANNEL}final(?:[^<]|<\|constrain\|>)*<\|message\|>|assistantfinal"),
    "gemma-4": ThoughtRule(r"<\|channel>(?:thought\b)?", r"<channel\|>"),
    "cohere": ThoughtRule(r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    "apertus": ThoughtRule(r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),
    "sky-t1": ThoughtRule(r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # OpenThinker
    "granite-3.2": ThoughtRule(rf"\A{_HERE} thought process:", rf"{_HERE} response:"),
    "huatuo-o1": ThoughtRule(r"\A##+ Thinking\s*\n", r"\n##+ Final Response\s*\n"),
}

# special tokens that have to stay in a decoded answer for these rules to see them
MARKS = frozenset({
    "<think>", "</think>", "<thinking>", "</thinking>", "<thought>", "</thought>", "<reasoning>",
    "</reasoning>", "<seed:think>", "</seed:think>", "◁think▷", "◁/think▷", "[THINK]", "[/THINK]",
    "<|channel|>", "<|message|>", "<|channel>", "<channel|>", "<|START_THINKING|>",
    "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|inner_prefix|>",
    "<|inner_suffix|>", "<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>",
    "<|end_of_solution|>", "<|begin_of_box|>", "<|end_of_box|>"})

_ENDS = re.compile(r"(?:\s*<\|(?:return|end)\|>)+\Z")
_WRAPPED = re.compile(  # what R1's followers, GLM-4.5V, Cohere and OpenThinker put an answer into
    r"<(?P<tag>answer|response|output|conclusion|final_answer)>(?P<a>.*?)(?:</(?P=tag)>|\Z)\s*"
    r"|<\|begin_of_(?P<kind>box|solution)\|>(?P<b>.*?)(?:<\|end_of_(?P=kind)\|>|\Z)\s*"
    r"|<\|START_RESPONSE\|>(?P<c>.*?)(?:<\|END_RESPONSE\|>|\Z)\s*", re.DOTALL | re.IGNORECASE)


def take_off_thoughts(text: str, rule: str = AUTO, opened: bool = False) -> Taken:
    """An answer without its thoughts: answer, thought, and whether it was cut inside a thought.

    "<think>It is red.</think>\\n\\nB" -> ("B", "It is red.", False)

    Args:
        text: as the model wrote it, with the marks of its thoughts.
        rule: "auto" (the first rule whose marks occur), one of RULES, or "keep" (nothing is
            taken off).
        opened: whether the prompt ends inside a thought, so that a text without any mark is all
            thought.

    Raises:
        TaidError: no such rule.
    """
    return taken_by(text, rule, opened)[1]


def taken_by(text: str, rule: str = AUTO, opened: bool = False) -> tuple[str, Taken]:
    """The same, and the name of the rule that took something off, "" where none did."""
    check_rule(rule)
    text = text.strip()
    if rule == KEEP:
        return "", Taken(text, "", False)
    for name in RULES if rule == AUTO else (rule,):
        taken = RULES[name].take(text, opened)
        if taken is not None:
            return name, taken._replace(answer=_unwrapped(taken.answer))
    return "", Taken("", text, True) if opened else Taken(_unwrapped(text), "", False)


def take_off_all(texts: Sequence[str], cut: Sequence[bool], rule: str = AUTO,
                 opened: Sequence[bool] = ()) -> list[tuple[str, Taken]]:
    """All answers of one model to one benchmark, each as by `taken_by`.

    Where some answer closes a thought that only the prompt can have opened, one that its limit
    ended before any mark is all thought.

    Args:
        cut: whether a limit of tokens ended an answer.
        opened: of every answer, whether its prompt is known to end inside a thought.
    """
    opened = opened or [False] * len(texts)
    taken = [taken_by(*each) for each in zip(texts, repeat(rule), opened, strict=False)]
    by_prompt = any(name and RULES[name].lacks_opening(text)
                    for text, (name, _) in zip(texts, taken, strict=True))
    return [taken_by(text, rule, True) if by_prompt and ended and not one[0] else one
            for text, ended, one in zip(texts, cut, taken, strict=True)]


def ends_inside(prompt: str) -> bool:
    """Whether a prompt ends with what opens a thought."""
    return any(mark.end() == len(prompt.rstrip()) and not _closes(mark)
               for rule in RULES.values() for mark in rule.pattern.finditer(prompt))


def check_rule(rule: str, place: str = "--thoughts") -> None:
    """Raise TaidError where there is no such rule."""
    if rule not in (KEEP, AUTO, *RULES):
        raise TaidError(f"{place} {rule}: there is no such rule."
                        f"{nearest(rule, (AUTO, KEEP, *RULES))}")


def rule_version(rule: str) -> int:
    """Of a rule, "auto" (which counts every change of any) and "keep"."""
    return RULES[rule].version if rule in RULES else AUTO_VERSION


def _unwrapped(answer: str) -> str:
    """What the whole answer is wrapped into is no part of it."""
    answer = _ENDS.sub("", answer)
    wrapped = _WRAPPED.fullmatch(answer)
    if wrapped is None:
        return answer
    return next(part for part in wrapped.group("a", "b", "c") if part is not None).strip()
