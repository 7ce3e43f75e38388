"""Benchmarks with options: prompts, right letters, rotations, figures against naive references."""

import base64
import io
import math
import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from zoo.images import images

from taid_vlm.benchmarks.choices import letter_of, options_of
from taid_vlm.benchmarks.prompts import LETTER_LINE
from taid_vlm.benchmarks.question import Judged
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.benchmarks.tasks import ai2d, mmbench, mmstar, nlvr, scienceqa
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError, TaidError

NLVR = Path(os.environ.get("TAID_VLM_EXTRA_DATA", "/nonexistent")) / "nlvr_test.parquet"


def png() -> bytes:
    buffer = io.BytesIO()
    images(1)[0].save(buffer, "PNG")
    return buffer.getvalue()


def row(**columns) -> Row:
    return Row({"image": png(), **columns}, "data.jsonl:1", number=7)


def judged(rule, questions, answers) -> list[Judged]:
    return [Judged(q, a, v) for q, a, v in
            zip(questions, answers, rule.judge(questions, answers), strict=True)]


def rule_of(benchmark, name):
    return next(rule for rule in benchmark.rules if rule.name == name)


# ----- options and answers ------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "wanted"), [
    ("B", "B"), ("b", "B"), (1, "B"), ("1", "B"), (1.0, "B"), ("0", "A"), (" C ", "C")])
def test_the_right_letter(answer, wanted) -> None:
    assert letter_of(row(answer=answer), ("x", "y", "z")) == wanted


@pytest.mark.parametrize("answer", ["D", "3", "-1", "AB", "x", "1.5", "²"])
def test_an_answer_that_is_no_option_is_refused(answer) -> None:
    with pytest.raises(RecordError, match=r"data.jsonl:1: answer = .* none of the 3 .* A to C"):
        letter_of(row(answer=answer), ("x", "y", "z"))


def test_options_come_as_a_list_a_written_list_or_columns() -> None:
    wanted = ("a cat", "no, two")
    assert options_of(row(options=["a cat", "no, two"]), "options") == wanted
    assert options_of(row(options="['a cat', 'no, two']"), "options") == wanted
    assert options_of(row(A="a cat", B="no, two", D="ignored, C is absent"), "options") == wanted
    with pytest.raises(RecordError, match=r"1 options in 'options'; there must be 2 to 26"):
        options_of(row(options=["one"]), "options")
    with pytest.raises(RecordError, match="0 options in 'options' or A, B, C"):
        options_of(row(), "options")
    assert len(options_of(row(options=[*LETTERS]), "options")) == 26
    with pytest.raises(RecordError, match="27 options"):
        options_of(row(options=[*LETTERS, "more"]), "options")


@pytest.mark.parametrize("answer", ["A B C D", "", "no idea", "Z", "x" * 10_000])
def test_what_cannot_be_read_is_wrong_and_told_apart(answer) -> None:
    question = ai2d.BENCHMARK.read(row(question="?", options=["cat", "dog"], answer="0"))[0]
    for rule in ai2d.BENCHMARK.rules:
        verdict = rule.judge([question], [answer])[0]
        assert (verdict.score, verdict.read) == (0.0, None), rule.name


# ----- MMBench ------------------------------------------------------------------------------


def mmbench_row(index: int, options=("cat", "dog", "bird"), answer="B", **columns) -> Row:
    return row(index=index, question="What is it?", answer=answer,
               **dict(zip("ABCD", options, strict=False)), **columns)


def test_mmbench_prompt() -> None:
    question = mmbench.read(mmbench_row(5, hint="Look left.", category="animals",
                                        **{"l2-category": "perception"}))[0]
    assert question.prompt == (None, "Look left.\nWhat is it?\nA. cat\nB. dog\nC. bird\n"
                                     + LETTER_LINE)
    assert (question.id, question.group, question.answers) == ("5", "5", ("B",))
    assert question.tags == {"category": "animals", "l2-category": "perception"}


def test_the_hubs_copy_writes_nan_for_nothing() -> None:
    question = mmbench.read(mmbench_row(5, ("cat", "dog", "nan", "nan"), hint="nan",
                                        **{"L2-category": "perception"}))[0]
    assert question.choices == ("cat", "dog")
    assert "nan" not in question.prompt[1]
    assert question.tags == {"l2-category": "perception"}


