"""Yes or no: readings, POPE, MME and HallusionBench by hand; figures against plain counting."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.short_answers import BROKEN

from taid_vlm.benchmarks.metrics.yes_no import (
    as_word,
    detection,
    exactly,
    first_letters,
    first_letters_or_initial,
    first_sentence,
    right_answer,
    yes_anywhere,
)
from taid_vlm.benchmarks.question import Benchmark, Judged, Question, Verdict
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.rows import Row
from taid_vlm.benchmarks.tasks import hallusion_bench, mme, pope
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError

EXTRA = Path(os.environ.get("TAID_VLM_EXTRA_DATA", "/nonexistent")) / "conformance" / "pope"
READERS = (first_sentence, exactly, as_word, first_letters, first_letters_or_initial, yes_anywhere)


@pytest.mark.parametrize(("answer", "readings"), [
    # first_sentence, exactly, as_word, first_letters, first_letters_or_initial, yes_anywhere
    ("yes", ("yes", "yes", "yes", "yes", "yes", "yes")),
    ("No", ("no", "no", "no", "no", "no", "no")),
    (" NO ", ("yes", "no", "no", "no", "no", "no")),
    ("Yes.", ("yes", None, "yes", "yes", "yes", "yes")),
    ("No, there is not.", ("no", None, "no", "no", "no", "no")),
    ("There is not. Yes.", ("no", None, "yes", None, None, "yes")),
    ("Yes. It is not far.", ("yes", None, "yes", "yes", "yes", "yes")),
    ("There are none", ("yes", None, None, None, None, "no")),
    ("yes and no", ("no", None, None, "yes", "yes", "yes")),
    ("Nope", ("yes", None, None, "no", "no", "no")),
    ("y", ("yes", None, None, None, "yes", "no")),
    ("N.", ("yes", None, None, None, "no", "no")),
    ("_no_", ("yes", None, "no", "no", "no", "no")),
    ("eyes", ("yes", None, None, "yes", "yes", "yes")),
    ("I know", ("yes", None, None, None, None, "no")),
    ("", ("yes", None, None, None, None, "no")),
    ("是", ("yes", None, None, None, None, "no")),
    ("no\nyes", ("yes", None, None, "no", "no", "yes")),
])
def test_readings(answer, readings):
    assert tuple(read(answer) for read in READERS) == readings


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_broken_answers(name, read):
    start = time.process_time()
    assert read(BROKEN[name]) in ("yes", "no", None)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(("text", "wanted"), [
    ("Yes", "yes"), ("no", "no"), ("No.", "no"), ("1", "yes"), ("0", "no")])
def test_right_answer(text, wanted):
    assert right_answer(text, "here") == wanted


@pytest.mark.parametrize("text", ["2", "maybe", "true"])
def test_a_right_answer_that_is_neither(text):
    with pytest.raises(RecordError, match=f"here: the right answer is '{text}'"):
        right_answer(text, "here")


def one(benchmark: Benchmark, **columns) -> list[Question]:
    return benchmark.read(Row({"image": b"picture", **columns}, "data[0]"))


def judged(golds: list[str], reads: list[str | None], group: str = "") -> list[Judged]:
    return [Judged(Question(str(index), ("?",), answers=(gold,), group=group), "",
                   Verdict(float(read == gold), read))
            for index, (gold, read) in enumerate(zip(golds, reads, strict=True))]


def values(judged: list[Judged], **options) -> dict[str, float]:
    return {name: figure.value for name, figure in detection(judged, **options).items()}


class TestDetection:
    def test_by_hand(self):
        found = values(judged(["yes", "yes", "yes", "no", "no", "no"],
                              ["yes", "no", None, "yes", "no", "no"]))
        assert found == pytest.approx({"accuracy": 3 / 6, "precision": 1 / 2, "recall": 1 / 3,
                                       "f1": 2 / 5, "yes_ratio": 2 / 6})

    def test_lmms_leaves_what_cannot_be_read_out_of_recall(self):
        found = values(judged(["yes", "yes", "yes", "no"], ["yes", "no", None, None]),
                       unread_is_missed=False)
        assert found == pytest.approx({"accuracy": 1 / 4, "precision": 1, "recall": 1 / 2,
                                       "f1": 2 / 3, "yes_ratio": 1 / 4})

    def test_against_plain_counting(self):
        rng = random.Random(0)
        for _ in range(200):
            golds = rng.choices(["yes", "no"], k=30)
            reads = rng.choices(["yes", "no", None], k=30)
            pairs = Counter(zip(golds, reads, strict=True))
            tp, fp = pairs["yes", "yes"], pairs["no", "yes"]
            fn = pairs["yes", "no"] + pairs["yes", None]
            precision, recall = tp / (tp + fp), tp / (tp + fn)
            found = values(judged(golds, reads))
            assert found["precision"] == pytest.approx(precision)
            assert found["recall"] == pytest.approx(recall)
            harmonic = 2 * precision * recall / (precision + recall) if tp else 0
            assert found["f1"] == pytest.approx(harmonic)

    @pytest.mark.parametrize(("golds", "reads", "nan", "zero"), [
        (["yes", "no"], ["no", None], {"precision"},
         {"accuracy", "recall", "f1", "yes_ratio"}),
        (["no", "no"], ["yes", "yes"], {"recall"}, {"accuracy", "precision", "f1"}),
        (["no", "no"], ["no", "no"], {"precision", "recall", "f1"}, {"yes_ratio"}),
        ([], [], {"accuracy", "precision", "recall", "f1", "yes_ratio"}, set()),
    ])
    def test_what_cannot_be_known_is_nan(self, golds, reads, nan, zero):
        found = values(judged(golds, reads))
        assert {name for name, value in found.items() if math.isnan(value)} == nan
        assert {name for name, value in found.items() if value == 0} == zero

    def test_questions_about_one_image_are_one_draw(self):
        golds, reads = ["yes", "no"] * 10, ["yes"] * 20
        alone = detection(judged(golds, reads))["accuracy"].stderr
        pairs = [Judged(Question(str(i), ("?",), answers=j.question.answers, group=str(i // 2)),
                        "", j.verdict) for i, j in enumerate(judged(golds, reads))]
        assert alone > 0.1
        assert detection(pairs)["accuracy"].stderr == 0  # one of two right, whatever the image


class TestPope:
    def rule(self, name):
        return next(rule for rule in pope.BENCHMARK.rules if rule.name == name)

    def test_row(self):
        found, = one(pope.BENCHMARK, question_id="5", question="Is there a dog in the image?",
                     answer="yes", category="adversarial", image_source="COCO_1")
        assert found.prompt == (None, "Is there a dog in the image?\n"
                                      "Answer the question using a single word or phrase.")
        assert (found.id, found.answers, found.group) == ("adversarial/5", ("yes",), "COCO_1")
        assert found.tags == {"category": "adversarial"}

    def test_a_question_of_several_categories_counts_in_each(self):
        found = one(pope.BENCHMARK, index="9", question="?", answer="No",
                    category="popular,random")
        assert [(q.id, q.tags["category"]) for q in found] == [
            ("popular/9", "popular"), ("random/9", "random")]

    def test_rules_differ(self):
        question, = one(pope.BENCHMARK, question="?", answer="yes", category="random")
        scores = {name: [v.score for v in self.rule(name).judge(
            [question] * 4, ["yes", "Yes, it is.", "", "I see yes and no"])]
            for name in ("official", "lmms", "word")}
        assert scores == {"official": [1, 1, 1, 0], "lmms": [1, 0, 0, 0], "word": [1, 1, 0, 0]}

    @pytest.mark.skipif(not EXTRA.exists(), reason="TAID_VLM_EXTRA_DATA lacks pope")
    @pytest.mark.parametrize("category", ["random", "popular", "adversarial"])
    def test_the_authors_own_files(self, category, tmp_path):
        copy = tmp_path / "questions.jsonl"
        copy.write_bytes((EXTRA / f"coco_pope_{category}.json").read_bytes())
        questions = read_questions(pope.BENCHMARK, DataSource(str(copy)))
        labels = [json.loads(line)["label"] for line in copy.read_text().splitlines()]
        assert [q.answers[0] for q in questions] == labels
        assert Counter(labels)["yes"] == len(questions) // 2 == 1500 or category == "random"
        assert len({q.group for q in questions}) == 500
        everything_yes = self.rule("official").judge(questions, ["Yes"] * len(questions))
        found = detection([Judged(*each) for each in
                           zip(questions, ["Yes"] * len(questions), everything_yes, strict=True)])
        share = labels.count("yes") / len(labels)
        assert found["accuracy"].value == found["precision"].value == pytest.approx(share)
        assert found["recall"].value == found["yes_ratio"].value == 1


def mme_questions(subtasks: dict[str, int]) -> list[Question]:
    return [question for category, pictures in subtasks.items() for picture in range(pictures)
            for answer in ("Yes", "No") for question in one(
                mme.BENCHMARK, question_id=f"{category}/{picture}.png", category=category,
                question=f"Is it {answer}? Please answer yes or no.", answer=answer)]


class TestMme:
    RULE = mme.BENCHMARK.rules[0]

    def figures(self, subtasks, say):
        questions = mme_questions(subtasks)
        answers = [say(index, question) for index, question in enumerate(questions)]
        verdicts = self.RULE.judge(questions, answers)
        return self.RULE.figures([Judged(*each) for each in
                                  zip(questions, answers, verdicts, strict=True)])

    def test_row(self):
        question, other = mme_questions({"OCR": 1})
        assert question.prompt == (None, "Is it Yes? Please answer yes or no.")
        assert question.group == other.group == "OCR/OCR/0.png"
        assert question.id != other.id
        assert question.tags == {"category": "OCR", "part": "perception"}

    def test_perfect_and_always_yes(self):
        subtasks = {"OCR": 3, "count": 5, "code_reasoning": 2}
        perfect = self.figures(subtasks, lambda _, question: question.answers[0])
        assert {name: x.value for name, x in perfect.items()} == {
            "score": 600, "perception": 400, "cognition": 200, "acc": 100, "acc+": 100}
        always = self.figures(subtasks, lambda *_: "Yes")
        assert {name: x.value for name, x in always.items()} == {
            "score": 150, "perception": 100, "cognition": 50, "acc": 50, "acc+": 0}

    def test_against_plain_counting(self):
        rng = random.Random(1)
        subtasks = {"OCR": 4, "scene": 7, "text_translation": 3}
        answers = rng.choices(["yes", "no", "hm"], k=28)
        found = self.figures(subtasks, lambda index, _: answers[index])
        questions, points = mme_questions(subtasks), {}
        right = [a == q.answers[0] for a, q in zip(answers, questions, strict=True)]
        for category in subtasks:
            own = [r for r, q in zip(right, questions, strict=True)
                   if q.tags["category"] == category]
            both = [first and second for first, second in zip(own[::2], own[1::2], strict=True)]
            points[category] = 100 * statistics.fmean(own) + 100 * statistics.fmean(both)
        assert found["perception"].value == pytest.approx(points["OCR"] + points["scene"])
        assert found["cognition"].value == pytest.approx(points["text_translation"])
        assert found["score"].value == pytest.approx(sum(points.values()))
        assert found["score"].n == 28
        assert found["score"].stderr > 0

    def test_one_subtask_and_none(self):
        alone = self.figures({"OCR": 2}, lambda *_: "no")
        assert set(alone) == {"score", "perception", "acc", "acc+"}
        assert alone["score"].value == 50
        assert math.isnan(self.RULE.figures([])["score"].value)


def hallusion(category="VD", set_id=0, figure=1, number=0, answer="1", **columns) -> Question:
    found, = one(hallusion_bench.BENCHMARK, category=category, subcategory="chart", set_id=set_id,
                 figure_id=figure, question_id=number, question="Is it?", gt_answer=answer,
                 **columns)
    return found


class TestHallusionBench:
    WORD, LMMS = hallusion_bench.BENCHMARK.rules

    def figures(self, scored: list[tuple[Question, bool]]):
        return hallusion_bench.figures([
            Judged(question, "", Verdict(float(right), "yes")) for question, right in scored])

    def test_row(self):
        found = hallusion(set_id="3", figure="1", number="2", answer="0")
        assert found.prompt == (None, "Is it? Please answer yes or no.")
        assert (found.id, found.group) == ("VD_chart_3_1_2", "VD_chart_3")
        assert (found.answers, found.tags["category"]) == (("no",), "VD")

    def test_a_question_without_a_figure(self):
        found = hallusion(image=None, visual_input="0")
        assert (found.prompt, found.images) == (("Is it? Please answer yes or no.",), ())

    def test_a_figure_that_is_missing(self):
        with pytest.raises(RecordError, match="'image' is missing"):
            hallusion(image=None, visual_input="1")

    def test_by_hand(self):
        """Two figures, two questions: one question is wrong for the second figure."""
        found = self.figures([(hallusion(figure=1, number=0), True),
                              (hallusion(figure=1, number=1), True),
                              (hallusion(figure=2, number=0), True),
                              (hallusion(figure=2, number=1), False),
                              (hallusion(set_id=1), True)])
        values = {name: x.value for name, x in found.items()}
        assert values == pytest.approx({"average": (4 / 5 + 2 / 3 + 2 / 3) / 3, "aAcc": 4 / 5,
                                        "fAcc": 2 / 3, "qAcc": 2 / 3})
        assert {name: x.n for name, x in found.items()} == {
            "average": 5, "aAcc": 5, "fAcc": 3, "qAcc": 3}

    def test_what_is_asked_without_a_figure_is_no_figure(self):
        """VS supplements a question with figures; its figure 0 is none. VD's figure 0 is one."""
        found = self.figures([(hallusion("VS", figure=0), False), (hallusion("VS", figure=1), True),
                              (hallusion("VD", figure=0), False)])
        assert (found["fAcc"].value, found["fAcc"].n) == (0.5, 2)
        assert (found["qAcc"].value, found["aAcc"].value) == (0, pytest.approx(1 / 3))

    def test_the_average_has_the_error_of_the_jackknife(self):
        rng = random.Random(2)
        sets = [[(hallusion(set_id=name, figure=figure, number=number), rng.random() < 0.8)
                 for figure in range(rng.randint(1, 3)) for number in range(2)]
                for name in range(120)]
        found = self.figures([each for one_set in sets for each in one_set])
        left_out = [self.figures([each for other in sets if other is not one_set
                                  for each in other])["average"].value for one_set in sets]
        whole, mean, n = found["average"].value, statistics.fmean(left_out), len(sets)
        jackknife = math.sqrt(sum((value - mean) ** 2 for value in left_out) * (n - 1) / n)
        assert found["average"].stderr == pytest.approx(jackknife, rel=0.02)
        assert whole == pytest.approx(
            statistics.fmean(found[name].value for name in ("aAcc", "fAcc", "qAcc")))

    def test_rules_differ(self):
        answers = ["Yes", "No.", "yes and no", "", "The eyes are shut"]
        questions = [hallusion(number=number, answer="1") for number in range(5)]
        assert [v.read for v in self.WORD.judge(questions, answers)] == [
            "yes", "no", None, None, None]
        assert [v.read for v in self.LMMS.judge(questions, answers)] == [
            "yes", "no", "yes", "no", "yes"]

    def test_no_questions(self):
        assert all(math.isnan(figure.value) for figure in self.figures([]).values())
