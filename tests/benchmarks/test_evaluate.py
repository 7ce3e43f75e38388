"""A benchmark carried out: the same files however it was interrupted, batched or asked again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from benchmarks.quiz import QUIZ, first_letter, questions, timeless
from PIL import Image
from zoo import build, save
from zoo.images import images

from taid_vlm.benchmarks import evaluate as module
from taid_vlm.benchmarks.answering import Answer, Generating
from taid_vlm.benchmarks.asking import Asking, Task, open_task
from taid_vlm.benchmarks.candidates import Candidate, distinct, parse_candidates, split_model
from taid_vlm.benchmarks.evaluate import evaluate
from taid_vlm.benchmarks.question import Benchmark, Judged, Question, Rule, one_by_one
from taid_vlm.benchmarks.scoring import counts, figures, judge, pooled
from taid_vlm.benchmarks.store import question_hash
from taid_vlm.config.data import DataSource
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.statistics import Estimate, mean_of
from taid_vlm.records import ImageRef

NUMBER = 10
Results = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, family) in enumerate({"llava": "llava", "qwen": "qwen2_5_vl",
                                           "text": "llama"}.items()):
        save(build(family, seed=seed), folder / name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """quiz.jsonl with images beside it, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    for index, picture in enumerate(images(5)):
        picture.save(folder / f"{index}.png")
    (folder / "4.png").write_bytes(b"no image at all")
    rows = []
    for index, question in enumerate(questions(NUMBER, seen=False)):
        row = {"index": question.id, "question": question.prompt[0],
               "answer": question.answers[0], "image": f"{index % 5}.png",
               "kind": question.tags["kind"], **dict(zip("ABCD", question.choices, strict=False))}
        rows.append(json.dumps(row) + "\n")
    (folder / "quiz.jsonl").write_text("".join(rows))
    return folder


def quiz(data: Path, rule: int = 0, benchmark: Benchmark = QUIZ, name: str = "quiz.jsonl",
         max_records: int | None = None) -> Task:
    source = DataSource(str(data / name), max_records=max_records)
    return open_task(benchmark, benchmark.rules[rule], source)


def run(model: Path, task: Task, output: Path, **asking: Any) -> Results:
    name = model.name
    candidates = [Candidate(name, ModelSpec(str(model)))]
    return evaluate(candidates, [task], output, Asking(**asking))[name]


def figure(results: Results, name: str = "accuracy", task: str = "quiz") -> dict[str, Any]:
    return results["tasks"][task]["figures"][name]


def files(output: Path) -> tuple[Any, str]:
    found = timeless(json.loads((output / "results.json").read_text()))
    left = sorted(path.name for path in output.rglob("*") if path.is_file())
    assert left == ["quiz.jsonl", "results.json"]
    return found, (output / "answers" / "quiz.jsonl").read_text()