def test_rotations_are_made_where_the_data_have_none() -> None:
    first = mmbench.read(mmbench_row(5))
    asked = mmbench.with_rotations(first)
    assert [q.id for q in asked] == ["5", "1000005", "2000005"]
    assert asked[0] == first[0]
    assert {q.group for q in asked} == {"5"}
    for question in asked:
        assert question.choices[LETTERS.index(question.answers[0])] == "dog"
        assert question.prompt[1].count(f"{question.answers[0]}. dog") == 1
        assert question.images == first[0].images
    for place in range(3):  # every option once in every place
        assert {q.choices[place] for q in asked} == {"cat", "dog", "bird"}


def test_rotations_of_the_data_are_used() -> None:
    rows = [mmbench_row(5), mmbench_row(1_000_005, ("dog", "bird", "cat"), "A"), mmbench_row(6)]
    read = [q for each in rows for q in mmbench.read(each)]
    asked = mmbench.with_rotations(read)
    assert [q.id for q in asked] == ["5", "1000005", "6", "1000006", "2000006"]
    assert asked[:2] == read[:2]


def naive_circular(lines) -> dict[str, float]:
    """VLMEvalKit's figure, by loops: lines of (index, right letter, what was read, category)."""
    groups = defaultdict(list)
    for index, right, read, category in lines:
        groups[index % 1_000_000].append((right == read, category))
    hits = [(all(hit for hit, _ in rows), rows[0][1]) for rows in groups.values()]
    figures = {"all": sum(hit for hit, _ in hits) / len(hits)}
    for name in {category for _, category in hits}:
        part = [hit for hit, category in hits if category == name]
        figures[name] = sum(part) / len(part)
    plain = [right == read for index, right, read, _ in lines if index < 1_000_000]
    return {**figures, "vanilla": sum(plain) / len(plain)}


@pytest.mark.parametrize("rule", mmbench.BENCHMARK.rules, ids=lambda rule: rule.name)
def test_circular_figures_are_as_a_naive_loop_has_them(rule) -> None:
    draw = random.Random(0)
    read = [mmbench.read(mmbench_row(index, PETS[:number], draw.choice(LETTERS[:number]),
                                     category=draw.choice("xy")))[0]
            for index, number in enumerate(draw.choices((2, 3, 4), k=60))]
    questions = mmbench.with_rotations(read)
    answers = [q.answers[0] if draw.random() < 0.8 else draw.choice(["A", "B", "?", ""])
               for q in questions]
    lines = [(int(q.id), q.answers[0], answer, q.tags["category"])
             for q, answer in zip(questions, answers, strict=True)]
    wanted = naive_circular(lines)
    found = judged(rule, questions, answers)
    figures = rule.figures(found)
    assert list(figures) == ["circular", "vanilla"]
    assert figures["circular"].value == pytest.approx(wanted["all"], abs=1e-12)
    assert figures["vanilla"].value == pytest.approx(wanted["vanilla"], abs=1e-12)
    assert figures["circular"].n == figures["vanilla"].n == 60
    p = wanted["all"]
    assert figures["circular"].stderr == pytest.approx(math.sqrt(p * (1 - p) / 59), abs=1e-12)
    for name in "xy":
        part = rule.figures([j for j in found if j.question.tags["category"] == name])
        assert part["circular"].value == pytest.approx(wanted[name], abs=1e-12)


PETS = ("cat", "dog", "bird", "fish")


def test_circular_figures_of_one_question_of_none_and_of_rotations_alone() -> None:
    assert math.isnan(mmbench.figures([])["circular"].value)
    questions = mmbench.with_rotations(mmbench.read(mmbench_row(5)))
    rule = mmbench.BENCHMARK.rules[0]
    one = rule.figures(judged(rule, questions, ["B", "A", "C"]))
    assert one["circular"].value == 1 and math.isnan(one["circular"].stderr)
    wrong = rule.figures(judged(rule, questions, ["B", "A", "B"]))
    assert (wrong["circular"].value, wrong["vanilla"].value) == (0, 1)
    rotated = rule.figures(judged(rule, questions[1:], ["A", "C"]))
    assert rotated["circular"].value == 1 and math.isnan(rotated["vanilla"].value)


