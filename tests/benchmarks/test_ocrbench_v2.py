"""OCRBench v2: every kind's score, what has none, and the data's columns.

The expected scores are what the authors' own functions gave (lmms-eval 0.7.3's copy of
OCRBench_v2/eval_scripts, run apart from this package); 60,400 random answers agreed as well.
"""

import time

import pytest
from benchmarks.short_answers import BROKEN, judged, read

from taid_vlm.benchmarks.metrics import ocrbench_v2 as scores
from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.tasks.ocrbench_v2 import BENCHMARK, BY_KIND, PART_OF, TEDS, TEXTS
from taid_vlm.errors import RecordError

OFFICIAL = BENCHMARK.rules[0]


def asked(*golds, **extra):
    return Question("1", ("?",), answers=golds, extra=extra)


@pytest.mark.parametrize(("kind", "answer", "golds", "wanted"), [
    ("vqa", "It is an Apple\npie.", ["apple pie", "12"], 1),
    ("vqa", "the quick brown fox jumped over", ["the quick brown fox jumps over"],
     0.935483870967742),
    ("vqa", "no such thing at all here", ["the quick brown fox jumps over"], 0),
    ("with_case", "It is Apple", ["apple"], 0), ("with_case", "It is apple", ["apple"], 1),
    ("vqa_cn", "红 色的 花", ["红色"], 1),
    ("vqa_cn", "红,绿,蓝,黄", ["红,绿,蓝,黑"], 0.8571428571428572),
    ("formula", "$ x^{2} = 4 $", ["x^{2}=4"], 1), ("formula", "x^2", ["x^{2}"], 0),
    ("formula_cn", "\\text{面积} = 4", ["面积=4"], 1),
    ("count_exact", "There are 7", ["7"], 1), ("count_exact", "seven", ["7"], 0),
    ("count_exact", "There are 17", ["7"], 1),
    ("count_near", "I count 9 of 12", ["10"], 0.9), ("count_near", "5", ["10"], 0),
    ("count_near", "20", ["10"], 0), ("count_near", "0", ["10"], 0),
    ("count_near", "none", ["10"], 0), ("count_near", "11", ["10", "12"], 0.9166666666666666),
    ("grounding", "The box is [10, 20, 30, 40].", ["10", "20", "30", "60"], 0.5),
    ("grounding", "(0,0,5,5) or (10,20,30,40)", ["10", "20", "30", "40"], 1),
    ("grounding", "[10,20,30,4000]", ["10", "20", "30", "40"], 0),
    ("grounding", "none", ["1", "2", "3", "4"], 0),
    ("letter", "(B).", ["B"], 1), ("letter", "B cat", ["B"], 0),
    ("listed_cn", "选 A、C", ["AC"], 1), ("listed_cn", "A or C", ["AC"], 0),
])
def test_short_answers_and_boxes(kind, answer, golds, wanted):
    assert getattr(scores, kind)(answer, asked(*golds)) == pytest.approx(wanted)


@pytest.mark.parametrize(("answer", "gold", "wanted"), [
    ('{"total": "$5 ", "date": "1 May"}', '{"total": "$5", "date": ["2 May", "1 may"]}', 1),
    ('```json\n{"total": 5}\n```', '{"total": "5", "date": "x"}', 0.5),
    ('total: 5\ndate = "x"', '{"total": "5", "date": "x"}', 1),
    ('["5"]', '{"total": "5"}', 0), ("nothing", '{"total": "5"}', 0),
    ('{"a": "1", "b": "2"}', '{"a": ["1", null], "c": [null, "3"]}', 0.5),
    ("{'a': '1'}", "no keys at all", 0),
])
def test_keys_and_values(answer, gold, wanted):
    assert scores.keys_and_values(answer, asked(gold, pairs=scores.pairs_of(gold))) == wanted


@pytest.mark.parametrize(("answer", "wanted"), [
    ('{"answer": "apple", "bbox": [10, 20, 30, 40]}', 1),
    ('{"answer": "apple", "bbox": "[10, 20, 30, 30]"}', 0.75),
    ("answer: pear", 0), ('{"bbox": "nowhere"}', 0),
])
def test_an_answer_with_its_place(answer, wanted):
    assert scores.with_position(answer, asked("Apple", bbox=[10, 20, 30, 40])) == wanted


WORDS = [([0, 0, 20, 0, 20, 10, 0, 10], "Stop!"), ([30, 0, 60, 0, 60, 10, 30, 10], "cafe"),
         ([0, 50, 20, 50, 20, 60, 0, 60], "###")]


