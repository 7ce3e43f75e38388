"""MathVista: prompts, extraction and normalisation by hand; Bard's published verdicts."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.short_answers import BROKEN

from taid_vlm.benchmarks.metrics.math_vista import (
    JUDGE_FREE,
    OFFICIAL,
    Wanted,
    extracted_as_official,
    extracted_by_rule,
    normalised,
)
from taid_vlm.benchmarks.question import Question, Verdict
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.rows import Row
from taid_vlm.benchmarks.tasks.math_vista import BENCHMARK, SPLIT_BY
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError

EXTRA = Path(os.environ.get("TAID_VLM_EXTRA_DATA", "/nonexistent")) / "conformance" / "mathvista"
published = pytest.mark.skipif(not EXTRA.exists(), reason="TAID_VLM_EXTRA_DATA lacks mathvista")

PETS = Wanted("text", ("cat", "dog", "a bird"))
WHOLE, TENTHS = Wanted("integer"), Wanted("float", precision=1)
LIST = Wanted("list")


def asked(**columns) -> Question:
    row = {"pid": "7", "question": "How many?", "image": b"picture", "answer": "4",
           "question_type": "free_form", "answer_type": "integer",
           "metadata": {"task": "figure question answering", "skills": ["statistical reasoning"]},
           **columns}
    one, = BENCHMARK.read(Row(row, "testmini.json[7]"))
    return one


def pets(**columns) -> Question:
    return asked(**{"choices": list(PETS.choices), "question_type": "multi_choice",
                    "answer_type": "text", "answer": "dog", **columns})


@published
class TestBard:
    @pytest.fixture(scope="class")
    def records(self):
        return json.loads((EXTRA / "output_bard.json").read_text())

    @pytest.fixture(scope="class")
    def judged(self, records):
        questions = read_questions(BENCHMARK, DataSource(str(EXTRA / "output_bard.json")))
        verdicts = OFFICIAL.judge(questions, [line["response"] for line in records.values()])
        return list(zip(questions, verdicts, strict=True))

    def test_every_verdict(self, records, judged):
        assert [bool(v.score) for _, v in judged] == [r["true_false"] for r in records.values()]
        assert sum(v.score for _, v in judged) == 348

    def test_every_total(self, judged):
        scores = json.loads((EXTRA / "scores_bard.json").read_text())
        right, total = Counter(), Counter()
        for question, verdict in judged:
            for tag, value in question.tags.items():
                tag, value = ("skills", tag[7:]) if tag.startswith("skill: ") else (tag, value)
                right[tag, value] += int(verdict.score)
                total[tag, value] += 1
        wanted = {(tag, value): (found["correct"], found["total"])
                  for tag, values in scores.items() if tag != "average"
                  for value, found in values.items()}
        assert {key: (right[key], n) for key, n in total.items()} == wanted
        assert {tag for tag, _ in wanted} == {"question_type", "answer_type", "skills", *SPLIT_BY}

    def test_prompts_are_the_queries_that_were_asked(self, records, judged):
        """But for ten questions, whose options were shuffled anew after Bard had answered."""
        def lines(text):
            return [line.rstrip() for line in text.split("\n")]
        other = {question.id for question, _ in judged
                 if lines(question.prompt[1]) != lines(records[question.id]["query"])}
        assert other == {"99", "168", "229", "272", "287", "291", "513", "670", "688", "849"}

    def test_without_a_judge(self, records, judged):
        """How far the rule on raw responses is from the published extraction by GPT-4."""
        questions = [question for question, _ in judged]
        found = JUDGE_FREE.judge(questions, [line["response"] for line in records.values()])
        moved = Counter((bool(official.score), bool(free.score))
                        for (_, official), free in zip(judged, found, strict=True))
        assert moved[True, True] + moved[False, False] >= 975
        assert moved[False, True] <= 3


@pytest.mark.parametrize(("extraction", "wanted", "found"), [
    ("B", PETS, "dog"), ("(b) whatever", PETS, "dog"), (" dog ", PETS, "dog"), ("b", PETS, "cat"),
    ("dogs", PETS, "dog"), ("E", PETS, "cat"), ("bird", PETS, "a bird"), ("", PETS, "cat"),
    ("3", WHOLE, "3"), ("3.9", WHOLE, "3"), ("-3", WHOLE, "-3"), ("1e3", WHOLE, "1000"),
    ("3 apples", WHOLE, None), ("inf", WHOLE, None), ("nan", WHOLE, None), ("", WHOLE, None),
    ("3", TENTHS, "3.0"), ("1.25", TENTHS, "1.2"), ("1.35", TENTHS, "1.4"), ("x", TENTHS, None),
    ("0.126", Wanted("float", precision=2), "0.13"), ("[1, 2]", LIST, "[1, 2]"),
])
def test_normalised(extraction, wanted, found):
    assert normalised(extraction, wanted) == found


@pytest.mark.parametrize(("answer", "wanted", "found"), [
    ("dog", PETS, "dog"), ("B", PETS, None), ("12", WHOLE, "12"), ("12.0", WHOLE, None),
    ("12.0", TENTHS, "12.0"), ('The answer is "B".', PETS, "B"), ("It is 12", WHOLE, None),
    ('The answer is "4".\nThe answer is "5".', WHOLE, "4"), ("", WHOLE, None),
])
def test_extracted_as_official(answer, wanted, found):
    assert extracted_as_official(answer, wanted) == found


@pytest.mark.parametrize(("answer", "wanted", "found"), [
    ("The answer is (B).", PETS, "B"), ("Sorry, I can't help with images of people yet.", PETS,
                                        None),
    ("So it is \\boxed{dog}, as the cat is asleep", PETS, "B"), ("", PETS, None),
    ("It is **a bird**: no cat, no dog", PETS, "C"),
    ("2/3 or \\boxed{\\frac{1}{3}}", Wanted("text", ("2/3", "\\frac{1}{3}")), "B"),
    ("There are 12 men and 3 women. The answer is 15. I hope this helps 100%!", WHOLE, "15"),
    ("answer: -1,250 g", WHOLE, "-1250"), ("We get **15** after step 3.", WHOLE, "15"),
    ("\\boxed{7} or 8", WHOLE, "7"), ("first 3, then 4", WHOLE, "4"), ("5-3", WHOLE, "3"),
    ("about .5 m", TENTHS, ".5"), ("−2.5", TENTHS, "-2.5"), ("none", WHOLE, None),
    ("between [2014, 2016] I think", LIST, "[2014, 2016]"), ("2014 and 2016", LIST, None),
])
def test_extracted_by_rule(answer, wanted, found):
    assert extracted_by_rule(answer, wanted) == found


class TestVerdicts:
    def test_a_judge_s_extraction_comes_first(self):
        given = asked(extraction="4")
        assert OFFICIAL.judge([given], ["so many words"]) == [Verdict(1, "4")]
        assert OFFICIAL.judge([asked()], ["so many words, 4"]) == [Verdict(0, None)]
        assert JUDGE_FREE.judge([given], ["so many words, 5"]) == [Verdict(0, "5")]

    def test_a_refusal_is_an_option_for_the_official_rule_alone(self):
        refusal = "I can't process this file."
        read = OFFICIAL.judge([pets(extraction=refusal)], [refusal])[0].read
        assert read in PETS.choices
        assert JUDGE_FREE.judge([pets()], [refusal]) == [Verdict(0, None)]

    @pytest.mark.parametrize("name", BROKEN)
    @pytest.mark.parametrize("rule", [JUDGE_FREE, OFFICIAL], ids=lambda rule: rule.name)
    def test_broken_answers(self, name, rule):
        start = time.process_time()
        for question in (asked(), pets(answer="a bird"), asked(answer_type="float", precision=2),
                         asked(answer_type="list", answer="[1, 2]")):
            verdict, = rule.judge([question], [BROKEN[name]])
            assert verdict.score == 0
        assert time.process_time() - start < 5

    def test_a_long_extraction(self):
        start = time.process_time()
        assert OFFICIAL.judge([pets(extraction="dog " * 50_000)], [""])[0].read in PETS.choices
        assert time.process_time() - start < 2


class TestRows:
    def test_prompts(self):
        assert asked(unit="years").prompt == (
            None, "Hint: Please answer the question requiring an integer answer and provide the "
                  "final value, e.g., 1, 2, 3, at the end.\nQuestion: How many? (Unit: years)")
        assert pets().prompt[1].endswith("Question: How many?\nChoices:\n(A) cat\n(B) dog\n"
                                         "(C) a bird")
        assert "two decimal places" in asked(answer_type="float", precision=2.0).prompt[1]

    def test_answers_are_letters_where_there_are_choices(self):
        assert (pets().answers, asked().answers) == (("B",), ("4",))

    def test_tags(self):
        assert asked().tags == {
            "question_type": "free_form", "answer_type": "integer",
            "task": "figure question answering", "skill: statistical reasoning": "yes"}

    @pytest.mark.parametrize(("columns", "message"), [
        ({"choices": ["a", "b"], "answer_type": "text"}, "answer '4' is none of the choices"),
        ({"answer_type": "float", "precision": 3}, "answer_type 'float3' is not known"),
        ({"metadata": "{}"}, "metadata must hold source, category"),
    ])
    def test_bad_rows(self, columns, message):
        with pytest.raises(RecordError, match=message):
            asked(**columns)