class Counted:
    """Counts what a model is asked, and breaks off at the `fails`-th batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int | None = None,
                 error: type[BaseException] = KeyboardInterrupt) -> None:
        self.batches, self.asked, self.loads = 0, set[tuple[str, int]](), 0
        plain, load = Generating.batch, module.load_model

        def batch(answerer: Generating, given: Any, seed: int) -> list[Answer]:
            self.batches += 1
            if self.batches == fails:
                raise error("the power is gone")
            self.asked |= {(question.id, seed) for question in given}
            return plain(answerer, given, seed)

        def loaded(*args: Any) -> Any:
            self.loads += 1
            return load(*args)

        monkeypatch.setattr(Generating, "batch", batch)
        monkeypatch.setattr(module, "load_model", loaded)


# ----- the results --------------------------------------------------------------------------


def test_results_and_answers_say_everything(models: Path, data: Path, tmp_path: Path) -> None:
    results = run(models / "llava", quiz(data), tmp_path / "out", batch_size=4)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(
        json.dumps(results))
    entry, model = results["tasks"]["quiz"], results["model"]
    assert (results["schema"], results["kind"], results["name"]) == (1, "evaluation", "llava")
    assert model["model_type"] == "llava"
    assert model["parameters"] == sum(p.numel() for p in build("llava").model.parameters())
    assert (model["dtype"], len(model["weights_sha256"])) == ("float32", 64)
    assert (entry["title"], entry["rule"], entry["rule_version"]) == ("A quiz", "letter", 3)
    assert entry["answering"] == {"method": "generate", "max_new_tokens": 6, "temperature": 0.0,
                                  "top_p": 1.0, "seeds": [0]}
    assert len(entry["source"]["sha256"]) == 64
    assert results["versions"]["torch"] == version("torch")
    rows = [json.loads(line) for line in (tmp_path / "out" / entry["answers"]).open()]
    task = quiz(data)
    assert [row["id"] for row in rows] == [question.id for question in task.questions]
    for row, question in zip(rows, task.questions, strict=True):
        assert row["prompt"] == "<image>" + question.prompt[-1]
        assert (row["answers"], row["tags"]) == (list(question.answers), question.tags)
        verdict = first_letter(question, row["answer"])
        assert (row["score"], row["read"]) == (verdict.score, verdict.read)
    broken = [row for row in rows if "problem" in row]
    assert [row["problem"] for row in broken] == ["unreadable image"] * (NUMBER // 5)
    assert entry["unanswered"] == {"unreadable image": NUMBER // 5}
    assert entry["parse_failures"] == sum(row["read"] is None for row in rows) - NUMBER // 5
    assert entry["n"] == NUMBER == figure(results)["n"]
    scores = [row["score"] for row in rows]
    assert figure(results)["value"] == pytest.approx(sum(scores) / NUMBER)
    tagged = entry["by_tag"]["kind"]["odd"]["accuracy"]
    assert tagged["value"] == pytest.approx(sum(scores[1::2]) / len(scores[1::2]))
    assert tagged["n"] == NUMBER // 2


def test_any_batch_size_and_again_gives_the_same_files(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(models / "qwen", quiz(data), tmp_path / "1", batch_size=1)
    run(models / "qwen", quiz(data), tmp_path / "8", batch_size=8)
    expected = files(tmp_path / "1")
    assert files(tmp_path / "8") == expected
    counted = Counted(monkeypatch)
    run(models / "qwen", quiz(data), tmp_path / "8", batch_size=3)
    assert files(tmp_path / "8") == expected
    assert (counted.batches, counted.loads) == (0, 0)  # nothing was asked, or even loaded


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "seeds": (5, 6)}])
def test_interrupted_and_gone_on_with_gives_the_same_files(
    models: Path, data: Path, tmp_path: Path, error: type[BaseException], sampled: dict[str, Any],
) -> None:
    task = quiz(data)
    run(models / "llava", task, tmp_path / "whole", batch_size=3, **sampled)
    with pytest.MonkeyPatch.context() as patch:
        first = Counted(patch, fails=8, error=error)
        with pytest.raises(error):
            run(models / "llava", task, tmp_path / "out", batch_size=3, **sampled)
    partial = tmp_path / "out" / "answers" / ".quiz.partial-0.jsonl"
    assert not (tmp_path / "out" / "results.json").exists()
    assert not (tmp_path / "out" / "answers" / "quiz.jsonl").exists()
    kept = partial.read_text().splitlines()[1:]
    assert kept
    partial.write_text(partial.read_text()[:-9])  # the last line was being written
    with pytest.MonkeyPatch.context() as patch:
        again = Counted(patch)
        run(models / "llava", task, tmp_path / "out", batch_size=3, **sampled)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    total = NUMBER * len(sampled.get("seeds", (0,)))
    assert len(kept) < total
    assert len(again.asked) < total  # a batch that is not whole is asked again, and no other
    assert first.asked | again.asked == {(question.id, seed) for question in task.questions
                                         for seed in sampled.get("seeds", (0,))}


def test_seconds_add_up_over_interruptions(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    with pytest.MonkeyPatch.context() as patch:
        Counted(patch, fails=3)
        with pytest.raises(KeyboardInterrupt):
            run(models / "text", wordy(data), tmp_path, batch_size=4)
    results = run(models / "text", wordy(data), tmp_path, batch_size=4)
    assert results["tasks"]["quiz"]["seconds"] == pytest.approx(math.ceil(NUMBER / 4))
    results = run(models / "text", wordy(data), tmp_path, batch_size=4)
    assert results["tasks"]["quiz"]["seconds"] == pytest.approx(math.ceil(NUMBER / 4))


def wordy(data: Path, **changes: Any) -> Task:
    """The same questions without their images."""
    task = quiz(data, **changes)
    asked = [replace(question, prompt=question.prompt[-1:], images=())
             for question in task.questions]
    return replace(task, questions=asked)


# ----- what is asked again ------------------------------------------------------------------


def test_another_rule_asks_nothing_again(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(models / "text", wordy(data), tmp_path)
    before = [json.loads(line) for line in (tmp_path / "answers" / "quiz.jsonl").open()]
    counted = Counted(monkeypatch)
    results = run(models / "text", wordy(data, rule=1), tmp_path)
    after = [json.loads(line) for line in (tmp_path / "answers" / "quiz.jsonl").open()]
    assert counted.loads == 0
    assert [row["answer"] for row in after] == [row["answer"] for row in before]
    assert results["tasks"]["quiz"]["rule"] == "half"
    assert {row["score"] for row in before} != {row["score"] for row in after} <= {0.0, 0.5}


Change = Callable[[Path, Path, Task], tuple[Path, Task, dict[str, Any]]]


def other_weights(models: Path, folder: Path, task: Task) -> tuple[Path, Task, dict[str, Any]]:
    save(build("llama", seed=9), folder / "text")
    return folder / "text", task, {}


def other_settings(models: Path, folder: Path, task: Task) -> tuple[Path, Task, dict[str, Any]]:
    return models / "text", task, {"max_new_tokens": 5}


def other_question(models: Path, folder: Path, task: Task) -> tuple[Path, Task, dict[str, Any]]:
    changed = [replace(task.questions[0], prompt=("what else",)), *task.questions[1:]]
    return models / "text", replace(task, questions=changed), {}


def other_template(models: Path, folder: Path, task: Task) -> tuple[Path, Task, dict[str, Any]]:
    copy = Path(shutil.copytree(models / "text", folder / "text"))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "answerer"))
    return copy, task, {}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("change", "said", "number"), [
    (other_weights, "weights_sha256", NUMBER), (other_settings, "max_new_tokens: 6 -> 5", NUMBER),
    (other_question, "its text or image", 1), (other_template, "weights_sha256", NUMBER)])
def test_what_changed_is_asked_again_and_said(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, change: Change, said: str, number: int, finished: bool,
) -> None:
    task = wordy(data)
    with pytest.MonkeyPatch.context() as patch:
        Counted(patch, fails=None if finished else NUMBER + 1)  # every question, but no end
        if not finished:
            patch.setattr(module, "judge", lambda *args: 1 / 0)
        try:
            run(models / "text", task, tmp_path / "out", batch_size=1)
        except ZeroDivisionError:
            assert not finished
    model, task, settings = change(models, tmp_path, task)
    caplog.clear()
    counted = Counted(monkeypatch)
    run(model, task, tmp_path / "out", batch_size=1, **settings)
    assert len(counted.asked) == number
    assert said in caplog.text or (finished and "another model" in caplog.text)
    run(model, task, tmp_path / "fresh", batch_size=1, **settings)
    assert files(tmp_path / "out")[1] == files(tmp_path / "fresh")[1]


def test_an_image_that_changed_is_asked_about_again(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    run(models / "llava", quiz(copy), tmp_path / "out")
    Image.new("RGB", (40, 30), "red").save(copy / "4.png")  # the broken one is mended
    counted = Counted(monkeypatch)
    results = run(models / "llava", quiz(copy), tmp_path / "out", batch_size=1)
    assert len(counted.asked) == NUMBER // 5
    assert results["tasks"]["quiz"]["unanswered"] == {}


def test_more_questions_and_seeds_are_added_to_what_is_there(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = {"temperature": 1.0, "batch_size": 1}
    run(models / "text", wordy(data, max_records=5), tmp_path / "out", seeds=(1,), **sampled)
    counted = Counted(monkeypatch)
    run(models / "text", wordy(data), tmp_path / "out", seeds=(1, 2), **sampled)
    assert len(counted.asked) == 2 * NUMBER - 5
    run(models / "text", wordy(data), tmp_path / "whole", seeds=(1, 2), **sampled)
    assert files(tmp_path / "out")[1] == files(tmp_path / "whole")[1]


def test_tasks_join_those_that_are_there(models: Path, data: Path, tmp_path: Path) -> None:
    run(models / "text", wordy(data), tmp_path)
    other = replace(QUIZ, name="other")
    results = run(models / "text", wordy(data, benchmark=other), tmp_path)
    assert list(results["tasks"]) == ["quiz", "other"]
    assert (tmp_path / "answers" / "other.jsonl").exists()
    results = run(models / "qwen", wordy(data, benchmark=other), tmp_path)
    assert list(results["tasks"]) == ["other"]  # the first is another model's


# ----- figures ------------------------------------------------------------------------------


def test_seeds_are_pooled_over_questions(models: Path, data: Path, tmp_path: Path) -> None:
    seeds = (1, 2, 3, 4)
    task = wordy(data)
    results = run(models / "text", task, tmp_path, temperature=1.0, seeds=seeds, max_new_tokens=12)
    rows = [json.loads(line) for line in (tmp_path / "answers" / "quiz.jsonl").open()]
    scores = [[draw["score"] for draw in row["repeats"]] for row in rows]
    assert [row["score"] for row in rows] == [pytest.approx(sum(s) / 4) for s in scores]
    assert any(len(set(s)) > 1 for s in scores)
    means = [math.fsum(s) / 4 for s in scores]
    groups = [question.group or question.id for question in task.questions]
    expected = mean_of(means, groups)
    found = figure(results)
    assert (found["value"], found["stderr"], found["n"]) == (
        pytest.approx(expected.value), pytest.approx(expected.stderr), NUMBER)
    each = [math.fsum(column) / NUMBER for column in zip(*scores, strict=True)]
    assert found["seeds"] == pytest.approx(each)
    spread = math.sqrt(sum((x - sum(each) / 4) ** 2 for x in each) / 3)
    assert found["spread"] == pytest.approx(spread)
    assert [draw["seed"] for draw in rows[0]["repeats"]] == list(seeds)
    alone = run(models / "text", task, tmp_path / "3", temperature=1.0, seeds=(3,),
                max_new_tokens=12)
    assert figure(alone)["value"] == pytest.approx(each[2])


def test_a_figure_that_is_no_mean_has_the_error_of_one_seed() -> None:
    def squared(judged: Any) -> dict[str, Estimate]:
        mean = mean_of([one.verdict.score for one in judged])
        return {"squared": Estimate(mean.value**2, 0.1 * (1 + mean.value), mean.n)}

    rule = Rule("squared", 1, one_by_one(first_letter), squared)
    asked = questions(4, seen=False)
    drawn = {seed: judge(rule, asked, [Answer(text) for text in texts])
             for seed, texts in ((1, "AAAA"), (2, "BBBB"))}
    each = [sum(one.verdict.score for one in judged) / 4 for judged in drawn.values()]
    assert each[0] != each[1]
    found = figures(rule, drawn)["squared"]
    assert found["value"] == pytest.approx((each[0] ** 2 + each[1] ** 2) / 2)
    errors = [0.1 * (1 + mean) for mean in each]
    assert found["stderr"] == pytest.approx(math.sqrt((errors[0] ** 2 + errors[1] ** 2) / 2))


def test_a_missing_answer_is_wrong_even_where_a_rule_reads_silence() -> None:
    """POPE's own rule takes everything but a no for a yes."""
    always = Rule("always", 1, one_by_one(lambda q, a: first_letter(q, "AB")))
    asked = questions(3, seen=False)
    answers = [Answer("x"), Answer(problem="unreadable image"), Answer("")]
    judged = judge(always, asked, answers)
    assert [one.verdict.read for one in judged] == ["A", None, "A"]
    assert judged[1].verdict.score == 0
    found = counts({0: answers, 1: answers}, {0: judged, 1: judged})
    assert found == {"n": 3, "parse_failures": 0, "unanswered": {"unreadable image": 1}, "cut": 0}
    assert [one.answer for one in pooled({0: judged})] == ["x", "", ""]
    assert isinstance(judged[0], Judged)


