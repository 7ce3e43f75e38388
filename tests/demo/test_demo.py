"""The demo on two training steps: every arm is measured and the page says what it found."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taid_vlm.demo import arms, page
from taid_vlm.demo.demo import data_folder
from taid_vlm.report import Figure, render


def job(arm: str, output: Path, world: str = "words") -> arms.Job:
    whole = next(w for w in arms.WORLDS if w.name == world)
    small = replace(whole, steps=2, batch_size=4, questions=6, records=30)
    data = data_folder()
    return arms.Job(small, arm, data, data / "models", output, seed=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("demo")
    results = {arm: arms.run_arm(job(arm, output))
               for arm in (*arms.OBJECTIVES, arms.START, arms.TEACHER)}
    return {"title": "Words", "steps": 2, "batch_size": 4, "arms": results,
            "caption_entropies": arms.caption_entropies(job("TAID", output)), "output": output}


def test_arms_differ_in_the_objective_alone(tmp_path: Path) -> None:
    recipes = [arms.arm_recipe(job(arm, tmp_path)) for arm in arms.OBJECTIVES]
    same = [replace(r, objective=None, output_dir="") for r in recipes]
    assert all(recipe == same[0] for recipe in same)
    assert len({str(recipe.objective) for recipe in recipes}) == len(recipes)


def test_every_arm_is_measured_on_the_same_answers(world: dict[str, Any]) -> None:
    asked = {tuple((a["source"], a["turn"]) for a in arm["answers"])
             for arm in world["arms"].values()}
    assert len(asked) == 1
    for name in arms.OBJECTIVES:
        figures = world["arms"][name]["figures"]
        assert figures["coverage"] == 1.0
        assert figures["kl"] > 0
        assert (world["output"] / "words" / name / "student" / "model.safetensors").exists()


def test_caption_kl_is_whole_captions_against_the_truth(world: dict[str, Any]) -> None:
    """The teacher is near the truth, the warm start further off, and neither beats it by much."""
    teacher, start = (page.mean_figure(list(page.caption_losses(world, arm).values()))
                      for arm in (arms.TEACHER, arms.START))
    assert teacher.n == start.n == 30
    assert teacher.value > -2 * teacher.stderr
    assert start.value > teacher.value


def test_page_shows_every_arm(world: dict[str, Any]) -> None:
    document = {
        "worlds": {"words": world, "scenes": world}, "seed": 0, "seconds": 1.0,
        "memory": {"largest_worker_rss_bytes": 2**30}, "machine": {}, "versions": {},
    }
    shown = render(page.demo_report(document, data_folder()))
    for arm in (*arms.OBJECTIVES, arms.START, arms.TEACHER):
        assert arm in shown


@pytest.mark.parametrize(("value", "verdict"), [
    (-0.5, "better than KL"), (0.5, "worse than KL"), (0.15, "tied with KL"),
])
def test_verdicts_respect_the_error(value: float, verdict: str) -> None:
    assert page._verdict("KL", Figure(value, 0.1, 9)).startswith(verdict)


def test_mean_figure() -> None:
    figure = page.mean_figure([1.0, 2.0, 3.0, 6.0])
    assert figure.value == 3.0
    assert figure.stderr == pytest.approx(math.sqrt(14 / 3 / 4))
    assert figure.n == 4
