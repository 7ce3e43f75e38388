"""RealWorldQA, SEED-Bench, BLINK, MMMU-Pro, MMBench-CN: columns of the hub, rules of others.

Where a rule is another project's, the expected reading is what its own function gave (lmms-eval
0.7.3; MMMU-Pro: mmmu-pro/evaluate.py with its guess taken out), run apart from this package. Beyond
these cases: MMMU-Pro's rule gave the authors' published reading of all 6,862 answers of GPT-4o that
were not guessed at, and BLINK's was lmms-eval's on 38,335 published answers with 2 to 5 options.
"""

import base64
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmarks.short_answers import BROKEN, read
from benchmarks.test_choices import judged, png, rule_of

from taid_vlm.benchmarks.asking import open_tasks
from taid_vlm.benchmarks.metrics.letters import lmms_blink_option, lmms_first_character
from taid_vlm.benchmarks.metrics.mmmu import read_pro_choice
from taid_vlm.benchmarks.question import Verdict
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.rows import Row
from taid_vlm.benchmarks.tasks import (
    blink,
    mmbench_cc,
    mmbench_cn,
    mmmu_pro,
    mmmu_pro_4,
    mmmu_pro_vision,
    realworldqa,
    seedbench,
)
from taid_vlm.config.data import DataSource
from taid_vlm.errors import SampleDropped

CARS = "Which one is near?\n\nA. The red one\nB. Both\nPlease answer with the letter only."


class TestRealWorldQA:
    def test_options_stand_in_the_question(self):
        found = read(realworldqa.BENCHMARK, question=CARS, answer="B")
        assert found.prompt == (None, CARS)
        assert (found.choices, found.answers) == (("The red one", "Both"), ("B",))
        assert found.tags == {"answer_type": "option"}
        number = read(realworldqa.BENCHMARK, question="How many?", answer="2")
        assert (number.choices, number.answers, number.tags["answer_type"]) == ((), ("2",), "open")

    @pytest.mark.parametrize(("rule", "answer", "gold", "score"), [
        ("letter", "Both of them", "B", 1), ("lmms", "Both of them", "B", 1),
        ("lmms", "D", "B", 0), ("letter", "D", "B", 0), ("lmms", "It is (B).", "B", 1),
        ("vlmevalkit", "B.", "B", 1), ("letter", "The Answer.", "answer", 1),
        ("lmms", "Yes.", "yes", 1), ("lmms", "yes, it is", "yes", 0), ("lmms", "  0 ", "0", 1)])
    def test_rules(self, rule, answer, gold, score):
        text = CARS if gold == "B" else "Is it?"
        found = read(realworldqa.BENCHMARK, question=text, answer=gold)
        assert rule_of(realworldqa.BENCHMARK, rule).judge([found], [answer])[0].score == score

    def test_vlmevalkit_s_rule_has_nothing_to_say_without_options(self):
        found = read(realworldqa.BENCHMARK, question="Is it?", answer="yes")
        verdict, = rule_of(realworldqa.BENCHMARK, "vlmevalkit").judge([found], ["yes"])
        assert "table" in verdict.unscored


SEED = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four",
        "answer": "C", "question_id": "101669", "question_type_id": 5, "data_id": "1454426"}
JIGSAW = {"idx": "val_Jigsaw_1", "sub_task": "Jigsaw", "choices": ["left", "right"],
          "answer": "(B)", "prompt": "Which one?\n(A) left\n(B) right"}
CHINESE = {"index": 3, "question": "这是什么?", "A": "猫", "B": "狗", "answer": "B",
           "category": "x", "L2-category": "y"}


class TestSeedBench:
    def test_columns_of_the_hub(self):
        found, = seedbench.read(Row({**SEED, "question": "How many?", "data_type": "image",
                                     "image": [{"bytes": png(), "path": None}]}, "x[0]"))
        assert found.prompt == (None, "How many?\nA. One\nB. Two\nC. Three\nD. Four\nAnswer with "
                                      "the option's letter from the given choices directly.")
        assert (found.id, found.answers, found.group) == ("101669", ("C",), "1454426")
        assert found.tags == {"question_type_id": "5"} and found.images[0].stored() == png()

    def test_videos_are_no_part(self):
        with pytest.raises(SampleDropped, match="data_type video"):
            read(seedbench.BENCHMARK, **SEED, data_type="video")

    @pytest.mark.parametrize(("answer", "wanted"), [
        ("C", "C"), (" c. Three", "C"), ("Because", "B"), ("(C)", None), ("Three", None),
        ("", None)])
    def test_lmms_reads_the_first_character(self, answer, wanted):
        assert lmms_first_character(answer, ("",) * 4) == wanted


