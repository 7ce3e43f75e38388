"""DocVQA, InfoVQA, ChartQA and OCRBench: near misses count, and how much."""

from __future__ import annotations

import random
from typing import Any

import pytest
from benchmarks.short_answers import BROKEN, judged, question, read, survives, verdict

from taid_vlm.benchmarks.metrics.anls import ANLS, STRICT, levenshtein
from taid_vlm.benchmarks.metrics.relaxed import OFFICIAL, SEPARATORS, relaxed
from taid_vlm.benchmarks.tasks import chartqa, docvqa, infovqa, ocrbench
from taid_vlm.errors import RecordError

OCR, OCR_LMMS = ocrbench.BENCHMARK.rules
SCENE = "Scene Text-centric VQA"


# ----- ANLS ---------------------------------------------------------------------------------


def distance_by_table(a: str, b: str) -> int:
    table = [[max(i, j) if not min(i, j) else 0 for j in range(len(b) + 1)]
             for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1,
                              table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


def test_levenshtein_against_the_table() -> None:
    draw = random.Random(0)
    for _ in range(1500):
        a, b = ("".join(draw.choices("abc日😀", k=draw.randint(0, draw.choice((4, 14, 90)))))
                for _ in range(2))
        assert levenshtein(a, b) == distance_by_table(a, b)
    assert levenshtein("kitten", "sitting") == 3
    assert levenshtein("", "") == 0


def official_anls(answer: str, golds: list[str]) -> float:
    """As the published script goes about it."""
    values = []
    for gold in golds:
        distance = distance_by_table(" ".join(gold.strip().lower().split()),
                                     " ".join(answer.strip().lower().split()))
        values.append(distance / max(len(gold.upper()), len(answer.strip().upper())))
    result = 1 - min(values)
    return result if result >= 0.5 else 0.0


def test_anls_against_the_script() -> None:
    draw = random.Random(1)
    seen = set()
    for _ in range(1500):
        answer, *golds = ("x" + "".join(draw.choices("aAbß  \n", k=draw.randint(0, 9)))
                          for _ in range(3))
        found = verdict(ANLS, answer, *golds).score
        assert found == pytest.approx(official_anls(answer, golds), abs=1e-12)
        seen.add(found)
    assert {0.0, 0.5, 1.0} < seen


@pytest.mark.parametrize(("answer", "gold", "official", "strict"), [
    ("Coca  Cola\n", "coca cola", 11 / 11, 1.0),
    ("coca cola company", "coca cola", 9 / 17, 9 / 17),
    ("ab", "abcd", 0.5, 0.0),  # exactly the threshold
    ("abc", "abcdefg", 0.0, 0.0),
    ("STRAẞE", "straße", 1.0, 1.0),
    ("a" + " " * 98 + "b", "x y", 0.98, 0.0),  # the script counts the spaces within
    ("abc" + " " * 97, "x", 0.0, 0.0),
])
def test_anls_by_hand(answer: str, gold: str, official: float, strict: float) -> None:
    assert verdict(ANLS, answer, gold).score == pytest.approx(official)
    assert verdict(STRICT, answer, gold).score == pytest.approx(strict)
    assert verdict(ANLS, answer, "something else", gold).score == pytest.approx(official)


@pytest.mark.parametrize("rule", [ANLS, STRICT], ids=lambda rule: rule.name)
@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_broken_answers_to_documents(rule: Any, answer: str) -> None:
    score = survives(rule, answer, "invoice 17", "x" * 300).score
    if rule is ANLS and answer is BROKEN["spaces"]:  # the script counts them
        assert 0.9999 < score < 1
    else:
        assert score == 0.0


def test_a_gold_as_long_as_the_answer() -> None:
    page = "lorem ipsum dolor " * 600
    assert survives(ANLS, page, page[:-100] + "x").score > 0.98


def test_document_rows() -> None:
    page = read(docvqa.BENCHMARK, questionId=3, docId=8, answers=["$ 5", "5"],
                question_types=["form", "handwritten"])
    assert (page.id, page.group, page.answers) == ("3", "8", ("$ 5", "5"))
    assert page.tags == {"type: form": "yes", "type: handwritten": "yes"}
    graphic = read(infovqa.BENCHMARK, index=2, answer="['12', '12%']", image_url="u")
    assert (graphic.id, graphic.group, graphic.answers) == ("2", "u", ("12", "12%"))
    for benchmark in (docvqa.BENCHMARK, infovqa.BENCHMARK):
        with pytest.raises(RecordError, match=r"x.jsonl:1: column 'answers' is missing"):
            read(benchmark, questionId=1, answers=None)  # as in the splits for submission


# ----- ChartQA ------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "gold", "right"), [
    ("105", "100", True), ("95", "100", True), ("106", "100", False), ("-100", "100", False),
    ("12%", "12%", True), ("0.12", "12%", True), ("12", "12%", False), ("12.5%", "12%", True),
    ("0", "0", True), ("0.0", "0", False), ("0.01", "0", False), ("", "0", False),
    ("Yes", "yes", True), ("yes.", "yes", False), ("2015", "2014", True),
    ("nan", "5", False), ("inf", "5", False), ("1e999", "5", False), ("nan", "NaN", True),
    ("1,000", "1000", False), ("1e3", "1000", True), ("%", "5", False), ("[2, 5]", "[2, 5]", True),
])
def test_relaxed(answer: str, gold: str, right: bool) -> None:
    assert relaxed(answer, gold) is right
    assert verdict(OFFICIAL, f" {answer}\n", gold).score == right * bool(answer)


