"""What the report of a run says first: whose it is, and how much of the gap was closed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli.recipes import (
    Checkpoints,
    Outcome,
    loaded,
    pairs,
    picture_rows,
    write_jsonl,
    write_recipe,
)
from transformers import TrainerState

from taid_vlm.config.evaluation import EvaluateSpec
from taid_vlm.evaluation.answers import AnswerPair
from taid_vlm.report.run import verdict
from taid_vlm.runs.measure import Measuring, Progress
from taid_vlm.training.trainer import DistillationTrainer


def answers(*figures: tuple[float, float]) -> list[AnswerPair]:
    return [AnswerPair((f"r:{i}", 0, 0), "", 4, {}, {"kl": before}, {"kl": after}, {})
            for i, (before, after) in enumerate(figures)]


def evaluated(*kl: float) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "eval_kl": value} for i, value in enumerate(kl, start=1)]


def test_a_share_of_the_gap_with_its_interval() -> None:
    closed = answers(*((1.0, 0.8 + 0.01 * (i % 3)) for i in range(30)))
    (text,) = verdict(1.0, 0.81, closed, evaluated(0.95, 0.9, 0.81))
    assert re.fullmatch(r"19 % \[19, 19\] of the gap to the teacher closed; still improving\. "
                        r"\(0 %: .*, 100 %: its teacher\.\)", text), text
    noisy = answers(*((1.0, 0.99 + (-1) ** i) for i in range(30)))
    (text,) = verdict(1.0, 0.99, noisy, [])
    assert text.startswith("No gain that stands out from chance: 1 % [-")
    away = answers(*((1.0, 1.5 + 0.01 * (i % 2)) for i in range(30)))
    assert verdict(1.0, 1.5, away, [])[0].startswith("The student moved away from its teacher: -5")
    few = answers((1.0, 1.0), (4.0, 4.2))  # the gap itself is not sure
    assert verdict(2.5, 2.6, few, [])[0].startswith("No gain that stands out from chance: -4 % of")
    assert verdict(0.0, 0.0, [], []) == [] == verdict(math.nan, 1.0, [], [])


@pytest.mark.parametrize(("kl", "trend"), [
    ((0.9, 0.8), ""), ((0.9, 0.8, 0.7), "; still improving"), ((0.9, 0.7, 0.699), "; levelled off"),
    ((0.9, 0.7, 0.8), "; best at step 20, worse since")])
def test_where_it_was_going(kl: tuple[float, ...], trend: str) -> None:
    (text,) = verdict(1.0, kl[-1], [], evaluated(*kl))
    assert f"closed{trend}. (" in text


def test_the_report_of_a_run(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = cli("distill", write_recipe(tmp_path, {
        "teacher": checkpoints("llama"), "student": checkpoints("qwen2", seed=1),
        "data": {side: str(write_jsonl(tmp_path / f"{side}.jsonl", pairs(8))) for side in
                 ("train", "eval")},
        "train": {"max_steps": 3, "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
                  "learning_rate": 1e-2},
        "evaluate": {"examples": 1}, "output_dir": str(tmp_path / "out")}))
    assert done.status == 0, done.err
    html = (tmp_path / "out/report.html").read_text()
    student, teacher = (Path(checkpoints(name, seed=seed)).name
                        for name, seed in (("qwen2", 1), ("llama", 0)))
    assert f"<title>{student} distilled from {teacher} by taid</title>" in html
    results = loaded(tmp_path / "out/results.json")
    before, after = (results["eval"][when]["kl"] for when in ("before", "after"))
    lead = re.search(r'<ul class="summary"><li>(.*?)</li>', html)
    assert lead and f"{100 * (1 - after / before):.0f} % [" in lead[1]
    assert "of the gap to the teacher closed" in lead[1]
    assert "answer tokens/s (median)" in html and "TAID&#39;s loss is against a target" in html
    assert str(tmp_path) not in html.split('<details class="recipe">')[0]


@pytest.mark.parametrize(("wanted", "spread", "number"), [
    (None, False, 3), (None, True, 0), (1, True, 1), (0, False, 0)])
def test_a_student_in_parts_is_asked_on_its_way_where_that_is_wanted_alone(
    wanted: int | None, spread: bool, number: int
) -> None:
    trainer = SimpleNamespace(is_fsdp_enabled=spread, is_deepspeed_enabled=False,
                              add_callback=lambda _: None)
    recipe = SimpleNamespace(evaluate=EvaluateSpec(progress=wanted))
    progress = Progress(Measuring(trainer, recipe, None, [(None, 0)] * 12))  # type: ignore[arg-type]
    assert len(progress.questions) == number
    state = TrainerState()  # of a checkpoint that was written without
    progress.on_train_begin(None, state, None)
    assert progress.answers == {}
    state.stateful_callbacks["Progress"] = {"attributes": {"answers": {"4": ["a", "b"]}}}
    progress.on_train_begin(None, state, None)
    assert (progress.of(1), progress.of(2)) == ({4: "b"}, {})


@pytest.mark.parametrize("kind", ["text", "vlm"])
def test_the_report_shows_a_student_learn(
    kind: str, checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked on its way, and after an interruption, it ends up bit for bit as without."""
    names = (("llama", "plain"), ("qwen2", "plain")) if kind == "text" else (
        ("qwen3_vl", "plain"), ("smolvlm", "other"))
    teacher, student = (checkpoints(name, tokenizer, seed)
                        for seed, (name, tokenizer) in enumerate(names))
    rows = pairs(8) if kind == "text" else picture_rows(tmp_path, 8)
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    recipe = write_recipe(tmp_path, {
        "teacher": teacher, "student": student, "data": {"train": data, "eval": data},
        "train": {"max_steps": 4, "use_cpu": True, "logging_steps": 1, "learning_rate": 5e-2,
                  "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "bf16": True},
        "evaluate": {"examples": 3, "progress": 2, "max_new_tokens": 6, "canary": 0}})

    def results(name: str, *options: str) -> dict[str, Any]:
        done = cli("distill", recipe, f"output_dir={tmp_path / name}", *options)
        assert done.status == 0, done.err
        return loaded(tmp_path / name / "results.json")

    def weights(name: str) -> bytes:
        return (tmp_path / name / "student/model.safetensors").read_bytes()

    whole, blind = results("whole"), results("blind", "evaluate.progress=0")
    progress = [example["progress"] for example in whole["examples"]]
    assert [list(one) for one in progress] == [["2", "4"], ["2", "4"], []]
    assert [one["4"] for one in progress[:2]] == [
        example["answers"]["after"] for example in whole["examples"][:2]]
    assert any(one["2"] != one["4"] for one in progress[:2])  # it learned something
    assert [example["progress"] for example in blind["examples"]] == [{}, {}, {}]
    assert weights("whole") == weights("blind")
    for row in (*whole["history"], *blind["history"]):
        for key in [key for key in row if "second" in key or "runtime" in key]:
            del row[key]
    assert whole["history"] == blind["history"]

    finish_step = DistillationTrainer.finish_step

    def stop(self: DistillationTrainer) -> None:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        finish_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "finish_step", stop)
        assert cli("distill", recipe, f"output_dir={tmp_path / 'halted'}").status == 130
    halted = results("halted", "--resume")
    assert [example["progress"] for example in halted["examples"]] == progress
    assert weights("halted") == weights("whole")
    html = (tmp_path / "halted/report.html").read_text()
    assert "what the student said at evaluations in training" in html
    for label in ("<b>before</b>", "<b>step", "<b>after</b>"):
        assert label in html
    assert html.index("<b>teacher</b>") < html.index("<b>step") < html.index("<b>after</b>")
