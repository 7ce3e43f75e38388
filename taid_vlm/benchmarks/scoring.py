"""Answers into figures: every question judged, several draws of an answer pooled."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from taid_vlm.benchmarks.answering import Answer
from taid_vlm.benchmarks.metrics.thoughts import AUTO, Taken, rule_version, take_off_all
from taid_vlm.benchmarks.question import Judged, JudgePrompt, Question, Rule, Verdict
from taid_vlm.benchmarks.store import answer_fields
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.statistics import Estimate, root_mean_square, seed_error
from taid_vlm.records.record import IMAGE_TAG
from taid_vlm.runs.machine import machine, peak_memory, versions

SERVER = "server"  # whose own parser has taken a thought off
SCHEMA, KIND = 1, "evaluation"  # of results.json
BySeed = Mapping[int, Sequence[Judged]]  # the same questions in the same order under every seed
Replies = Mapping[tuple[int, str], Answer]  # of a judge, by seed and question
UNCLEAR, REFUSED = "the judge's reply says no score", "the judge refused"
FEW = 10  # answers that may all be wrong by chance
LINEAR = 1e-9  # a figure of mean scores that is this near the mean of figures is linear in them


CUT, SILENT, EMPTY = ("answer cut inside its thought", "thought without an answer",
                      "answer cut before its first word")


def judge(rule: Rule, questions: Sequence[Question], answers: Sequence[Answer],
          replies: Replies | None = None, seed: int = 0, thoughts: str = AUTO) -> list[Judged]:
    """A verdict on every answer, its thought taken off by the rule `thoughts`; where there is none,
    it is wrong whatever the rule makes of "".

    Args:
        replies: a language model's, where the rule asks one and there is one.
    """
    taken = take_off_all([answer.text for answer in answers], [answer.cut for answer in answers],
                         thoughts, [answer.opened for answer in answers])
    verdicts = rule.judge(questions, [said.answer for _, said in taken])
    if rule.prompt is not None and replies is not None:
        verdicts = [_by_reply(rule.prompt, question, replies.get((seed, question.id)))
                    for question in questions]
    judged = []
    for question, answer, (name, said), verdict in zip(questions, answers, taken, verdicts,
                                                       strict=True):
        thought = "\n\n".join(filter(None, (answer.thought, said.thought)))
        missing = answer.problem or _missing(answer, said, thought)
        verdict = replace(verdict, score=0.0, read=None) if missing else verdict
        judged.append(Judged(question, said.answer, verdict, missing, thought,
                             name or (SERVER if answer.thought else "")))
    return judged


def _missing(answer: Answer, said: Taken, thought: str) -> str:
    """Why an answer is none though the model was asked; a server may keep to itself what it had
    thought when its limit ended it."""
    if said.answer:
        return ""
    if said.cut or thought:
        return CUT if said.cut or answer.cut else SILENT
    return EMPTY if answer.cut else ""


def thoughts_of(rule: str, answers: Mapping[int, Sequence[Answer]], by_seed: BySeed,
                count: Callable[[str], int] | None = None) -> dict[str, Any]:
    """What results.json says of the thoughts that were taken off.

    Args:
        count: the number of a text's tokens; without it those count that a server counted.

    Returns:
        rule and version; `answers`: how many had a thought, by the rule that read it; `cut`: how
        many ended inside it; `characters` and, where known, `tokens` of a thought, mean and max.
    """
    pairs = [(answer, j) for seed, judged in by_seed.items()
             for answer, j in zip(answers[seed], judged, strict=True)
             if j.thought or answer.thought_tokens]
    tokens = [answer.thought_tokens or (count(j.thought) if count else 0) for answer, j in pairs]
    return {"rule": rule, "version": rule_version(rule),
            "answers": dict(Counter(j.thought_rule or SERVER for _, j in pairs)),
            "cut": sum(j.missing == CUT for judged in by_seed.values() for j in judged),
            **_sizes("characters", [len(j.thought) for _, j in pairs]),
            **(_sizes("tokens", tokens) if all(tokens) else {})}


def _sizes(name: str, sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    return {name: {"mean": sum(sizes) / len(sizes), "max": max(sizes)}} if sizes else {}


def _by_reply(prompt: JudgePrompt, question: Question, reply: Answer | None) -> Verdict:
    """None: there was no answer to judge. A judge that fails leaves no score, not a 0."""
    if reply is None or reply.problem:
        return Verdict(0.0, None, REFUSED if reply else "")
    return prompt.read(question, reply.text) or Verdict(0.0, None, UNCLEAR)


def scored(by_seed: BySeed) -> BySeed:
    """The questions that have a score under every seed."""
    columns = list(zip(*by_seed.values(), strict=True))
    kept = [number for number, draws in enumerate(columns)
            if not any(draw.verdict.unscored for draw in draws)]
    if len(kept) == len(columns):
        return by_seed
    return {seed: [judged[number] for number in kept] for seed, judged in by_seed.items()}


def pooled(by_seed: BySeed) -> list[Judged]:
    """Every question with the mean of its scores; answer and reading are the first seed's."""
    columns = zip(*by_seed.values(), strict=True)
    return [Judged(draws[0].question, draws[0].answer, Verdict(
        math.fsum(draw.verdict.score for draw in draws) / len(draws), draws[0].verdict.read,
        next((draw.verdict.unscored for draw in draws if draw.verdict.unscored), "")))
        for draws in columns]