def test_mmbench_as_vlmevalkit_has_it(tmp_path) -> None:
    """A TSV with images in base64, which rotations share by the index of their first."""
    image = base64.b64encode(png()).decode()
    lines = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tl2-category",
             f"241\tWhat?\t\tcat\tdog\t\t\tA\tx\t{image}\ty",
             "1000241\tWhat?\t\tdog\tcat\t\t\tB\tx\t241\ty",
             f"77\tNone?\ta hint\t2\tNone\t1\t\tB\tx\t{image}\ty"]
    (tmp_path / "mm.tsv").write_text("\n".join(lines) + "\n")
    questions = read_questions(mmbench.BENCHMARK, DataSource(str(tmp_path / "mm.tsv")))
    assert [q.id for q in questions] == ["241", "1000241", "77", "1000077", "2000077"]
    assert [q.images[0].stored() == png() for q in questions] == [True] * 5
    assert questions[2].choices == ("2", "None", "1")
    assert questions[0].images[0].load().size == questions[1].images[0].load().size


# ----- MMStar -------------------------------------------------------------------------------


@pytest.mark.parametrize(("question", "wanted"), [
    ("Which?\nOptions: A: On the book., B: Beneath the cat., C: Yes, D: No, it is not",
     ("On the book.", "Beneath the cat.", "Yes", "No, it is not")),
    ("Hint: give the letter, e.g., A, B, C, D, at the end.\nQuestion: Which?\nChoices:\n(A) 10 cm\n"
     "(B) 20 cm\n(C) 5 (approx.)", ("10 cm", "20 cm", "5 (approx.)")),
    ("Find A.\nOptions:\nA. 3\nB. 4", ("3", "4")),
    ("Which? A) left B) right", ("left", "right")),
    ("Options: A: has A: inside, B: last", ("has A: inside", "last")),
    ("What is A?", ()), ("Options: A: alone", ()), ("Options: A: , B: x", ()), ("", ()),
])
def test_options_within_a_question(question, wanted) -> None:
    assert mmstar.inline_options(question) == wanted


def test_mmstar_questions() -> None:
    text = "Which?\nOptions: A: cat, B: dog"
    question = mmstar.read(row(index=3, question=text, answer="B", category="math",
                               l2_category="geometry"))[0]
    assert question.prompt == (None, f"{text}\n{LETTER_LINE}")
    assert (question.id, question.choices, question.answers) == ("3", ("cat", "dog"), ("B",))
    assert question.tags == {"category": "math", "l2_category": "geometry"}
    columns = mmstar.read(row(index=3, question="Which?", A="cat", B="dog", answer="B"))[0]
    assert columns.prompt[1] == f"Which?\nA. cat\nB. dog\n{LETTER_LINE}"
    unknown = mmstar.read(row(index=3, question="Which?", answer="D"))[0]
    assert (unknown.choices, unknown.answers) == (mmstar.UNKNOWN, ("D",))
    for rule in mmstar.BENCHMARK.rules:
        assert rule.judge([unknown], ["D"])[0].score == 1
        assert rule.judge([unknown], ["E"])[0].read is None


def test_mmstar_figures_are_as_naive_loops_have_them() -> None:
    draw = random.Random(1)
    parts = [draw.choice(["geometry"] * 5 + ["biology", "recognition"]) for _ in range(50)]
    questions = [mmstar.read(row(index=i, question="?\nOptions: A: cat, B: dog", answer="A",
                                 l2_category=part))[0] for i, part in enumerate(parts)]
    answers = [draw.choice("AAB?") for _ in parts]
    by_part = defaultdict(list)
    for part, answer in zip(parts, answers, strict=True):
        by_part[part].append(float(answer == "A"))
    over_questions = answers.count("A") / 50
    over_parts = sum(sum(x) / len(x) for x in by_part.values()) / len(by_part)
    assert over_questions != over_parts
    variances = [sum((x - sum(s) / len(s)) ** 2 for x in s) / (len(s) - 1) / len(s)
                 for s in by_part.values()]
    for rule in mmstar.BENCHMARK.rules:
        figures = rule.figures(judged(rule, questions, answers))
        assert figures["accuracy"].value == pytest.approx(over_questions, abs=1e-12)
        assert figures["category_mean"].value == pytest.approx(over_parts, abs=1e-12)
        assert figures["category_mean"].stderr == pytest.approx(
            math.sqrt(sum(variances)) / len(by_part), abs=1e-12)
        headline = "category_mean" if rule.name in ("official", "lmms") else "accuracy"
        assert next(iter(figures)) == headline
    assert math.isnan(mmstar.figures([])["category_mean"].value)