def test_choices_by_likelihood(models: Path, data: Path, tmp_path: Path) -> None:
    how = {"method": "likelihood", "choose_by": "text", "normalise": "bytes"}
    for size in (1, 8):
        results = run(models / "qwen", quiz(data), tmp_path / str(size), batch_size=size, **how)
        assert results["tasks"]["quiz"]["answering"] == {**how, "seeds": [0]}
        assert results["tasks"]["quiz"]["parse_failures"] == 0
    one, many = ([json.loads(line) for line in (tmp_path / size / "answers" / "quiz.jsonl").open()]
                 for size in ("1", "8"))
    for ours, theirs in zip(one, many, strict=True):
        first, second = ours.pop("likelihoods", []), theirs.pop("likelihoods", [])
        assert ours == theirs
        assert [x for pair in first for x in pair] == pytest.approx(
            [x for pair in second for x in pair], abs=1.5e-3)
        assert bool(first) != ("problem" in ours)
    before = (tmp_path / "8" / "answers" / "quiz.jsonl").read_text()
    run(models / "qwen", quiz(data), tmp_path / "8", **how)
    assert (tmp_path / "8" / "answers" / "quiz.jsonl").read_text() == before


def test_several_models_have_a_folder_each(models: Path, data: Path, tmp_path: Path) -> None:
    candidates = parse_candidates([f"teacher={models / 'qwen'}", str(models / "llava")],
                                  ModelSpec(""))
    found = evaluate(candidates, [quiz(data)], tmp_path)
    assert list(found) == ["teacher", "llava"]
    for name, results in found.items():
        assert json.loads((tmp_path / name / "results.json").read_text())["name"] == name
        alone = run(models / {"teacher": "qwen"}.get(name, name), quiz(data), tmp_path / f"{name}1")
        assert figure(results) == figure(alone)


