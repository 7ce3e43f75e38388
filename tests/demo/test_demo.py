"""The demo on two training steps: its arms are ordinary runs, and its page is their comparison."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid_vlm.compare import Comparison, compare_runs, comparison_report, findings, read_method
from taid_vlm.compare.measures import BASE, TEACHER
from taid_vlm.config.recipe import load_recipe
from taid_vlm.demo import arms, demo, page, truth
from taid_vlm.errors import TaidError
from taid_vlm.records import open_records
from taid_vlm.report import render

DATA = demo.data_folder()
NAMES = (*arms.OBJECTIVES, TEACHER, BASE)


def small(world: str) -> arms.World:
    whole = next(w for w in arms.WORLDS if w.name == world)
    return replace(whole, steps=2, batch_size=4, questions=8, records=30, examples=2)


def arm(name: str, output: Path, world: str = "words") -> arms.Arm:
    return arms.Arm(small(world), name, DATA, DATA / "models", output, 0,
                    arms.OBJECTIVES.get(name))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def comparison(output: Path) -> Comparison:
    return demo.compare_arms(small("words"), DATA, [arms.carry_out(arm(name, output))
                                                    for name in NAMES])


def figures(comparison: Comparison, key: str) -> dict[str, Any]:
    return {name: figure for j in (*comparison.held_out, *comparison.benchmarks)
            if j.measure.column.key == key for name, figure in j.figures.items()}


def test_arms_differ_in_the_objective_alone(tmp_path: Path) -> None:
    recipes = [yaml.safe_load(arm(name, tmp_path).recipe().to_yaml()) for name in arms.OBJECTIVES]
    own = [(recipe.pop("objective")["name"], recipe.pop("output_dir")) for recipe in recipes]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert len({name for name, _ in own}) == len({folder for _, folder in own}) == len(recipes)


def test_every_arm_is_an_ordinary_run(comparison: Comparison, output: Path) -> None:
    for name in arms.OBJECTIVES:
        run = output / "words" / name
        assert {path.name for path in run.iterdir()} == {
            "student", "results.json", "eval_answers.jsonl", "recipe.yaml", "report.html"}
        assert load_recipe(run / "recipe.yaml").digest() == next(
            method for method in comparison.methods if method.name == name
        ).runs[0].results.recipe_hash


def test_taid_vlm_compare_reads_the_arms(comparison: Comparison, output: Path) -> None:
    """With nothing of the demo's own, the figures that are not its own are the same."""
    folders = [f"{name}={output}/words/{name},{output}/words/questions/{name}"
               for name in arms.OBJECTIVES]
    plain = compare_runs([read_method(folder) for folder in folders], baseline="TAID")
    assert "caption_kl" not in [j.measure.column.key for j in plain.held_out]
    for key in ("kl", "agreement", "nll", "questions"):
        whole = figures(comparison, key)
        for name, figure in figures(plain, key).items():
            assert whole[name].value == figure.value, (key, name)


def test_every_model_is_asked_the_same(comparison: Comparison) -> None:
    everyone = [*comparison.references, *comparison.methods]
    answers = {m.name: m.evaluations[0].answers("questions") for m in everyone}
    assert answers.keys() == set(NAMES)
    assert len({tuple(row["id"] for row in rows) for rows in answers.values()}) == 1
    assert all(row["score"] == (row["answer"] == row["answers"][0])
               for rows in answers.values() for row in rows)
    assert all(run.results.eval.after.coverage == 1.0 for m in comparison.methods for run in m.runs)


def test_questions_are_turns_with_all_that_was_said_before() -> None:
    world = small("words")
    task = truth.questions_task(world.held_out(DATA), 8)
    records = open_records(world.held_out(DATA))
    for question in task.questions:
        assert isinstance(question, truth.HeldOutQuestion)
        record, turn = question.asked()
        assert question.answers == (record.answers[turn],)
        assert question.prompt == (record.question(turn),)
        assert question.tags["category"] != truth.CAPTION
        assert question.group == record.source
    assert len(task.questions) == len({q.id for q in task.questions}) == 8
    first = [truth.HeldOutQuestion("a", ("what?",), conversation=records[i], turn=1)
             for i in (0, 1)]
    assert truth._whole(first[0]).prompt != truth._whole(first[1]).prompt  # what came before counts