def figures(rule: Rule, by_seed: BySeed) -> dict[str, dict[str, Any]]:
    """A rule's figures: {name: {value, stderr, n, low, high}}, with several seeds also
    {seeds, spread}; low and high end the 95 % interval.

    A value is the mean over seeds. Its error is over questions, each with its mean score: more
    seeds make a question's score surer and never count as more questions. (Figures that are no
    mean of scores, such as F1, have the error of a single seed, which is larger.) `spread` is the
    standard deviation between seeds. Questions without a score are in none of it.
    """
    by_seed = scored(by_seed)
    drawn = [rule.figures(judged) for judged in by_seed.values()]
    if len(drawn) == 1:
        return {name: vars(figure) for name, figure in drawn[0].items()}
    means = rule.figures(pooled(by_seed))
    return {name: _over_seeds([each[name] for each in drawn], means[name]) for name in drawn[0]}


def _over_seeds(each: Sequence[Estimate], of_means: Estimate) -> dict[str, Any]:
    values = [figure.value for figure in each]
    value = math.fsum(values) / len(values)
    linear = math.isclose(value, of_means.value, rel_tol=LINEAR, abs_tol=LINEAR)
    stderr = of_means.stderr if linear else root_mean_square([figure.stderr for figure in each])
    sides = {side: getattr(of_means, side) if linear else value + math.copysign(
        root_mean_square([getattr(figure, side) - figure.value for figure in each]), sign)
        for side, sign in (("low", -1), ("high", 1))}
    return {"value": value, "stderr": stderr, "n": each[0].n, **sides, "seeds": values,
            "spread": seed_error([values]).spread}


def by_tag(rule: Rule, by_seed: BySeed) -> dict[str, dict[str, Any]]:
    """The same figures for the questions of every tag: {tag: {value: {figure: ...}}}."""
    by_seed = scored(by_seed)
    first = next(iter(by_seed.values()))
    places: dict[tuple[str, str], list[int]] = {}
    for index, judged in enumerate(first):
        for tag, value in judged.question.tags.items():
            places.setdefault((tag, value), []).append(index)
    tags: dict[str, dict[str, Any]] = {}
    for (tag, value), indices in sorted(places.items()):
        part = {seed: [judged[index] for index in indices] for seed, judged in by_seed.items()}
        tags.setdefault(tag, {})[value] = figures(rule, part)
    return tags


def counts(answers: Mapping[int, Sequence[Answer]], by_seed: BySeed) -> dict[str, Any]:
    """How many questions, and per seed how many answers could not be read, are missing or cut.

    Returns:
        `parse_failures` counts what a rule could not read, and `unanswered` (by reason) questions
        without an answer; both have score 0 and are in `n`. `unscored` (by reason) counts answers
        that the rule gives no score; they are in no figure.
    """
    pairs = [(answer, j) for seed, judged in by_seed.items()
             for answer, j in zip(answers[seed], judged, strict=True)]

    def per_seed(number: int) -> float | int:
        mean = number / len(by_seed)
        return int(mean) if mean == int(mean) else mean

    missing = Counter(j.missing for _, j in pairs if j.missing)
    unread = sum(j.verdict.read is None and not j.missing and not j.verdict.unscored
                 for _, j in pairs)
    unscored = Counter(j.verdict.unscored for _, j in pairs if j.verdict.unscored)
    return {"n": len(pairs) // len(by_seed), "parse_failures": per_seed(unread),
            "unanswered": {reason: per_seed(missing[reason]) for reason in sorted(missing)},
            "cut": per_seed(sum(answer.cut for answer, _ in pairs)),
            **({"unscored": {reason: per_seed(unscored[reason]) for reason in sorted(unscored)}}
               if unscored else {})}