def test_separators_of_thousands() -> None:
    for answer, gold in (("1,000", "1000"), ("1000", "1,000"), ("1,234,567.8%", "1234567.8%")):
        assert verdict(OFFICIAL, answer, gold).score == 0.0
        assert verdict(SEPARATORS, answer, gold).score == 1.0
    for answer, gold in (("1,00", "100"), ("1,0000", "10000"), ("1, 000", "1000"), ("a,b", "ab")):
        assert verdict(SEPARATORS, answer, gold).score == 0.0


@pytest.mark.parametrize("rule", [OFFICIAL, SEPARATORS], ids=lambda rule: rule.name)
@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_broken_answers_to_charts(rule: Any, answer: str) -> None:
    assert survives(rule, answer, "25.5", "red").score == 0.0


def test_chart_rows() -> None:
    person = read(chartqa.BENCHMARK, answer="[57, 50]", type="human_test")
    assert person.answers == ("[57, 50]",) and person.tags == {"type": "human"}
    assert person.id == "7"
    table = read(chartqa.BENCHMARK, answer="['14']", split="test_augmented", index=3)
    assert table.answers == ("14",) and table.tags == {"type": "augmented"} and table.id == "3"
    assert read(chartqa.BENCHMARK, answer=14).tags == {}
    with pytest.raises(RecordError, match=r"type = 'people'.*augmented, human"):
        read(chartqa.BENCHMARK, answer="14", type="people")


def test_chart_figures_by_origin() -> None:
    asked = [question("10", type="human"), question("20", type="human"),
             question("30", type="augmented")]
    found = OFFICIAL.figures(judged(OFFICIAL, asked, ["10", "11", "30"]))
    assert {name: (x.value, x.n) for name, x in found.items()} == {
        "overall": (pytest.approx(2 / 3), 3), "human": (0.5, 2), "augmented": (1.0, 1)}
    assert list(OFFICIAL.figures(judged(OFFICIAL, asked[:1], ["10"]))) == ["overall", "human"]
    assert OFFICIAL.figures([])["overall"].n == 0


# ----- OCRBench -----------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "gold", "kind", "right"), [
    ("It says CENTRE.", "Centre", SCENE, True),
    ("cen tre", "centre", SCENE, False),
    ("two\nlines", "two lines", SCENE, True),
    ("\\frac {1}{2}\nx", "\\frac { 1 } { 2 }", ocrbench.FORMULAS, True),
    ("X + y", "x+y", ocrbench.FORMULAS, False),  # case is kept
    ("x  +\n y", "x+y", ocrbench.FORMULAS, True),
])
def test_ocr_hits(answer: str, gold: str, kind: str, right: bool) -> None:
    for rule in (OCR, OCR_LMMS):
        assert verdict(rule, answer, "something else", gold, question_type=kind).score == right


def test_full_width_letters() -> None:
    assert verdict(OCR, "（ＡＢ）　１", "(ab) 1", question_type=SCENE).score == 0.0
    assert verdict(OCR_LMMS, "（ＡＢ）　１", "(ab) 1", question_type=SCENE).score == 1.0
    assert verdict(OCR_LMMS, "ｘ", "x", question_type=ocrbench.FORMULAS).score == 0.0


@pytest.mark.parametrize("rule", [OCR, OCR_LMMS], ids=lambda rule: rule.name)
@pytest.mark.parametrize("kind", [SCENE, ocrbench.FORMULAS])
@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_broken_answers_to_ocr(rule: Any, kind: str, answer: str) -> None:
    assert survives(rule, answer, "centre", "theatre", question_type=kind).score == 0.0


def test_points_of_a_thousand() -> None:
    sizes = {**dict.fromkeys(ocrbench.RECOGNITION, 50), SCENE: 200, "Doc-oriented VQA": 200,
             "Key Information Extraction": 200, ocrbench.FORMULAS: 100}
    asked = [question("yes", question_type=kind) for kind, n in sizes.items() for _ in range(n)]
    answers = ["yes" if index % 10 < 7 else "no" for index in range(len(asked))]
    found = ocrbench.points(judged(OCR, asked, answers))
    assert {name: (x.value, x.n) for name, x in found.items()} == {
        "score": (700, 1000), "Text Recognition": (210, 300), SCENE: (140, 200),
        "Doc-oriented VQA": (140, 200), "Key Information Extraction": (140, 200),
        ocrbench.FORMULAS: (70, 100)}
    assert next(iter(found)) == "score"
    assert ocrbench.BENCHMARK.decimals is None


def test_points_of_part_of_the_data() -> None:
    asked = [question("yes", question_type=SCENE)] * 3
    found = ocrbench.points(judged(OCR, asked, ["yes", "no", ""]))
    assert list(found) == ["score", SCENE] and found["score"].value == 1
    assert ocrbench.points([])["score"].value == 0


def test_ocr_rows() -> None:
    one = read(ocrbench.BENCHMARK, dataset="IAM", question_type="Handwriting Recognition",
               answer=["ab", "Ab"])
    assert one.prompt == (None, "what is It?") and one.answers == ("ab", "Ab") and one.id == "7"
    assert one.tags == {"question_type": "Handwriting Recognition", "dataset": "IAM"}
    table = read(ocrbench.BENCHMARK, category=ocrbench.FORMULAS, answer="['x ^ 2']", index=9)
    assert table.answers == ("x ^ 2",) and table.id == "9"
    with pytest.raises(RecordError, match=r"question_type = 'Handwriting'.*Did you mean"):
        read(ocrbench.BENCHMARK, question_type="Handwriting", answer=["a"])
    with pytest.raises(RecordError, match="blank"):  # it would be part of every answer
        read(ocrbench.BENCHMARK, question_type=SCENE, answer=["a", " "])