def test_caption_kl_is_whole_captions_against_the_truth(comparison: Comparison) -> None:
    """The teacher is near the truth, the warm start further off, and neither beats it by much."""
    kl = figures(comparison, "caption_kl")
    assert kl[TEACHER].n == kl[BASE].n == kl["TAID"].n == 30
    assert kl[TEACHER].value > -2 * kl[TEACHER].stderr
    assert kl[BASE].value > kl[TEACHER].value
    run = comparison.methods[0].runs[0]
    entropies = truth.caption_entropies(small("words").held_out(DATA))
    losses = truth.caption_losses(run, BASE, entropies)
    assert sum(losses.values()) / 30 == pytest.approx(kl[BASE].value)
    captions = [a for a in run.answers if a.category == truth.CAPTION]
    assert sum(a.before["nll"] - entropies[a.key[0]] for a in captions) / 30 == pytest.approx(
        kl[BASE].value)


def test_the_caption_kl_decides_first(comparison: Comparison) -> None:
    assert comparison.first == ["caption_kl"]
    assert comparison.held_out[0].measure.column is truth.CAPTION_KL
    assert comparison.held_out[0].against.keys() == {"SFT", "KL", "RKL"}
    assert [j.measure.column.key for j in findings._held_out(comparison)] == [
        "caption_kl", "kl", "agreement", "nll"]


def test_the_page_is_the_comparison_of_both_worlds(comparison: Comparison) -> None:
    facts = {"seed": 0, "real": False, "seconds": 1.0, "cpu_seconds": 2.0,
             "memory": {"largest_worker_rss_bytes": 2**30}, "machine": {}}
    other = replace(small("scenes"), name="words")  # another title alone
    compared = [(small("words"), comparison), (other, comparison)]
    report = page.demo_report(compared, {"words": {}}, facts)
    alone = comparison_report(comparison, {"questions": {}})
    titles = [section.title for section in report.sections]
    assert titles[1:] == [f"{world.title}: {section.title}" for world, _ in compared
                          for section in alone.sections]
    assert [repr(s.tables) for s in report.sections[1:]] == 2 * [
        repr(s.tables) for s in alone.sections]  # NaN is not equal to itself
    shown = render(report)
    for name in NAMES:
        assert name in shown
    table = page.console_table(*compared[0])
    assert [line.split()[0] for line in table.splitlines()[3:]] == [TEACHER, BASE, *arms.OBJECTIVES]


def test_drawn_scenes_come_with_their_images(tmp_path: Path) -> None:
    world = small("scenes")
    methods = [arms.carry_out(arm(name, tmp_path, "scenes")) for name in ("KL", "TAID", TEACHER,
                                                                         BASE)]
    found = demo.compare_arms(world, DATA, methods)
    images = {q.id: q.images for q in truth.questions_task(world.held_out(DATA), 8).questions}
    answers = next(s for s in comparison_report(found, {"questions": images}).sections
                   if s.title == "Answers")
    assert answers.examples
    assert all(example.image for example in answers.examples)
    assert {example.category for example in answers.examples} > {"questions"}
    by_category = next(t for s in comparison_report(found).sections for t in s.tables
                       if t.title == "questions by category")
    assert [row.name for row in by_category.rows] == [TEACHER, BASE, "KL", "TAID"]


def test_teachers_are_trained_by_the_script_beside_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def stand_in(command: list[str]) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 3 * (len(calls) > 1))

    monkeypatch.setattr(subprocess, "run", stand_in)
    assert demo._train_models(DATA, tmp_path) == tmp_path / "models"
    assert calls == [[sys.executable, str(DATA / "generate.py"), "--only-models", "--output-dir",
                      str(tmp_path)]]
    with pytest.raises(TaidError, match=r"--train-teacher: .*ended with status 3"):
        demo._train_models(DATA, tmp_path)


def test_a_worker_that_is_interrupted_says_nothing() -> None:
    """The main process says so once; a traceback of every worker would bury it."""
    code = ("import os, signal; from taid_vlm.io.quiet import quiet_worker; quiet_worker(); "
            "os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and "Traceback" not in done.stderr