def doubt(judged: Sequence[Judged]) -> str:
    """What makes figures doubtful, with the first question in words: of many answers none is right,
    or all are one text where different ones are right; "" where neither is so."""
    judged = [j for j in judged if not j.verdict.unscored]
    alike = len({j.answer for j in judged}) == 1 < len({j.question.answers for j in judged})
    wrong = not any(j.verdict.score for j in judged)
    if len(judged) < FEW or not (alike or wrong):
        return ""
    what = f"none of {len(judged)} answers is right" if wrong else \
        f"all {len(judged)} answers are the same"
    first = judged[0]
    return (f"{what}. The first: asked {_prompt(first.question)!r:.160}, answered "
            f"{first.answer!r:.80}, right is {' or '.join(first.question.answers)!r:.80}.")


def _prompt(question: Question) -> str:
    return "".join(IMAGE_TAG if part is None else part for part in question.prompt)


def summary(name: str, model: Mapping[str, Any], tasks: Mapping[str, Any], seed: int,
            started: float, processes: int = 1, **more: Any) -> dict[str, Any]:
    """What results.json says of an evaluation that began at `started` (of `perf_counter`)."""
    return {"schema": SCHEMA, "kind": KIND, "name": name, "model": model, "tasks": tasks, **more,
            "seed": seed, "versions": versions(), "machine": {**machine(), "processes": processes},
            "memory": peak_memory(), "seconds": time.perf_counter() - started}


class _Open(BaseModel):
    """What is read of results.json, strictly; there may be more."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Figure(_Open):
    value: float | None
    stderr: float | None
    n: int


class _Entry(_Open):
    title: str
    rule: str
    rule_version: Any
    n: int = Field(ge=0)
    parse_failures: float = 0
    figures: dict[str, _Figure] = Field(min_length=1)
    by_tag: dict[str, dict[str, dict[str, _Figure]]] | None = None
    answers: str
    decimals: int | None = None
    answering: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    seconds: float = 0


class _Model(_Open):
    name: str


class _Results(_Open):
    model: _Model
    tasks: dict[str, _Entry]
    versions: dict[str, str]


def check_results(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """An evaluation's results.json as it was read; raises TaidError where it is none."""
    try:
        _Results.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise TaidError(f"'{path}' is not an evaluation's results ("
                        f"{'.'.join(map(str, first['loc']))}: {first['msg']}).") from None
    return tree


def lines(
    questions: Sequence[Question], hashes: Mapping[str, str],
    answers: Mapping[int, Sequence[Answer]], by_seed: BySeed,
) -> list[dict[str, Any]]:
    """One line per question, in the order of the data: what was asked, said, read and scored."""
    rows = []
    for index, (question, mean) in enumerate(zip(questions, pooled(by_seed), strict=True)):
        draws = [_draw(seed, answers[seed][index], judged[index])
                 for seed, judged in by_seed.items()]
        line = {"id": question.id, "group": question.group, "asked": hashes[question.id],
                "prompt": _prompt(question), **draws[0], "score": _score(mean.verdict),
                "answers": list(question.answers), "tags": dict(question.tags)}
        line |= {"choices": list(question.choices)} if question.choices else {}
        rows.append(line | ({"repeats": draws} if len(draws) > 1 else {}))
    return rows


def _draw(seed: int, answer: Answer, judged: Judged) -> dict[str, Any]:
    """`raw`: the answer as the model wrote it, where something was taken off."""
    more = {"raw": answer.text} if answer.text != judged.answer else {}
    more |= {"missing": judged.missing} if judged.missing != answer.problem else {}
    verdict = judged.verdict
    return {"seed": seed, **answer_fields(answer), "answer": judged.answer, **more,
            "read": verdict.read, "score": _score(verdict),
            **({"unscored": verdict.unscored} if verdict.unscored else {})}


def _score(verdict: Verdict) -> float | None:
    return None if verdict.unscored else verdict.score
