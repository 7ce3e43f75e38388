"""Numbers as models write them, final answers after a chain of thought, types of own benchmarks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from benchmarks.short_answers import BROKEN, survives, verdict

from taid_vlm.benchmarks.metrics.final import PATTERNS, final_texts
from taid_vlm.benchmarks.metrics.numbers import (
    LAST_NUMBER,
    anls_rule,
    number_rule,
    quantities,
    read_quantity,
    relaxed_rule,
    text_rule,
)
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.registry import find_benchmark
from taid_vlm.config.benchmark import Place
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecipeError, RecordError

READ = [
    ("10", 10, ""), ("$10", 10, "$"), ("-$3", -3, "$"), ("$-3", -3, "$"),
    ("US$ 1,234.5", 1234.5, "$"),
    ("10 dollars", 10, "$"), ("10€", 10, "€"), ("10 %", 10, "%"), ("10 percent", 10, "%"),
    ("1,000", 1000, ""), ("1 000", 1000, ""), ("1\u202f000,000", 1000000, ""),
    ("1.000.000", 1000000, ""), ("1,000,000.50", 1000000.5, ""), (".5", 0.5, ""), ("14.", 14, ""),
    ("−7", -7, ""), ("1.5e3", 1500, ""), ("1.5 × 10^3", 1500, ""), ("3/4", 0.75, ""),
    ("1 1/2", 1.5, ""), ("1½", 1.5, ""), ("½", 0.5, ""), ("2.5 million", 2500000, ""),
    ("$5k", 5000, "$"), ("ten", 10, ""), (r"\frac{3}{4}", 0.75, ""), (r"\$10", 10, "$"),
    ("$10$", 10, ""), (r"10\%", 10, "%"), (r"10 \text{ cm}", 10, "cm"), ("5 kg.", 5, "kg"),
    ("12 °C", 12, "°c"), ("It costs 10 dollars.", 10, "$"), ("14 apples", 14, ""), ("x=14", 14, ""),
    (r"2\sqrt{4}", 4, ""),
]


@pytest.mark.parametrize(("text", "value", "unit"), READ)
def test_a_number_as_it_is_written(text: str, value: float, unit: str) -> None:
    found = read_quantity(text)
    assert found is not None
    assert math.isclose(found.value, value)
    assert found.unit in (unit, "$" if text == "$10$" else unit)


@pytest.mark.parametrize("text", ["", "abc", "10 or 12", "5-3", "3:45", "2024-05-01", "1/0", "°",
                                  "9" * 400, "1e999", "NaN", "T-shirt"])
def test_what_is_no_single_number(text: str) -> None:
    assert read_quantity(text) is None


def test_all_numbers_of_a_text() -> None:
    found = quantities("1,250 dollars in 2 days, not 3.5% of x2")
    assert [(q.value, q.unit) for q in found] == [(1250, "$"), (2, "day"), (3.5, "%")]


@pytest.mark.parametrize(("answer", "gold", "right"), [
    ("$10", "10", True), ("10", "$10", True), ("10 %", "10", True), ("10", "10%", True),
    ("0.1", "10%", True), ("10%", "0.1", True), ("1%", "100", False), ("1,000", "1000", True),
    ("10 dollars", "$10", True), ("10 euros", "$10", False), ("10 cm", "10 m", False),
    ("10 apples", "10 pears", True), ("10.0", "10", True), ("10.01", "10", False),
    ("3/4 cup", "0.75", True), ("eleven", "11", True), ("-5", "5", False), ("0", "0", True),
    ("0.001", "0", False),
])
def test_numbers_are_the_same_units_and_currencies_aside(
    answer: str, gold: str, right: bool
) -> None:
    assert verdict(number_rule(), answer, gold).score == right
    assert verdict(number_rule(), answer, "999999", gold).score == right


THOUGHTS = "First 3 + 4 = 7, so there are 7. Then we take 2 * 7.\n"
ENDS = ["The answer is 14.", "So the answer is **14**.", "Answer: 14", "**Answer:** $14",
        "**Final answer: 14 apples**", "Answer =14", "#### 14", "\\boxed{14}", "= 14",
        "The answer is $\\boxed{14}$.", "The final answer is\n\n14", "That makes $14.",
        "The correct answer would be about 14", "The answer is 14 because 2 * 7"]


@pytest.mark.parametrize("end", ENDS)
def test_the_final_answer_after_a_chain_of_thought(end: str) -> None:
    found = verdict(number_rule(), THOUGHTS + end, "14")
    assert found.score == 1
    assert found.read is not None and len(found.read) < 40
    assert verdict(number_rule(), THOUGHTS + end, "7").score == 0


@pytest.mark.parametrize("end", [
    "The answer is Rio.", "Answer: \"Rio\"", "\\boxed{\\text{Rio}}", "#### Rio",
    "Final answer: rio"])
def test_texts_after_a_chain_of_thought(end: str) -> None:
    assert verdict(relaxed_rule(), THOUGHTS + end, "Rio").score == 1
    assert verdict(anls_rule(), THOUGHTS + end, "Rio").score == 1
    assert verdict(text_rule(["answer_is", "hashes"]), THOUGHTS + end, "rio").score == \
        ("boxed" not in end)


def test_the_last_of_a_kind_counts_and_kinds_in_their_order() -> None:
    text = "The answer is 3. No: the answer is 4. \\boxed{5} and **6**\nso 7"
    for places, read in [(("answer_is",), "4"), (("boxed", "answer_is"), "5"), (("bold",), "6"),
                         (("last_line",), "so 7"), ((LAST_NUMBER,), "7"), (("hashes",), None),
                         (("hashes", "bold"), "6")]:
        assert verdict(number_rule(places), text, "1").read == read
    assert list(final_texts(text, ["hashes", "bold", "boxed"])) == ["6", "5"]


def test_relaxed() -> None:
    rule = relaxed_rule()
    assert verdict(rule, "The answer is 10.4", "10").score == 1
    assert verdict(rule, "10.6", "10").score == 0
    assert verdict(rule, "$10.4", "10 dollars").score == 1
    assert verdict(relaxed_rule(tolerance=0.1), "10.6", "10").score == 1
    assert verdict(rule, "I saw 10 cats and 4 dogs.", "10").score == 0
    assert verdict(rule, "Brazil.", "brazil").score == 1


def test_the_name_says_what_is_not_as_usual() -> None:
    usual = [number_rule(), relaxed_rule(), anls_rule()]
    assert [rule.name for rule in usual] == ["number", "relaxed", "anls"]
    assert number_rule(("boxed", "whole"), 0.01).name == "number[boxed,whole;0.01]"
    assert relaxed_rule(tolerance=0.1).name == "relaxed[0.1]"
    assert text_rule(["boxed"]).name == "normalised[boxed]"


def test_what_cannot_be_read_is_counted() -> None:
    assert verdict(number_rule(), "I do not know", "3").read is None
    assert verdict(number_rule(("boxed",)), "3", "3").read is None


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("rule", [number_rule(), relaxed_rule(),
                                  text_rule(list(PATTERNS))], ids=lambda rule: rule.name)
def test_broken_answers(rule: Any, name: str) -> None:
    assert survives(rule, BROKEN[name], "x7", "77.5").score == 0


@pytest.mark.parametrize("text", ["answer is " * 30_000, "\\boxed{{" * 30_000, "**a" * 70_000,
                                  "#### \n" * 30_000, "1 1/2 " * 30_000, "$-" * 100_000,
                                  "1 000 " * 30_000, "½" * 100_000])
def test_hostile_answers_take_no_time(text: str) -> None:
    for rule in (number_rule(), relaxed_rule(), text_rule(list(PATTERNS))):
        assert survives(rule, text, "x7").score == 0


# ----- in a YAML file -----------------------------------------------------------------------


def own(folder: Path, **keys: Any) -> Path:
    (folder / "rows.jsonl").write_text('{"question": "How much?", "answer": "$1,250"}\n')
    path = folder / "tables.yaml"
    path.write_text(yaml.safe_dump({"data": "rows.jsonl", "images": False, **keys}))
    return path


@pytest.mark.parametrize(("keys", "answer", "name"), [
    ({"type": "number"}, "3 * 400 + 50 = 1250", "number"),
    ({"type": "number", "tolerance": 0.01}, "1255 dollars", "number[0.01]"),
    ({"type": "number", "final": ["hashes"]}, "no 7\n#### 1250", "number[hashes]"),
    ({"type": "relaxed"}, "The answer is 1,300", "relaxed"),
    ({"type": "anls"}, "Answer: $1,250", "anls"),
    ({"type": "short_answer", "final": ["boxed"]}, "so \\boxed{$1,250}", "normalised[boxed]"),
    ({"type": "short_answer"}, "$1,250", "normalised")])
def test_types_of_a_users_own(tmp_path: Path, keys: dict[str, Any], answer: str, name: str) -> None:
    benchmark = find_benchmark(str(own(tmp_path, **keys)))
    question, = read_questions(benchmark, DataSource(str(tmp_path / "rows.jsonl")))
    rule, = benchmark.rules
    assert (rule.name, rule.judge([question], [answer])[0].score) == (name, 1.0)
    assert rule.judge([question], ["I do not know."])[0].score == 0
    text = "".join(part for part in question.prompt if part)
    assert text.startswith("How much?\nAnswer the question ")
    if "final" in keys:
        assert keys["final"][0] in rule.source


@pytest.mark.parametrize(("keys", "words"), [
    ({"type": "anls", "tolerance": 0.1}, "tolerance has no effect .* type anls; it is for number"),
    ({"type": "yes_no", "final": ["boxed"]}, "final has no effect .* type yes_no; it is for sho"),
    ({"type": "relaxed", "final": ["last_number"]}, "final: last_number is for the type number"),
    ({"type": "number", "final": ["boxd"]}, "final.*Did you mean 'boxed'"),
    ({"type": "number", "final": []}, "final"), ({"type": "number", "tolerance": -1}, "tolerance"),
    ({"type": "numbr"}, "Did you mean 'number'")])
def test_mistakes(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=rf"tables.yaml: .*{words}"):
        find_benchmark(str(own(tmp_path, **keys)))


def test_a_right_answer_that_is_no_number(tmp_path: Path) -> None:
    benchmark = find_benchmark(str(own(tmp_path, type="number")))
    (tmp_path / "rows.jsonl").write_text('{"question": "When?", "answer": "3:45 PM"}\n')
    with pytest.raises(RecordError, match=r"rows.jsonl:1: answer = '3:45 PM' is no number.*rel"):
        read_questions(benchmark, DataSource(str(tmp_path / "rows.jsonl")))


def test_every_place_that_a_file_may_name_is_one() -> None:
    assert set(get_args(Place)) == {*PATTERNS, LAST_NUMBER}
