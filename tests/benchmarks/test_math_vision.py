"""MATH-Vision's rule against published verdicts on 6,080 real answers, and values by hand."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.short_answers import BROKEN

from taid_vlm.benchmarks.metrics.latex import DEEPEST, LONGEST, value_of
from taid_vlm.benchmarks.metrics.math_vision import OFFICIAL, read_answer, same_answer
from taid_vlm.benchmarks.question import Judged, Question, Verdict
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.rows import Row
from taid_vlm.benchmarks.tasks.math_vision import BENCHMARK, TASK
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError

DATA = Path(__file__).parent / "data" / "math_vision.json.gz"
EXTRA = Path(os.environ.get("TAID_VLM_EXTRA_DATA", "/nonexistent")) / "conformance" / "mathvision"
MODELS = {"LLaVA-v1.5-7B": 259, "LLaVA-v1.5-13B": 338}


@pytest.fixture(scope="module")
def published():
    return json.loads(gzip.decompress(DATA.read_bytes()))


def asked(**columns) -> Question:
    row = {"id": "1", "question": "How long?", "options": [], "answer": "4", "level": 2,
           "subject": "arithmetic", "image": b"picture", **columns}
    one, = BENCHMARK.read(Row(row, "test.jsonl:1"))
    return one


def verdict(said: str, **columns) -> Verdict:
    return OFFICIAL.judge([asked(**columns)], [said])[0]


def judged(published, model: str) -> list[Judged]:
    lines = published["questions"]
    columns = ("id", "answer", "options", "level", "subject")
    questions = [asked(**{name: line[name] for name in columns}) for line in lines]
    answers = [line[model][0] for line in lines]
    return [Judged(*each) for each in
            zip(questions, answers, OFFICIAL.judge(questions, answers), strict=True)]


class TestPublished:
    @pytest.mark.parametrize("model", MODELS)
    def test_every_extraction(self, published, model):
        lines = [line[model] for line in published["questions"]]
        assert len(lines) == 3040
        assert [line for line in lines if read_answer(line[0]) != line[1]] == []

    @pytest.mark.parametrize("model", MODELS)
    def test_every_verdict(self, published, model):
        found = [bool(j.verdict.score) for j in judged(published, model)]
        assert found == [line[model][2] for line in published["questions"]]
        assert sum(found) == MODELS[model]

    @pytest.mark.parametrize("model", MODELS)
    def test_every_total(self, published, model):
        """All of them: overall, by level, by subject, and by both, in both orders."""
        right, total = Counter(), Counter()
        for j in judged(published, model):
            level, subject = j.question.tags["level"], j.question.tags["subject"]
            for name in ("-all", f"-level{level}", subject, f"{subject}_level{level}",
                         f"-level{level}_{subject}"):
                right[name] += int(j.verdict.score)
                total[name] += 1
        shown = {name: f"{right[name]}/{n}={round(right[name] / n * 100, 2)}%"
                 for name, n in total.items()}
        assert shown == published["published"][model]

    @pytest.mark.skipif(not EXTRA.exists(), reason="TAID_VLM_EXTRA_DATA lacks it")
    def test_the_whole_files(self):
        questions = read_questions(BENCHMARK, DataSource(str(EXTRA / "test.jsonl")))
        for model, right in MODELS.items():
            lines = [json.loads(x) for x in (EXTRA / f"{model}.jsonl").read_text().splitlines()]
            verdicts = OFFICIAL.judge(questions, [line["response"] for line in lines])
            assert [bool(v.score) for v in verdicts] == [line["correct"] for line in lines]
            assert sum(v.score for v in verdicts) == right


@pytest.mark.parametrize(("text", "value"), [
    ("60", 60), ("-2", -2), (".5", 0.5), ("1,250", 1250), ("1:2", 0.5), ("7/3", 7 / 3),
    ("2\\pi", 2 * math.pi), ("$\\frac{1}{2}+\\frac{\\sqrt{3}}{3}$", 0.5 + 3**0.5 / 3),
    ("6+4\\sqrt{3}", 6 + 4 * 3**0.5), ("2(\\sqrt{2}-1)", 2 * (2**0.5 - 1)), ("45^2", 2025),
    ("$\\frac{7^3}{2^{12} 13^2}$", 343 / (4096 * 169)), ("\\sqrt[3]{27}", 3), ("2^3^2", 512),
    ("2^{-1}", 0.5), ("-2^2", -4), ("--3", 3), ("3\\cdot4\\div2", 6), ("\\dfrac{3}{4}", 0.75),
    ("\\left(1+2\\right)\\times 3", 9), ("8/4/2", 1), ("7-2-1", 4), ("(\\frac{1}{2})^2", 0.25),
    ("$\\frac{3^{1008}-1}{3^{1009}}$", 1 / 3), ("\\displaystyle \\frac{3}{4}", 0.75),
    # what comes after a full stop, or after a bracket that closes nothing, is not read
    ("5.so the sum is 7", 5), ("\\frac{3}{4}}.theansweris:9", 0.75), ("3.25.", 3.25),
    # no values
    ("", None), ("x", None), ("2x", None), ("a", None), ("69{degrees}", None), ("5cm", None),
    ("120^{\\circ}", None), ("120°", None), ("\\frac12", None), ("\\boxed{4}", None),
    ("1/0", None), ("\\sqrt{-1}", None), ("(-8)^{0.5}", None), ("3+", None), ("*3", None),
    ("(3", None), ("()", None), ("4 5", None), ("9^9^9^9", None), ("10^{400}", None),
    ("0^{-1}", None), ("1,2", None), ("٣", None), ("²", None), ("nan", None), ("inf", None),
    ("(" * 100 + "1" + ")" * 100, None), ("-" * 199 + "1", -1), ("1" * 300, None),
])
def test_values(text, value):
    assert value_of(text) == (value if value is None else pytest.approx(value, rel=1e-12))


def expression(rng: random.Random, depth: int) -> tuple[str, str]:
    """A random expression in LaTeX and in Python."""
    if not depth:
        number = rng.choice(("1", "2.5", "7", "12"))
        return number, number
    (a, x), (b, y) = expression(rng, depth - 1), expression(rng, depth - 1)
    return rng.choice((
        (f"{a}+{b}", f"({x}+{y})"), (f"({a})-({b})", f"({x}-{y})"),
        (f"\\left({a}\\right) \\cdot ({b})", f"({x}*{y})"), (f"({a})({b})", f"({x}*{y})"),
        (f"\\frac{{{a}}}{{{b}}}", f"({x}/{y})"), (f"({a}) / {{{b}}}", f"({x}/{y})"),
        (f"\\sqrt{{({a})^2}}", f"(({x})**2)**0.5"), (f"\\pi({a})", f"(math.pi*{x})")))


def test_values_against_python():
    rng, compared = random.Random(0), 0
    for _ in range(2000):
        latex, python = expression(rng, rng.randint(0, 3))
        try:
            wanted = eval(python)
        except ZeroDivisionError:
            wanted = None
        if len(latex) <= LONGEST and latex.count("(") + latex.count("{") <= DEEPEST:
            compared += 1
            assert value_of(latex) == (wanted and pytest.approx(wanted, rel=1e-9, abs=1e-9))
    assert compared > 1500


def test_noise_has_a_value_or_none():
    rng = random.Random(1)
    parts = ("1", "2.5", ".", "+", "-", "*", "/", "^", "(", ")", "{", "}", "[", "]", "\\frac",
             "\\sqrt", "\\pi", "9" * 60, "x", " ", "$", "\\", ":", ",", "0")
    for _ in range(20_000):
        found = value_of("".join(rng.choices(parts, k=rng.randint(1, 12))))
        assert found is None or math.isfinite(found)


@pytest.mark.parametrize(("response", "wanted"), [
    ("80", "80"), ("A", "a"), ("(B)", "b"), ("The final answer is (C).", "c"),
    ("So I choose D.", "d"), ("B\nbecause it is longest", "b"), ("The length is 12.", "12"),
    ("the answer is 5 cm. It is long", "5cm"), ("I think the answer is 3\nor 4", "3"),
    ("First \\boxed{3}, then \\boxed{\\dfrac{1}{2}}.", "\\frac{1}{2}"), ("\\boxed{E}", "e"),
    ("x = 3/4", "\\frac{3}{4}"), ("a=b=7", "7"), ("about \\approx 7.5", "7.5"),
    ("\\sqrt3", "\\sqrt{3}"), ("\\frac1{\\sqrt2}", "\\frac{1}{\\sqrt{2}}"), (".5", "\\frac{1}{2}"),
    ("60^\\circ", "60"), ("\\boxed{36\\text{ km}}", "36"), ("", ""), ("07/3", "07/3"),
])
def test_reading(response, wanted):
    assert read_answer(response) == wanted


@pytest.mark.parametrize(("answer", "gold", "same"), [
    ("0.33", "\\frac{1}{3}", True), ("0.34", "\\frac{1}{3}", False), ("(3,-4)", "(3, -4)", True),
    ("[3.001,2]", "[3,2]", True), ("(3,-4)", "[3,4]", False), ("(3,4)", "3", False),
    ("", "", False), (" ", "1", False), ("E", "e", True), ("(a,b)", "(a,c)", False),
])
def test_same_answer(answer, gold, same):
    assert same_answer(answer, gold) is same
    assert same_answer(gold, answer) is same


class TestVerdicts:
    LENGTHS = ("$2 \\sqrt{3}$", "2", "5", "6", "$4 \\sqrt{3}$")

    @pytest.mark.parametrize(("answer", "score", "read"), [
        ("A", 1, "a"), ("(A)", 1, "a"), ("\\boxed{2\\sqrt3}", 1, "2\\sqrt{3}"), ("3.46", 1, "3.46"),
        ("B", 0, "b"), ("5", 0, "5"), ("7", 0, None), ("F", 0, None), ("", 0, None),
        ("A B C D E", 0, None), ("I do not know", 0, None),
    ])
    def test_options(self, answer, score, read):
        assert verdict(answer, options=self.LENGTHS, answer="A") == Verdict(score, read)

    def test_an_open_answer_that_is_a_letter(self):
        assert verdict("C", answer="C") == Verdict(1, "c")
        assert verdict("it rambles on " * 50, answer="C") == Verdict(0, None)

    @pytest.mark.parametrize("name", BROKEN)
    @pytest.mark.parametrize("options", [[], LENGTHS])
    def test_broken_answers(self, name, options):
        start = time.process_time()
        found = verdict(BROKEN[name], options=options, answer="A" if options else "4")
        assert time.process_time() - start < 1
        assert found.score == 0

    @pytest.mark.parametrize("answer", [
        "\\boxed{" * 30_000, "{" * 200_000, "\\frac" * 40_000, "\\sqrt" * 40_000, "=" * 200_000,
        "the answer is " * 15_000, "is " * 70_000, "\\\\" * 100_000, "1^" * 100_000,
        "((((" * 50_000, "\\boxed{" + "9^9" * 60_000 + "}", "BOXED{" * 30_000])
    def test_hostile_answers_take_no_time(self, answer):
        start = time.process_time()
        assert verdict(answer).score == 0
        assert verdict(answer, options=self.LENGTHS, answer="A").score == 0
        assert time.process_time() - start < 2


class TestRows:
    def test_prompt(self):
        options = ["1", "2", "3", "4", "5"]
        assert asked(options=options, answer="D").prompt == (
            None, f"{TASK}How long?\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n(E) 5\n")
        assert asked().prompt == (None, f"{TASK}How long?\n")

    def test_letters_that_stand_in_the_picture_are_not_repeated(self):
        found = asked(options=list("ABCDE"), answer="D")
        assert found.prompt == (None, f"{TASK}How long?\n")
        assert (found.choices, found.answers) == (tuple("ABCDE"), ("D",))

    def test_the_hub_s_decoded_image(self):
        assert asked(image="images/1.jpg", decoded_image=b"bytes").images[0].value == b"bytes"

    def test_an_answer_that_is_no_option(self):
        with pytest.raises(RecordError, match=r"test.jsonl:1: answer = 'F' is none of the 5"):
            asked(options=list("ABCDE"), answer="F")

    def test_tags(self):
        assert asked().tags == {"level": "2", "subject": "arithmetic"}
