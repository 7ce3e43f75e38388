"""What the report of a run says first: whose it is, and how much of the gap was closed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import Checkpoints, Outcome, loaded, pairs, write_jsonl, write_recipe

from taid_vlm.evaluation.answers import AnswerPair
from taid_vlm.report.run import verdict


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