# ----- AI2D, ScienceQA, NLVR ----------------------------------------------------------------


def test_ai2d_from_the_hub_and_from_vlmevalkit() -> None:
    hub = ai2d.read(row(question="Which?", options=["moon", "sun"], answer="1"))[0]
    kit = ai2d.read(row(index=4, question="Which?", A="moon", B="sun", answer="B",
                        category="space"))[0]
    assert hub.prompt == kit.prompt == (None, f"Which?\nA. moon\nB. sun\n{LETTER_LINE}")
    assert hub.answers == kit.answers == ("B",)
    assert (hub.id, kit.id) == ("7", "4")
    assert kit.tags == {"category": "space"}


def scienceqa_rows(pictures) -> list[dict]:
    picture = {"bytes": png(), "path": None}
    return [{"question": f"Which {n}?", "choices": ["a", "b"], "answer": n % 2, "hint": "Look." * n,
             "subject": "natural science", "image": picture if seen else None}
            for n, seen in enumerate(pictures)]


def write_parquet(path, rows) -> DataSource:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return DataSource(str(path))


def test_scienceqa_counts_the_rows_it_leaves_out(tmp_path) -> None:
    source = write_parquet(tmp_path / "sqa.parquet", scienceqa_rows([1, 0, 1, 0, 0]))
    left_out = Counter()
    questions = read_questions(scienceqa.BENCHMARK, source, left_out=left_out)
    assert left_out == {"no image": 3}
    assert [q.id for q in questions] == ["0", "2"]
    assert questions[0].prompt == (None, f"Which 0?\nA. a\nB. b\n{LETTER_LINE}")
    assert questions[1].prompt[1].startswith("Context: Look.Look.\nWhich 2?\n")
    assert questions[1].answers == ("A",)


def test_scienceqa_without_any_picture(tmp_path) -> None:
    source = write_parquet(tmp_path / "sqa.parquet", [
        {**each, "image": ""} for each in scienceqa_rows([0, 0])])
    with pytest.raises(TaidError, match=r"holds no questions \(rows left out: 2 with no image\)"):
        read_questions(scienceqa.BENCHMARK, source)


def nlvr_row(**columns) -> Row:
    return row(**{"statement": "There is a box.", "label": "yes", "identifier": "12-3",
                  "n_objects": 4, **columns})


def test_nlvr_questions() -> None:
    question = nlvr.read(nlvr_row())[0]
    assert question.prompt[1].endswith("Please answer yes or no.")
    assert (question.id, question.group, question.answers) == ("12-3", "12", ("yes",))
    assert nlvr.read(nlvr_row(label="false"))[0].answers == ("no",)
    rule = nlvr.BENCHMARK.rules[0]
    assert [rule.judge([question], [a])[0].read for a in ("Yes.", "No!", "yes and no", "")] == [
        "yes", "no", None, None]
    with pytest.raises(RecordError, match="maybe"):
        nlvr.read(nlvr_row(label="maybe"))


@pytest.mark.skipif(not NLVR.exists(), reason="TAID_VLM_EXTRA_DATA lacks nlvr_test.parquet")
def test_nlvr_as_it_is() -> None:
    questions = read_questions(nlvr.BENCHMARK, DataSource(str(NLVR)))
    assert (len(questions), len({q.group for q in questions})) == (990, 266)
    assert questions[0].images[0].load().size == (400, 100)
    rule = nlvr.BENCHMARK.rules[0]
    figures = rule.figures(judged(rule, questions, ["Yes."] * 990))
    assert figures["accuracy"].value == pytest.approx(556 / 990)
    assert (figures["recall"].value, figures["yes_ratio"].value) == (1, 1)


@pytest.mark.parametrize("task", [mmbench, mmstar, ai2d, scienceqa])
def test_questions_can_be_answered_by_likelihood(task) -> None:
    """The texts of the options, and the letter of the right one."""
    question = task.BENCHMARK.read(row(
        index=1, question="Which?\nOptions: A: cat, B: dog", options=["cat", "dog"],
        choices=["cat", "dog"], A="cat", B="dog", answer="B"))[0]
    assert task.BENCHMARK.likelihood
    assert question.choices == ("cat", "dog") and question.answers == ("B",)
    for rule in task.BENCHMARK.rules:
        assert [rule.judge([question], [letter])[0].score for letter in "AB"] == [0, 1], rule.name