@pytest.mark.parametrize(("answer", "wanted"), [
    ("[(0,0,20,10,'STOP'), (30,0,60,10,'Cafe')]", 1),
    ("[0, 0, 20, 10, stop], [30, 0, 60, 10, tea]", 0.5),
    ("[(0,0,20,10,'stop'), (0,50,20,60,'x'), (70,0,90,10,'y')]", 0.5),
    ("[(0,0,9,10,'stop')]", 0), ("[(20,0,0,10,'stop')]", 0), ("nothing", 0),
    ("[(0,0,20,2000,'stop')]", 0),
])
def test_words_at_their_places(answer, wanted):
    assert scores.spotting(answer, asked("x", words=WORDS)) == wanted


@pytest.mark.parametrize("kind", sorted({*PART_OF} - {"text counting en"}))
@pytest.mark.parametrize("name", BROKEN)
def test_broken_answers(kind, name):
    pairs = "key information" in kind
    question = read(BENCHMARK, type=kind, answers=['{"a": "x7"}'] if pairs else ["x7"],
                    bbox=[1, 2, 3, 4] if "position" in kind else [[1, 2, 3, 4]], content=["x7"])
    start = time.process_time()
    verdict, = OFFICIAL.judge([question], [BROKEN[name]])
    assert time.process_time() - start < 1
    assert verdict.score == 0


@pytest.mark.parametrize("answer", [
    "a " * 100_000, "[" + " " * 200_000, "a: " * 70_000, "answer" + " " * 200_000, "1" * 200_000,
    "(1,1,1,1" * 25_000, "{" * 100_000, "[[1,2,3,4,'x']," * 14_000])
def test_hostile_answers_take_no_time(answer):
    start = time.process_time()
    extra = {"pairs": {"a": ["1"]}, "words": WORDS, "bbox": [1, 2, 3, 4]}
    for score in {*BY_KIND.values(), scores.count_near, scores.vqa}:
        assert score(answer, asked("7", "9", "11", "12", **extra)) >= 0
    assert time.process_time() - start < 4


class TestRows:
    def test_columns_of_the_hub(self):
        found = read(BENCHMARK, id=3, dataset_name="x", type="text spotting en", answers=["x"],
                     bbox_list=[[0, 0, 20, 0, 20, 10, 0, 10]], content=["Stop"], eval=None)
        assert (found.id, found.prompt) == ("3", (None, "what is It?"))
        assert found.tags == {"type": "text spotting en", "part": "text spotting en",
                              "dataset_name": "x"}
        assert OFFICIAL.judge([found], ["[(0,0,20,10,'stop')]"])[0].score == 1

    def test_columns_of_vlmevalkit(self):
        found = read(BENCHMARK, index=3, category="VQA with position en", answer="['Apple']",
                     eval="without eval", bbox="[10, 20, 30, 40]", content="without content")
        assert found.extra["bbox"] == [10, 20, 30, 40] and "eval" not in found.extra
        chosen = read(BENCHMARK, category="science QA en", answer="['B']", eval="multiple choice",
                      bbox="without bbox", content="without content")
        assert [v.score for v in OFFICIAL.judge([chosen] * 2, ["(B)", "B cat"])] == [1, 0]

    def test_a_kind_that_is_none(self):
        with pytest.raises(RecordError, match=r"'text spoting en'.*text spotting en"):
            read(BENCHMARK, type="text spoting en", answers=["x"])


def test_kinds_without_a_score_are_told_and_in_no_figure():
    kinds = {"table parsing en": TEDS, "document parsing cn": TEDS, "chart parsing en": TEDS,
             "full-page OCR cn": TEXTS, "fine-grained text recognition en": TEXTS,
             "text translation cn": TEXTS, "handwritten answer extraction cn": TEXTS}
    for kind, reason in kinds.items():
        question = read(BENCHMARK, type=kind, answers=["x"], question="简答: x?")
        assert [v.unscored for v in OFFICIAL.judge([question] * 2, ["x", ""])] == [reason] * 2
    short = read(BENCHMARK, type="handwritten answer extraction cn", answers=["x"])
    assert OFFICIAL.judge([short], ["x"])[0].score == 1


def test_figures():
    """Parts with kinds that have no score are none of the figures, nor are the two averages."""
    rows = [("math QA en", "1"), ("text counting en", "0"), ("reasoning VQA cn", "1"),
            ("formula recognition en", "1"), ("cognition VQA cn", "0")]
    asked = [read(BENCHMARK, id=n, type=kind, answers=["1"], eval="exact match"
                  if "counting" in kind else None) for n, (kind, _) in enumerate(rows)]
    found = OFFICIAL.figures(judged(OFFICIAL, asked, [answer for _, answer in rows]))
    assert {name: figure.value for name, figure in found.items()} == {
        "accuracy": 0.6, "mathematical calculation en": 0.5, "visual text understanding cn": 0}