# ----- mistakes -----------------------------------------------------------------------------


def test_a_run_stands_for_its_student(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "text", tmp_path / "first" / "student")
    (tmp_path / "first" / "results.json").write_text("{}")
    (found,) = parse_candidates([str(tmp_path / "first")], ModelSpec("", dtype="float32"))
    assert (found.name, found.source.dtype) == ("first", "float32")
    assert found.source.model_name_or_path == str(tmp_path / "first" / "student")


def test_names_of_models() -> None:
    assert split_model("org/model@v1") == ("model", "org/model", "v1")
    assert split_model("base=org/model") == ("base", "org/model", "main")
    assert split_model("a=b=c/d") == ("a", "b=c/d", "main")
    with pytest.raises(TaidError, match=r"two models are called 'x'.*teacher=PATH"):
        distinct([Candidate("x", ModelSpec("a")), Candidate("x", ModelSpec("b"))])
    for wrong in ("a/b=c", "../up=x", "a="):
        with pytest.raises(TaidError, match="--model"):
            split_model(wrong)


def test_a_text_model_is_not_asked_about_images(models: Path, data: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    candidates = parse_candidates([str(models / "llava"), str(models / "text")], ModelSpec(""))
    with pytest.raises(TaidError, match=r"'text' \(llama\) is a text model, but quiz asks about "
                                        r"images \(question 'q00'\)"):
        evaluate(candidates, [quiz(data)], tmp_path / "out")
    assert counted.loads == 0
    assert not (tmp_path / "out").exists()


def test_likelihood_needs_choices(models: Path, data: Path, tmp_path: Path) -> None:
    open_question = Question("open", ("what",), (), ("A",))
    task = wordy(data)
    mixed = replace(task, questions=[*task.questions, open_question])
    with pytest.raises(TaidError, match=r"1 of 11 questions of quiz have no choices to .*'open'"):
        run(models / "text", mixed, tmp_path / "out", method="likelihood")
    never = replace(task, benchmark=replace(QUIZ, likelihood=False))
    with pytest.raises(TaidError, match="quiz is not answered by choosing"):
        run(models / "text", never, tmp_path / "out", method="likelihood")


@pytest.mark.parametrize(("asking", "words"), [
    ({"method": "likelyhood"}, "--method = 'likelyhood'. Did you mean 'likelihood'?"),
    ({"normalise": "byte"}, "--normalise = 'byte'. Did you mean 'bytes'?"),
    ({"choose_by": "word"}, "--choose-by = 'word'. Valid: letter, text."),
    ({"batch_size": 0}, "--batch-size = 0"), ({"max_new_tokens": 0}, "--max-new-tokens = 0"),
    ({"temperature": -1.0}, "--temperature = -1"), ({"temperature": math.nan}, "--temperature"),
    ({"temperature": 1.0, "top_p": 0.0}, "--top-p = 0"), ({"seeds": (1,)}, "--temperature is 0"),
    ({"top_p": 0.5}, "--temperature is 0"), ({"temperature": 1.0, "seeds": (1, 1)}, "must differ"),
    ({"method": "likelihood", "temperature": 1.0}, "likelihood generates nothing"),
])
def test_settings_that_make_no_sense(asking: dict[str, Any], words: str) -> None:
    with pytest.raises(TaidError) as caught:
        Asking(**asking)
    assert words in str(caught.value)


def test_a_folder_of_something_else_is_left_alone(models: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1, "eval": {}}')
    with pytest.raises(TaidError, match="holds the results of something else"):
        run(models / "text", wordy(data), tmp_path)
    assert (tmp_path / "results.json").read_text() == '{"schema": 1, "eval": {}}'
    (tmp_path / "file").write_text("x")
    with pytest.raises(TaidError, match="is a file"):
        run(models / "text", wordy(data), tmp_path / "file" / "out")


def test_weights_that_are_not_there_show_at_once(models: Path, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models / "text", tmp_path / "text"))
    (copy / "model.safetensors").unlink()
    with pytest.raises(TaidError, match=r"holds no weights"):
        run(copy, wordy(data), tmp_path / "out")
    with pytest.raises(TaidError, match=r"model: no model at .*Did you mean the folder .*text'"):
        run(models / "tekst", wordy(data), tmp_path / "out")


def test_hashes_tell_questions_apart() -> None:
    picture, other = images(2)
    plain = Question("a", (None, "what"), (ImageRef(picture, "x"),), choices=("b", "c"))
    changes = [replace(plain, prompt=("what", None)), replace(plain, prompt=(None, "what?")),
               replace(plain, images=(ImageRef(other, "x"),)), replace(plain, choices=("bc",)),
               replace(plain, choices=("c", "b"))]
    assert len({question_hash(question) for question in (plain, *changes)}) == 6
    assert question_hash(replace(plain, answers=("z",), tags={"t": "u"})) == question_hash(plain)
