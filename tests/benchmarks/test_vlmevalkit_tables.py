"""VLMEvalKit's own tables (TSV) of the benchmarks here: its columns, shared images, lists."""

import base64
import csv
from collections import Counter

import pytest
from benchmarks.test_rows import png

from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.registry import find_benchmark
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError

ONE, TWO = (base64.b64encode(png(seed)).decode() for seed in (1, 2))
OPTIONS = {"A": "cat", "B": "dog", "C": "fish"}
HINT = ("Hint: Please answer the question requiring a floating-point number with one decimal place "
        "and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How long?")


def questions(folder, name, *rows, left_out=None, file="Table.tsv"):
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / file).open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return read_questions(find_benchmark(name), DataSource(str(folder / file)), left_out=left_out)


# a table's columns, and an answer that is right under the first rule
TABLES = {
    "ai2d": ({"question": "What?", **OPTIONS, "answer": "B", "category": "x"}, "B"),
    "blink": ({"question": "What?", **OPTIONS, "answer": "B", "category": "Jigsaw"}, "B"),
    "chartqa": ({"question": "What?", "answer": "3", "split": "test_human"}, "3"),
    "coco_caption": ({"question": "", "answer": "['a cat', 'a dog']"}, "a cat"),
    "docvqa": ({"question": "What?", "answer": "['a b']", "questionId": 3, "docId": 4,
                "question_types": "['form']"}, "a b"),
    "gqa": ({"question": "What?", "answer": "cat"}, "cat"),
    "hallusion_bench": ({"index": "Hallusion_VD_illusion_0_1_2", "category": "VD",
                         "l2-category": "illusion", "question": "Is it?", "answer": "Yes"}, "yes"),
    "infovqa": ({"question": "What?", "answer": "['a b']", "image_url": "u"}, "a b"),
    "math_vision": ({"question": "What?", "choices": "['1', '2']", "answer": "B",
                     "category": "algebra"}, "\\boxed{B}"),
    "math_vista": ({"question": HINT, "answer": "1.5", "question_type": "free_form",
                    "answer_type": "float", "choices": "[]", "task": "x", "skills": "['y']"},
                   "1.52"),
    "mmbench": ({"question": "What?", "hint": "", **OPTIONS, "answer": "B", "category": "x",
                 "l2-category": "y"}, "B"),
    "mme": ({"question": "Is it?", "answer": "Yes", "category": "color", "image_path": "1.jpg"},
            "Yes"),
    "mmmu": ({"id": "validation_Math_1", "question": "What is <image 1>?", **OPTIONS,
              "answer": "B", "split": "validation", "question_type": "multiple-choice",
              "subfield": "x", "category": "Math", "l2-category": "Science"}, "B"),
    "mmmu_pro": ({"id": "test_Math_1", "question": "What is <image 1>?", **OPTIONS, "answer": "B",
                  "category": "Math"}, "Answer: B"),
    "mmmu_pro_vision": ({"id": "test_Math_1", "answer": "B", "category": "Math"}, "Answer: B"),
    "mmstar": ({"question": "What?", **OPTIONS, "answer": "B", "category": "x",
                "l2_category": "y"}, "B"),
    "ocrbench": ({"question": "What?", "answer": "['a b']", "category": "Doc-oriented VQA"},
                 "an A B"),
    "ocrbench_v2": ({"question": "What?", "answer": "['a b']", "category": "cognition VQA en",
                     "eval": "without eval", "bbox": "without bbox",
                     "content": "without content"}, "an A B"),
    "pope": ({"question": "Is it?", "answer": "Yes", "category": "popular"}, "Yes"),
    "realworldqa": ({"question": "What?", **OPTIONS, "answer": "B"}, "B"),
    "scienceqa": ({"question": "What?", "hint": "", **OPTIONS, "answer": "B", "category": "x"},
                  "B"),
    "textvqa": ({"question": "what?", "answer": repr(["a b"] * 10)}, "a b"),
    "seedbench": ({"question": "What?", **OPTIONS, "answer": "B", "category": "x"}, "B"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_and_judged(tmp_path, name):
    """Two rows of which the second names the first by its index in place of an image."""
    row, answer = TABLES[name]
    first = {"index": "5", **row, "image": ONE}
    number = first["index"].rpartition("_")
    second = first | {"index": f"{number[0]}{number[1]}9", "image": first["index"]}
    second |= {"id": f"{row['id']}0"} if "id" in row else {}
    second |= {"questionId": 9} if "questionId" in row else {}
    second |= {"image_path": "2.jpg"} if "image_path" in row else {}
    found = questions(tmp_path, name, first, second)
    assert len(found) == (6 if name == "mmbench" else 2)
    assert {question.images[0].stored() for question in found} == {png(1)}
    if name != "coco_caption":  # CIDEr weighs words by how few images of the data have them
        plain = [q for q in found if q.answers == found[0].answers][:2]
        verdicts = find_benchmark(name).rules[0].judge(plain, [answer] * len(plain))
        assert all(v.score > 0.9 and not v.unscored for v in verdicts)


def test_every_benchmark_with_a_table_of_vlmevalkit_is_above():
    from taid_vlm.benchmarks.registry import benchmark_names

    others = {"mmbench_cc", "mmbench_cn", "mmmu_pro_4",  # as mmbench and mmmu_pro
              "charxiv_descriptive", "charxiv_reasoning", "mmvet",  # with a judge: test_judge.py
              "videomme",  # below
              "nlvr", "open_ended", "vqav2"}  # VLMEvalKit has no such table
    assert {*TABLES, *others} == {*benchmark_names()}


class TestMMMU:
    def test_pictures_are_a_list_and_stand_where_their_tags_are(self, tmp_path):
        row, _ = TABLES["mmmu"]
        found, = questions(tmp_path, "mmmu", {
            **row, "question": "<image 2> and <image 1>", "image": repr([ONE, TWO])})
        assert found.prompt[:3] == (None, " and ", None)
        assert [image.stored() for image in found.images] == [png(2), png(1)]
        assert found.id == "validation_Math_1" and found.tags == {
            "discipline": "Science", "subject": "Math", "subfield": "x",
            "question_type": "multiple-choice"}

    def test_a_list_is_found_through_another_row_s_index(self, tmp_path):
        row, _ = TABLES["mmmu"]
        first = {"index": "1", **row, "image": repr([ONE, TWO])}
        found = questions(tmp_path, "mmmu", first, first | {
            "index": "2", "id": "validation_Math_2", "image": "1"})
        assert [[image.stored() for image in q.images] for q in found] == [[png(2), png(1)]] * 2

    def test_rows_of_dev_are_told_and_left_out(self, tmp_path):
        row, _ = TABLES["mmmu"]
        left_out = Counter()
        found = questions(tmp_path, "mmmu", {"index": 1, **row, "image": ONE}, {
            "index": 2, **row, "split": "dev", "image": ONE}, left_out=left_out)
        assert len(found) == 1 and left_out == {"split dev": 1}

    def test_open_questions_have_no_options(self, tmp_path):
        row, _ = TABLES["mmmu"]
        found, = questions(tmp_path, "mmmu", {
            **row, "A": "", "B": "", "C": "", "answer": "['24/7', '3.429']",
            "question_type": "open", "image": ONE})
        assert (found.choices, found.answers) == ((), ("24/7", "3.429"))

    def test_a_tag_without_a_picture(self, tmp_path):
        row, _ = TABLES["mmmu"]
        with pytest.raises(RecordError, match=r"'image_3' is missing, which '<image 3>'"):
            questions(tmp_path, "mmmu", {**row, "question": "<image 3>", "image": ONE})


class TestMathVista:
    def test_options_and_their_letter(self, tmp_path):
        row, _ = TABLES["math_vista"]
        row = row | {"question_type": "multi_choice", "answer_type": "text",
                     "choices": "['1 cm', '2']", "image": ONE}
        by_text, = questions(tmp_path, "math_vista", {**row, "answer": "2"})
        by_letter, = questions(tmp_path, "math_vista", {
            **row, "answer": "2 cm", "answer_option": "B"})
        assert by_text.answers == by_letter.answers == ("B",)

    def test_hint_and_decimals_are_the_question_s(self, tmp_path):
        row, _ = TABLES["math_vista"]
        found, = questions(tmp_path, "math_vista", {"index": 7, **row, "image": ONE})
        assert found.prompt == (None, HINT)
        assert (found.id, found.extra["precision"]) == ("7", 1)
        assert found.tags == {"question_type": "free_form", "answer_type": "float", "task": "x",
                              "skill: y": "yes"}


class TestHallusionBench:
    def test_numbers_are_the_end_of_the_index(self, tmp_path):
        row, _ = TABLES["hallusion_bench"]
        found, = questions(tmp_path, "hallusion_bench", {**row, "image": ONE})
        assert (found.id, found.group) == ("VD_illusion_0_1_2", "VD_illusion_0")
        assert found.prompt == (None, "Is it? Please answer yes or no.")

    def test_the_line_is_not_said_twice(self, tmp_path):
        row, _ = TABLES["hallusion_bench"]
        asked = "Is it? Please answer yes or no."
        found, = questions(tmp_path, "hallusion_bench", {**row, "question": asked, "image": ONE})
        assert found.prompt[1] == asked

    def test_rows_without_an_image_are_no_part(self, tmp_path):
        row, _ = TABLES["hallusion_bench"]
        left_out = Counter()
        found = questions(tmp_path, "hallusion_bench", {**row, "image": ONE}, {
            **row, "index": "x_VS_chart_0_0_2", "image": ""}, left_out=left_out)
        assert len(found) == 1 and left_out == {"no image": 1}


def test_video_mme(tmp_path):
    found, = questions(tmp_path, "videomme", {
        "index": 3, "video": "fFjv93ACGo8", "video_path": "./video/fFjv93ACGo8.mp4",
        "duration": "short", "domain": "Knowledge", "candidates": "['A. Apples.', 'B. Candles.']",
        "sub_category": "x", "task_type": "y", "question": "When?", "answer": "B"})
    assert (found.id, found.choices, found.answers) == ("3", ("Apples.", "Candles."), ("B",))
    assert found.group == "fFjv93ACGo8"
    assert found.images[0].value == tmp_path / "video" / "fFjv93ACGo8.mp4"


class TestFiles:
    """`image_path` where a table holds no images: beside it, or where VLMEvalKit puts them."""

    @pytest.mark.parametrize("place", ["one.png", "images/Table/one.png"])
    def test_where_they_lie(self, tmp_path, place):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(png(1))
        row, _ = TABLES["ai2d"]
        first = {"index": "1", **row, "image_path": "one.png"}
        found = questions(tmp_path, "ai2d", first, first | {"index": "2", "image_path": "1"})
        assert [q.images[0].load().size for q in found] == [found[0].images[0].load().size] * 2
        assert {q.images[0].stored() for q in found} == {tmp_path / place}

    def test_several(self, tmp_path):
        for name, seed in (("a.png", 1), ("b.png", 2)):
            (tmp_path / name).write_bytes(png(seed))
        row, _ = TABLES["blink"]
        found, = questions(tmp_path, "blink", {**row, "image_path": "['a.png', 'b.png']"})
        assert [image.stored().name for image in found.images] == ["a.png", "b.png"]
        with pytest.raises(RecordError, match="image_path holds 2 images; there must be one"):
            questions(tmp_path, "ai2d", {**TABLES["ai2d"][0], "image_path": "['a.png', 'b.png']"})
