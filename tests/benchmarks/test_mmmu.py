"""MMMU's parsers by hand and against noise, and rows in the hub's columns."""

from __future__ import annotations

import math
import random
import time

import pytest
from benchmarks.short_answers import BROKEN

from taid_vlm.benchmarks.metrics.mmmu import (
    LMMS,
    OFFICIAL,
    PARSED,
    is_open_right,
    normalised,
    read_choice,
    read_open,
)
from taid_vlm.benchmarks.question import Question, Verdict
from taid_vlm.benchmarks.rows import Row
from taid_vlm.benchmarks.tasks.mmmu import BENCHMARK, DISCIPLINE_OF
from taid_vlm.errors import RecordError

PETS = ("cat", "dog", "a big cat", "vitamin C")


def asked(**columns) -> Question:
    row = {"id": "validation_Art_Theory_12", "question": "What is <image 1>?",
           "options": "['cat', 'dog']", "answer": "B", "question_type": "multiple-choice",
           "image_1": b"one", **columns}
    one, = BENCHMARK.read(Row(row, "validation.parquet[0]"))
    return one


def opened(answer: str) -> Question:
    return asked(options="[]", question_type="open", answer=answer)


@pytest.mark.parametrize(("answer", "official", "lmms"), [
    ("B", "B", "B"), ("(B)", "B", "B"), ("B.", "B", "B"), ("'B'", "B", "B"),
    ("(A) or (B)", "B", "B"),
    ("(B) or (A)", "A", "A"), ("It is A or B", "B", "B"), ("A (B)", "B", "B"),
    ("Answer:B now", None, "B"), ("I say B. Then", None, "B"), ("AB", None, "B"),
    ("dog", None, None), ("I am sure it is a dog", "B", "B"),
    ("cat or dog? it must be dog", "B", "B"),
    ("surely it is a big cat, my friend", "A", "A"), ("E", None, None), ("b", None, None),
    ("", None, None), ("none of these at all, I would say", None, None),
])
def test_choices(answer, official, lmms):
    assert read_choice(answer, PETS) == official
    assert read_choice(answer, PETS, lmms=True) == lmms


def test_an_option_without_text_is_never_found_in_an_answer():
    assert read_choice("there is nothing here that I know", ("", " ")) is None


@pytest.mark.parametrize(("text", "found"), [
    ("1,234.567", [1234.57]), (" 5 ", [5.0]), ("A", [" a", "a "]), ("Paris", ["paris"]),
    ("", [""]), ("2e-3", [0.0]), ("1_0", [10.0]),
])
def test_normalised(text, found):
    assert normalised(text) == found


@pytest.mark.parametrize(("answer", "readings"), [
    ("12", {12.0}), ("The answer is 12.", {12.0}), ("x = 3.5", {3.5}),
    ("It is Paris", {"paris"}), ("so it is 1,250 units", {"1,250 units", 1250.0, 250.0}),
    ("12 or 15", {"12 or 15", 12.0, 15.0}), ("It is red\nso 4", {"red", 4.0}),
    ("about 2e3 and -7", {"about 2e3 and -7", 2000.0, 3.0, -7.0}), ("", {""}),
    ("it is :", {"it is :"}),
])
def test_open_readings(answer, readings):
    assert read_open(answer) == readings


@pytest.mark.parametrize(("answer", "golds", "right"), [
    ("The answer is 12", ("12",), True), ("It is 12.004 m", ("12",), True), ("13", ("12",), False),
    ("the city of Paris", ("Paris",), True), ("24/7", ("24/7", "3.429"), True),
    ("3.43", ("24/7", "3.429"), True), ("cabbage", ("A",), False), ("so a", ("a",), True),
    ("plan a it is, of course: plan a now", ("a",), True), ("", ("12",), False),
])
def test_open_verdicts(answer, golds, right):
    assert is_open_right(read_open(answer), golds) is right


