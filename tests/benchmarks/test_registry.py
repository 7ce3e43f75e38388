"""Finding benchmarks by name, and users' own in a few lines of YAML."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from zoo.images import images

from taid_vlm.benchmarks.question import Benchmark, Judged, Question
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.registry import benchmark_names, find_benchmark
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecipeError, RecordError, TaidError

Own = Callable[..., Benchmark]
ROWS = [
    {"id": "a", "query": "Which animal?", "image": "0.png", "options": ["cat", "dog"], "label": "B",
     "kind": "animals"},
    {"id": "b", "query": "How many?", "image": "1.png", "options": ["1", "2"], "label": "2",
     "kind": "counts"},
]


@pytest.fixture
def own(tmp_path: Path) -> Own:
    """Writes a YAML file and rows with two images beside it, and finds the benchmark."""
    for index, image in enumerate(images(2)):
        image.save(tmp_path / f"{index}.png")

    def made(rows: list[dict] | None = None, **keys: object) -> Benchmark:
        lines = [json.dumps(row) for row in (ROWS if rows is None else rows)]
        (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
        path = tmp_path / "charts.yaml"
        path.write_text(yaml.safe_dump({"type": "multiple_choice", "data": "rows.jsonl", **keys}))
        return find_benchmark(str(path))

    return made


def asked(benchmark: Benchmark) -> list[Question]:
    assert benchmark.hub is not None
    return read_questions(benchmark, DataSource(benchmark.hub[0], split=benchmark.hub[2]))


CHOICE = {"columns": {"question": "query", "answer": "label"}}


# ----- by name ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", benchmark_names())
def test_every_benchmark_of_the_package_is_whole(name: str) -> None:
    benchmark = find_benchmark(name)
    assert benchmark.name == name
    assert benchmark.title and benchmark.rules
    rules = [rule.name for rule in benchmark.rules]
    assert len(set(rules)) == len(rules)
    for rule in benchmark.rules:
        assert rule.version >= 1 and rule.source, rule.name
        assert rule.judge([], []) == []
        for figure in rule.figures([]).values():  # no questions: no points, or NaN
            assert figure.n == 0 and not figure.value > 0


@pytest.mark.parametrize(("given", "wanted"), [
    ("mmstr", "Did you mean 'mmstar'"), ("MMStar", "mmstar"), ("", "Valid: ai2d"),
    ("mmstar.py", "no benchmark"), ("charts.json", "charts.yaml")])
def test_an_unknown_name(given: str, wanted: str) -> None:
    with pytest.raises(TaidError, match=wanted):
        find_benchmark(given)


def test_only_the_benchmark_asked_for_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    mentioned = [name for name in sys.modules if name.startswith("taid_vlm.benchmarks.tasks.")]
    for name in mentioned:
        monkeypatch.delitem(sys.modules, name)
    assert "ai2d" in benchmark_names()
    find_benchmark("ai2d")
    assert [name for name in sys.modules if ".benchmarks.tasks." in name] == [
        "taid_vlm.benchmarks.tasks.ai2d"]


# ----- a user's own -------------------------------------------------------------------------


def test_multiple_choice(own: Own) -> None:
    benchmark = own(tags=["kind"], title="Charts", max_new_tokens=7, **CHOICE)
    assert (benchmark.name, benchmark.title, benchmark.max_new_tokens) == ("charts", "Charts", 7)
    assert benchmark.likelihood
    first, second = asked(benchmark)
    assert first.prompt == (None, "Which animal?\nA. cat\nB. dog\nAnswer with the option's letter "
                                  "from the given choices directly.")
    assert (first.id, first.choices, first.answers) == ("a", ("cat", "dog"), ("B",))
    assert first.tags == {"kind": "animals"}
    assert first.images[0].load().size == images(1)[0].size
    verdicts = benchmark.rules[0].judge([first], ["It is the dog."])
    assert (verdicts[0].score, verdicts[0].read) == (1.0, "B")
    assert second.id == "b"


@pytest.mark.parametrize(("answer", "options", "wanted"), [
    ("dog", ["cat", "dog"], "B"), (1, ["cat", "dog"], "B"), ("a", ["cat", "dog"], "A"),
    ("3", ["3", "4"], "A"), ("0", ["0", "1"], "A"), ("B", ["A", "B"], "B")])
def test_the_right_option_by_letter_place_or_text(own: Own, answer, options, wanted) -> None:
    rows = [{**ROWS[0], "label": answer, "options": options}]
    assert asked(own(rows, **CHOICE))[0].answers == (wanted,)


@pytest.mark.parametrize(("answer", "options", "message"), [
    ("1", ["1", "2"], r"'1' is option A by its text, but B as a letter or a place from 0"),
    ("A", ["B", "A"], r"'A' is option B by its text, but A as a letter"),
    ("fish", ["cat", "dog"], r"rows.jsonl:1: label = 'fish' is none of the 2 options"),
    ("cat", ["cat", "cat"], "none of the 2 options"),
    ("A", ["cat"], "1 options in 'options'"),
    ("A", None, "0 options in 'options' or A, B, C"),
])
def test_options_that_do_not_fit(own: Own, answer, options, message) -> None:
    rows = [{**ROWS[0], "label": answer, "options": options}]
    with pytest.raises(RecordError, match=message):
        asked(own(rows, **CHOICE))


def test_short_answers(own: Own) -> None:
    rows = [{"question": "Year?", "answer": ["1999", "in 1999"], "image": "0.png"},
            {"question": "Sum?", "answer": "1,000", "image": "1.png"}]
    benchmark = own(rows, type="short_answer", prompt="Q: {question} {{exactly}}")
    first, second = asked(benchmark)
    assert first.prompt == (None, "Q: Year? {exactly}")
    assert (first.id, second.id) == ("0", "1")
    assert first.answers == ("1999", "in 1999") and second.answers == ("1,000",)
    rule = benchmark.rules[0]
    assert [v.score for v in rule.judge([first, second], ["In 1999.", "1"])] == [1, 0]
    assert not benchmark.likelihood


def test_yes_or_no(own: Own) -> None:
    rows = [{"question": f"Is it {n}?", "answer": answer, "image": "0.png", "group": "g"}
            for n, answer in enumerate(["Yes", "no", True, False, 1, "0"])]
    benchmark = own(rows, type="yes_no")
    questions = asked(benchmark)
    assert [q.answers[0] for q in questions] == ["yes", "no"] * 3
    assert questions[0].prompt == (None, "Is it 0?\nPlease answer yes or no.")
    assert {q.group for q in questions} == {"g"}
    rule = benchmark.rules[0]
    answers = ["Yes, it is.", "", "no", "yes", "yes", "perhaps"]
    verdicts = rule.judge(questions, answers)
    figures = rule.figures([Judged(*each) for each in
                            zip(questions, answers, verdicts, strict=True)])
    assert figures["accuracy"].value == pytest.approx(2 / 6)
    assert [v.read for v in verdicts] == ["yes", None, "no", "yes", "yes", None]


def test_captions(own: Own) -> None:
    rows = [{"answer": ["a red square", "one square"], "image": "0.png"},
            {"answer": "a blue circle", "images": ["1.png", "0.png"]}]
    benchmark = own(rows, type="caption")
    first, second = asked(benchmark)
    assert first.prompt == (None, "Provide a one-sentence caption for the provided image.")
    assert second.prompt[:2] == (None, None) and len(second.images) == 2
    scores = [v.score for v in benchmark.rules[0].judge([first, second], ["a red square", "dog"])]
    assert scores[0] > scores[1] == 0


def test_an_image_stands_where_its_mark_is(own: Own) -> None:
    rows = [{**ROWS[0], "images": ["0.png", "1.png"], "query": "Is <image> like <image>?"}]
    rows[0].pop("image")
    assert asked(own(rows, prompt="{question} {id}", **CHOICE))[0].prompt == (
        "Is ", None, " like ", None, "? a")
    with pytest.raises(RecordError, match="more image marks in the text than images"):
        asked(own([{**ROWS[0], "query": "Is <image> like <image>?"}], **CHOICE))


def test_rows_without_an_image_are_asked_without(own: Own) -> None:
    plain = {key: value for key, value in ROWS[0].items() if key != "image"}
    rows = [ROWS[1], plain, *({**plain, "id": str(i), "image": nothing}
                              for i, nothing in enumerate(("", None, [None], [])))]
    benchmark = own(rows, **CHOICE)
    for _ in range(2):
        questions = asked(benchmark)
        assert [len(q.images) for q in questions] == [1, 0, 0, 0, 0, 0]
        assert [None in q.prompt for q in questions] == [True, *[False] * 5]
    with pytest.raises(RecordError, match=r"rows.jsonl:1: column 'image' is missing"):
        asked(own(rows[1:], **CHOICE))


def test_questions_about_videos(own: Own) -> None:
    rows = [{**ROWS[0], "clip": ["0.png", "1.png"], "query": "Is <image> in <video>?"},
            {**ROWS[1], "clip": {"frames": ["1.png", "0.png", "1.png"]}}]
    columns = {**CHOICE["columns"], "video": "clip"}
    first, second = asked(own(rows, **{**CHOICE, "columns": columns}))
    assert [image.kind for image in first.images] == ["image", "video"]
    assert first.prompt[:4] == ("Is ", None, " in ", None)
    assert [image.kind for image in second.images] == ["image", "video"]
    assert second.images[1].load().total == 3


def test_questions_of_text_alone(own: Own) -> None:
    rows = [{key: value for key, value in ROWS[0].items() if key != "image"}]
    with pytest.raises(RecordError, match=r"rows.jsonl:1: column 'image' is missing"):
        asked(own(rows, **CHOICE))
    question = asked(own(rows, images=False, **CHOICE))[0]
    assert question.images == () and question.prompt[0].startswith("Which animal?")


@pytest.mark.parametrize(("keys", "message"), [
    ({"type": "multiple_choices"}, r"charts.yaml: type = .* Did you mean 'multiple_choice'"),
    ({"colums": {}}, r"charts.yaml: benchmark has no key 'colums'. Did you mean 'columns'"),
    ({"columns": {"questin": "q"}}, "columns has no key 'questin'. Did you mean 'question'"),
    ({"columns": {"question": 3}}, "columns.question = 3, but it must be a column's name"),
    ({"columns": "question"}, "columns must be a mapping, got 'question'"),
    ({"tags": "kind"}, "tags = 'kind', but it must be a list of columns"),
    ({"images": "no"}, "images = 'no', but it must be true or false"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0, but it must be at least 1"),
    ({"prompt": "  "}, "prompt is blank"),
    ({"prompt": "{question"}, r"prompt: .*; write \{\{ and \}\} for braces"),
    ({"prompt": "{}"}, r"prompt: \{\} must be a column's name"),
    ({"prompt": "{question!r:>9}"}, r"must be a column's name alone"),
    ({"name": "a/b"}, "name = 'a/b', but it must be letters"),
    ({"data": None}, "charts.yaml: data = None, but it must be text"),
])
def test_a_mistake_in_the_file(own: Own, keys: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        own(**keys)


def test_a_mistake_in_the_data(own: Own) -> None:
    with pytest.raises(RecordError, match=r"rows.jsonl:1: column 'answer' is missing \(found: id,"):
        asked(own())
    with pytest.raises(RecordError, match=r"'kinds' is missing .* Did you mean 'kind'"):
        asked(own(tags=["kinds"], **CHOICE))
    with pytest.raises(RecordError, match=r"'queri' is missing .* Did you mean 'query'"):
        asked(own(prompt="{queri}", **CHOICE))
    with pytest.raises(TaidError, match="holds no questions"):
        asked(own([], **CHOICE))
    with pytest.raises(TaidError, match=r"rows.jsonl' does not exist|rowz.jsonl' does not exist"):
        asked(own(data="rowz.jsonl", **CHOICE))


def test_files_that_are_no_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    with pytest.raises(RecipeError, match="does not exist"):
        find_benchmark(str(path))
    for text, message in (("- a", "must be a mapping"), ("type: [", "not valid YAML"),
                          ("type: yes_no\ntype: caption", "stands twice"),
                          ("", "must be a mapping"), ("type: yes_no", "'data' is missing")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            find_benchmark(str(path))
    path = tmp_path / "mmstar.yaml"
    path.write_text("type: yes_no\ndata: x.jsonl")
    with pytest.raises(RecipeError, match="'mmstar' is a benchmark of the package"):
        find_benchmark(str(path))


def test_data_are_found_from_the_working_directory_or_beside_the_file(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own(**CHOICE).hub == (str(tmp_path / "rows.jsonl"), None, "train")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text("")
    monkeypatch.chdir(elsewhere)
    assert own(**CHOICE).hub == (str(elsewhere / "rows.jsonl"), None, "train")
    hub = own(data="someone/charts", subset="human", split="test").hub
    assert hub == ("someone/charts", "human", "test")
