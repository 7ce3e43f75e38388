"""VQAv2, TextVQA, GQA and exact match: the official figures, by hand and at random."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from benchmarks.short_answers import BROKEN, judged, question, read, read_file, survives, verdict

from taid_vlm.benchmarks.metrics import vqa
from taid_vlm.benchmarks.metrics.text import EXACT_MATCH, normalised
from taid_vlm.benchmarks.question import accuracy
from taid_vlm.benchmarks.tasks import gqa, textvqa, vqav2
from taid_vlm.errors import RecordError, TaidError

LMMS_GQA, VLMEVALKIT_GQA = gqa.BENCHMARK.rules
RULES = (*vqav2.BENCHMARK.rules, *textvqa.BENCHMARK.rules, *gqa.BENCHMARK.rules, EXACT_MATCH)

# Taken from the programs named in the rules: text, official, evalai, lmms, vlmevalkit.
SEEN = [
    ("The Dog's bowl", "dog's bowl", "dog 's bowl", "dog's bowl", "dog's bowl"),
    ("1,000 dogs, cats", *["1000 dogs cats"] * 4),
    ("1,,000-2", "1 000 2", "1000 2", "10002", "1 000 2"),
    ("3.", "3", "3", "3", "3."),
    ("e.g. 3. a", "eg 3", "eg 3", "eg 3", "eg 3."),
    ("it is $5.00.", "it is $5.00", "it is $5.00", "it is $5.00", "it is $5.00."),
    ("U.S.A.", *["usa"] * 4),
    ("couldnt", *["couldn't"] * 4),
    ("youd've", *["you'd've"] * 4),
    ("Somebody'd", *["somebodyd"] * 4),
    ("ow's'at", "'ow's'at", "ow 's'at", "'ow's'at", "'ow's'at"),
    ("two-thirds", *["2 thirds"] * 4),
    ("two - thirds", *["2 thirds"] * 4),
    ("what?!no", *["what no"] * 4),
    ("a an the", *[""] * 4),
    ("none", *["0"] * 4),
    ("don't/cant", *["don't can't"] * 4),
    ("the  cat\tand\nthe dog.", *["cat and dog"] * 4),
    ("." * 40, *["." * 8] * 4),
    ("“the”", *["“the”"] * 4),
]


@pytest.mark.parametrize(("text", "official", "evalai", "lmms", "vlmevalkit"), SEEN)
def test_normalisers_as_published(
    text: str, official: str, evalai: str, lmms: str, vlmevalkit: str
) -> None:
    assert vqa.official(text) == official
    assert vqa.evalai(text) == evalai
    assert vqa.lmms(text) == lmms
    assert vqa.vlmevalkit(text) == vlmevalkit


def test_contractions_are_the_official_table() -> None:
    assert len(vqa._CONTRACTIONS) == 114  # without capitals and words that stay as they are
    assert vqa._words("yalld've thered've twas didnt im it's Let's") == \
        "yalld've there'd've 'twas didn't im it's let's"


def leave_one_out(answer: str, golds: list[str]) -> float:
    shares = []
    for index in range(len(golds)):
        others = golds[:index] + golds[index + 1:]
        shares.append(min(1.0, sum(gold == answer for gold in others) / 3))
    return sum(shares) / len(shares)


def test_agreement_is_the_mean_over_leaving_one_out() -> None:
    draw = random.Random(0)
    for _ in range(500):
        golds = draw.choices("abcd", k=draw.randint(1, 12))
        assert vqa.agreement("a", golds) == pytest.approx(leave_one_out("a", golds), abs=1e-12)


def test_known_scores() -> None:
    golds = ["net"] * 3 + ["fence"] * 7
    assert verdict(vqa.VQA_OFFICIAL, "net", *golds).score == pytest.approx(0.9)
    assert verdict(vqa.VQA_OFFICIAL, "The Fence.", *golds).score == 1.0
    assert verdict(vqa.VQA_OFFICIAL, "wall", *golds).score == 0.0
    assert verdict(vqa.VQA_OFFICIAL, "net", "net", *["x"] * 9).score == pytest.approx(0.3)


def test_official_leaves_answers_alone_where_people_agree() -> None:
    assert verdict(vqa.VQA_OFFICIAL, "Yes.", *["yes"] * 10).score == 0.0
    assert verdict(vqa.VQA_LMMS, "Yes.", *["yes"] * 10).score == 1.0
    assert verdict(vqa.VQA_OFFICIAL, "yes", *["yes"] * 10).score == 1.0
    assert verdict(vqa.VQA_OFFICIAL, "Yes.", *["yes"] * 9, "no").score == 1.0
    assert verdict(vqa.TEXTVQA_OFFICIAL, "Yes?", *["yes"] * 10).score == 1.0


def test_vlmevalkit_keeps_the_period_after_a_digit() -> None:
    assert verdict(vqa.TEXTVQA_OFFICIAL, "3.", *["3"] * 10).score == 1.0
    assert verdict(vqa.TEXTVQA_VLMEVALKIT, "3.", *["3"] * 10).score == 0.0


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_broken_answers(rule: Any, answer: str) -> None:
    assert survives(rule, answer, *["dog"] * 9, "red dog").score == 0.0


@pytest.mark.parametrize(("text", "same"), [
    ("The  Cat.", "cat"), ("“Ｃａｔ”", "cat"), ("(a) dog!", "dog"), ("$5.", "$5"), ("犬。", "犬"),
    ("STRASSE", "straße"), ("'tis", "tis"), ("...", "..."), ("The", "the"), ("a.m.", "a.m"),
])
def test_normalised_makes_equal(text: str, same: str) -> None:
    assert normalised(text) == normalised(same)
    assert verdict(EXACT_MATCH, text, "other", same).score == 1.0


@pytest.mark.parametrize(("text", "other"), [
    ("3.5", "35"), (".5", "5"), ("-5", "5"), ("5%", "5"), ("C++", "C"), ("1,000", "1.000"),
    ("...", "the"), ("t-shirt", "t shirt"), ("no", "none"),
])
def test_normalised_keeps_apart(text: str, other: str) -> None:
    assert verdict(EXACT_MATCH, text, other).score == 0.0


def test_gqa_variants() -> None:
    assert verdict(LMMS_GQA, "T-Shirt.", "tshirt").score == 1.0
    assert verdict(VLMEVALKIT_GQA, "T-Shirt.", "t-shirt").score == 0.0
    assert verdict(VLMEVALKIT_GQA, " T-Shirt\n", "t-shirt").score == 1.0


def test_vqav2_row() -> None:
    people = [{"answer": f" dog {i} ", "answer_id": i, "answer_confidence": "yes"}
              for i in range(10)]
    one = read(vqav2.BENCHMARK, answers=people, question_id=5, image_id=9, answer_type="other",
               question_type="what is")
    assert one.id == "5" and one.group == "9"
    assert one.answers == tuple(f"dog {i}" for i in range(10))
    assert one.prompt == (
        None, "what is It?\nAnswer the question using a single word or phrase.")
    assert one.tags == {"answer_type": "other", "question_type": "what is"}
    columns = {"answer": [f"dog {i}" for i in range(10)], "answer_id": list(range(10))}
    assert read(vqav2.BENCHMARK, answers=columns).answers == one.answers


def test_textvqa_row_in_the_capitals_of_lmms() -> None:
    one = read(textvqa.BENCHMARK, question="what is the PIN?", answer=str(["a"] * 10), index=4)
    assert one.prompt[1] is not None and one.prompt[1].startswith("What is the pin?\n")
    assert one.id == "4" and one.answers == ("a",) * 10


@pytest.mark.parametrize(("answers", "said"), [
    (["dog"], "1 answers of people.*short_answer"), ([], "blank answer or none"),
    (["dog"] * 9 + [""], "blank"), (None, "column 'answers' is missing"),
    ([{"text": "dog"}] * 10, "blank"), ([None] * 10, "blank"),
])
def test_vqav2_without_ten_people(answers: Any, said: str) -> None:
    with pytest.raises(RecordError, match=f"x.jsonl:1: .*{said}"):
        read(vqav2.BENCHMARK, answers=answers)


def test_gqa_images_beside_the_file_and_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": str(i), "imageId": f"n{i}", "question": "Is it?", "answer": "yes"}
            for i in range(2)]
    asked = read_file(gqa.BENCHMARK, rows, tmp_path)
    assert [one.images[0].value for one in asked] == [tmp_path / "n0.jpg", tmp_path / "n1.jpg"]
    assert [one.group for one in asked] == ["n0", "n1"]

    opened = []

    class Images(list[dict[str, Any]]):
        columns_of = list[dict[str, Any]].__getitem__

    def open_rows(source: Any) -> Images:
        opened.append((source.path, source.name, source.split))
        return Images([{"id": "n1", "image": {"bytes": b"one", "path": None}}])

    monkeypatch.setattr(gqa, "open_rows", open_rows)
    gqa._hub_images.cache_clear()
    on_hub = [gqa._image(gqa.Row({"imageId": "n1"}, "hub[0]")) for _ in range(2)]
    assert [image.value for image in on_hub] == [b"one", b"one"]
    assert opened == [("lmms-lab/GQA", "testdev_balanced_images", "testdev")]
    with pytest.raises(RecordError, match="column 'image' is missing"):
        gqa._image(gqa.Row({"imageId": "n2"}, "hub[1]"))
    gqa._hub_images.cache_clear()


def test_questions_that_are_asked_twice_are_told_apart(tmp_path: Path) -> None:
    row = {"question": "Is it?", "answer": "yes", "image": "a.png"}
    assert [one.id for one in read_file(gqa.BENCHMARK, [row, row], tmp_path)] == ["0", "1"]
    with pytest.raises(TaidError, match="two questions"):
        read_file(gqa.BENCHMARK, [{**row, "id": "3"}] * 2, tmp_path)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_figures_of_none_and_of_one(rule: Any) -> None:
    assert rule.judge([], []) == []
    assert rule.figures is accuracy and accuracy([])["accuracy"].n == 0
    one = judged(rule, [question(*["a dog"] * 10)], ["a dog"])
    assert rule.figures(one)["accuracy"].value == 1.0