class TestVerdicts:
    def test_what_cannot_be_read_is_wrong_and_counted_instead_of_guessed(self):
        questions = [asked() for _ in range(50)]
        assert PARSED.judge(questions, ["hm"] * 50) == [Verdict(0, None)] * 50

    def test_the_official_rule_guesses_as_eval_utils_does(self):
        """random.seed(42) once, then a choice for every answer that cannot be read, in order."""
        questions = [asked(id=f"validation_Art_{n}", options="['a', 'b', 'c']",
                           answer="ABC"[n % 3]) for n in range(50)]
        answers = ["(B)" if n % 5 == 0 else "hm" for n in range(50)]
        theirs = random.Random(42)
        guesses = ["B" if n % 5 == 0 else theirs.choice(["A", "B", "C"]) for n in range(50)]
        found = OFFICIAL.judge(questions, answers)
        assert [v.score for v in found] == [float(g == "ABC"[n % 3]) for n, g in enumerate(guesses)]
        assert [v.read for v in found] == ["B" if n % 5 == 0 else None for n in range(50)]
        assert OFFICIAL.judge(questions, answers) == found
        assert OFFICIAL.judge(questions[::-1], answers[::-1]) == found[::-1]  # in any file
        assert (OFFICIAL.guesses, LMMS.guesses, PARSED.guesses) == (True, True, False)
        assert BENCHMARK.rules[0] is PARSED  # nothing is guessed unless it is asked for

    def test_an_open_question_is_never_guessed(self):
        assert OFFICIAL.judge([opened("7")] * 20, [" "] * 20) == [Verdict(0, None)] * 20

    def test_choices_and_open_questions(self):
        assert OFFICIAL.judge([asked(), opened("7")], ["(B)", " it is 7 "]) == [
            Verdict(1, "B"), Verdict(1, "it is 7")]
        assert OFFICIAL.judge([opened("7")], [" "]) == [Verdict(0, None)]

    @pytest.mark.parametrize("name", BROKEN)
    @pytest.mark.parametrize("rule", [PARSED, OFFICIAL, LMMS], ids=lambda rule: rule.name)
    def test_broken_answers(self, name, rule):
        start = time.process_time()
        for question in (asked(options="['x1', 'x2', 'x3']"), opened("x7"), opened("77")):
            verdict, = rule.judge([question], [BROKEN[name]])
            guessed = verdict.read is None and rule.guesses
            assert verdict.score == 0 or guessed or (
                name, question.choices != ()) == ("all letters", True)
        assert time.process_time() - start < 2

    @pytest.mark.parametrize("answer", ["9" * 200_000 + ",", "1e" * 100_000, "1." * 100_000,
                                        "1,234" * 40_000, "is " * 70_000, "=\n" * 100_000,
                                        "-" * 200_000, "." + "1" * 200_000 + ","])
    def test_hostile_answers_take_no_time(self, answer):
        start = time.process_time()
        assert math.isfinite(OFFICIAL.judge([opened("x7")], [answer])[0].score)
        assert time.process_time() - start < 2


class TestRows:
    def test_prompt_of_choices(self):
        found = asked()
        assert found.prompt == (
            "What is ", None, "?\n(A) cat\n(B) dog\n\n"
            "Answer with the option's letter from the given choices directly.")
        assert (found.choices, found.answers) == (("cat", "dog"), ("B",))

    def test_prompt_of_an_open_question(self):
        assert opened("7").prompt == (
            "What is ", None, "?\nAnswer the question using a single word or phrase.")

    def test_images_stand_where_question_and_options_name_them(self):
        found = asked(question="Like <image 2>?", options="['<image 1>', '<image 3>']",
                      image_2=b"two", image_3=b"three", image_4=b"four")
        assert [image.value for image in found.images] == [b"four", b"two", b"one", b"three"]
        assert found.prompt[:5] == (None, "Like ", None, "?\n(A) ", None)
        assert found.prompt.count(None) == 4

    def test_a_picture_that_is_missing(self):
        with pytest.raises(RecordError, match="'image_2' is missing"):
            asked(question="<image 2>")

    @pytest.mark.parametrize(("answer", "golds"), [
        ("['24/7', '3.429']", ("24/7", "3.429")), ("(3, 4)", ("(3, 4)",)), ("7", ("7",)),
        (7, ("7",)),
    ])
    def test_open_golds(self, answer, golds):
        assert opened(answer).answers == golds

    def test_tags(self):
        found = asked(subfield="Art Theory", topic_difficulty="Hard")
        assert found.tags == {
            "discipline": "Art and Design", "subject": "Art_Theory", "subfield": "Art Theory",
            "topic_difficulty": "Hard", "question_type": "multiple-choice"}
        assert len(DISCIPLINE_OF) == 30

    def test_an_answer_that_is_no_option(self):
        with pytest.raises(RecordError, match="answer = 'C' is none of the 2 options"):
            asked(answer="C")