class TestBlink:
    def test_columns_of_the_hub(self):
        found = read(blink.BENCHMARK, **JIGSAW, image_1=b"one", image_2=b"two", image_3=None)
        assert found.prompt == (None, None, "Note: You only need to respond with A, B without "
                                "providing any additional information.\n" + JIGSAW["prompt"])
        assert [image.value for image in found.images] == [b"one", b"two"]
        assert (found.choices, found.answers, found.tags) == (
            ("left", "right"), ("B",), {"task": "Jigsaw"})

    def test_a_copy_of_the_hub_s_folders_is_read_by_a_pattern(self, tmp_path):
        for task in ("Counting", "Jigsaw"):
            for split in ("val", "test"):
                (tmp_path / task).mkdir(exist_ok=True)
                row = JIGSAW | {"idx": f"{split}_{task}", "image_1": {"bytes": png(), "path": ""}}
                pq.write_table(pa.Table.from_pylist([row]), tmp_path / task / f"{split}-0.parquet")
        task, = open_tasks([f"blink={tmp_path}/*/val-*.parquet"])
        assert sorted(q.id for q in task.questions) == ["val_Counting", "val_Jigsaw"]

    def test_hidden_answers_are_no_part(self):
        with pytest.raises(SampleDropped, match="hidden"):
            read(blink.BENCHMARK, **JIGSAW | {"answer": "hidden"})

    @pytest.mark.parametrize(("answer", "wanted"), [
        ("B", "B"), ("(b)", "B"), ("C.", "C"), ("D", None), ("The answer is (B).", "B"),
        ("(A) or (C)", "C"), ("Answer: c\nbecause", "C"), ("A then the answers b", "B"),
        ("As I see it", "A"), ("It is the second", None), ("answer D", "A"),
        ("(B) is right, the correct answer is (C)", "C"), ("", None)])
    def test_lmms(self, answer, wanted):
        assert lmms_blink_option(answer, ("",) * 3) == wanted

    def test_the_mean_over_tasks_is_the_authors(self):
        rows = [("a", "B"), ("a", "A"), ("a", "A"), ("b", "B")]
        asked = [read(blink.BENCHMARK, **JIGSAW | {"idx": str(n), "sub_task": task})
                 for n, (task, _) in enumerate(rows)]
        for name, headline in (("letter", "task_mean"), ("lmms", "accuracy")):
            rule = rule_of(blink.BENCHMARK, name)
            found = rule.figures(judged(rule, asked, [answer for _, answer in rows]))
            assert next(iter(found)) == headline
            assert found["task_mean"].value == pytest.approx((1 / 3 + 1) / 2)
            assert found["accuracy"].value == 0.5


class TestMMMUPro:
    OPTIONS = "['a cat', 'two dogs', 'a Bird', 'fish']"

    def test_prompt(self):
        found = read(mmmu_pro.BENCHMARK, question="Like <image 1>?", options=self.OPTIONS,
                     answer="C", id="test_Art_Theory_5", subject="Art_Theory", image=None,
                     image_1=b"one", topic_difficulty="Hard")
        assert found.prompt == ("Like ", None, "?\nA. a cat\nB. two dogs\nC. a Bird\nD. fish\n"
                                "Answer with the option letter from the given choices directly.")
        assert found.tags == {"discipline": "Art and Design", "subject": "Art_Theory",
                              "topic_difficulty": "Hard"}

    def test_in_view(self):
        found = read(mmmu_pro_vision.BENCHMARK, options=self.OPTIONS, answer="C", id="test_Art_5",
                     subject="Art")
        assert found.prompt[0] is None and "'Answer: $LETTER'" in found.prompt[1]
        assert (len(found.choices), found.answers) == (4, ("C",))
        lmms = rule_of(mmmu_pro_vision.BENCHMARK, "lmms")
        assert lmms.judge([found] * 3, ["C", "C.", "Answer: C"]) == [
            Verdict(1, "C"), Verdict(0, None), Verdict(0, None)]

    @pytest.mark.parametrize(("answer", "wanted"), [
        ("Answer: B", "B"), ("Answer: (D)", "D"), ("Answer: A or B", "B"), ("Answer: Both", "B"),
        ("So it is (C). Answer: none", "C"), ("Answer: A\nAnswer: C", "C"), ("B.", "B"),
        ("It is clearly two dogs in the picture", "B"), ("cat", None), ("A B C (D)", "D"),
        ("", None), ("Answer: two dogs", None)])
    def test_official(self, answer, wanted):
        assert read_pro_choice(answer, ("a cat", "two dogs", "a Bird", "fish")) == wanted

    def test_four_options_are_a_benchmark_of_their_own(self):
        assert mmmu_pro_4.BENCHMARK.name == "mmmu_pro_4"
        assert mmmu_pro_4.BENCHMARK.hub == ("MMMU/MMMU_Pro", "standard (4 options)", "test")


class TestMMBenchInChinese:
    def test_the_line_is_chinese_in_every_rotation(self, tmp_path):
        image = base64.b64encode(png()).decode()
        row = {**CHINESE, "hint": "提示", "image": image}
        (tmp_path / "cn.tsv").write_text("\t".join(row) + "\n" + "\t".join(map(str, row.values())))
        found = read_questions(mmbench_cn.BENCHMARK, DataSource(str(tmp_path / "cn.tsv")))
        assert [q.prompt[1] for q in found] == [
            "提示\n这是什么?\nA. 猫\nB. 狗\n请直接使用所提供的选项字母作为答案回答。",
            "提示\n这是什么?\nA. 狗\nB. 猫\n请直接使用所提供的选项字母作为答案回答。"]
        assert [q.answers for q in found] == [("B",), ("A",)]

    def test_ccbench_has_one_category(self):
        found = read(mmbench_cc.BENCHMARK, **{k: v for k, v in CHINESE.items() if "L2" not in k})
        assert found.tags == {"category": "x"}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("benchmark", [blink, mmmu_pro, mmmu_pro_vision, realworldqa, seedbench],
                         ids=lambda module: module.__name__.rpartition(".")[2])
def test_broken_answers(benchmark, name):
    row = {**JIGSAW, **SEED, "options": "['x1', 'x2', 'x3']", "answer": "A",
           "question": CARS}
    question = read(benchmark.BENCHMARK, **row)
    for rule in benchmark.BENCHMARK.rules:
        start = time.process_time()
        verdict, = rule.judge([question], [BROKEN[name]])
        assert time.process_time() - start < 1
        assert verdict.score == 0 or name in (
            "letters", "words", "hyphens", "spaces", "all letters")
