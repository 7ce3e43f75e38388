"""The end of a run: the student is safe first, and what only describes it cannot lose it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.recipes import Checkpoints, Outcome, loaded, pairs, write_jsonl, write_recipe
from safetensors.torch import load_file

from taid_vlm.config.recipe import parse_recipe
from taid_vlm.runs import measure, run
from taid_vlm.training.trainer import DistillationTrainer

Cli = Callable[..., Outcome]


@pytest.fixture
def tree(checkpoints: Checkpoints, tmp_path: Path) -> dict[str, Any]:
    return {
        "teacher": checkpoints("llama"), "student": checkpoints("qwen2", seed=1),
        "data": {side: str(write_jsonl(tmp_path / f"{side}.jsonl", pairs(number, number)))
                 for side, number in (("train", 8), ("eval", 4))},
        "train": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2,
                  "save_strategy": "no"},
        "evaluate": {"examples": 2, "max_new_tokens": 4}, "output_dir": str(tmp_path / "out"),
    }


def fail_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """The `call`-th call of a function, from 1, does not come to its end."""
    original, calls = getattr(owner, name), []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise RuntimeError("a mistake in the figures")
        return original(*args, **kwargs)

    patch.setattr(owner, name, stand_in)


# the third question is the trained student's, after teacher and student before training
@pytest.mark.parametrize(("owner", "name", "call"), [
    (measure, "generate_answers", 3), (DistillationTrainer, "tally", 2), (measure, "to_lines", 1),
    (measure, "summarise", 2), (measure, "account", 1), (run, "train_account", 1),
])
def test_what_only_describes_does_not_lose_the_student(
    owner: Any, name: str, call: int, tree: dict[str, Any], cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tree)
    assert cli("distill", recipe).status == 0
    whole = load_file(tmp_path / "out/student/model.safetensors")
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call)
        done = cli("distill", recipe, f"output_dir={tmp_path}/again")
    assert done.status == 2
    assert done.errors == [
        f"error: the trained student is saved in '{tmp_path}/again/student', but what describes "
        "the run could not be finished: RuntimeError: a mistake in the figures"]
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"recipe.yaml", "student"}
    kept = load_file(tmp_path / "again/student/model.safetensors")
    assert kept.keys() == whole.keys()
    assert all(torch.equal(kept[key], whole[key]) for key in whole)


def test_a_report_that_fails_leaves_the_results(
    tree: dict[str, Any], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taid_vlm.report.run.run_report", lambda *_: 1 / 0)
    done = cli("distill", write_recipe(tmp_path, tree))
    assert (done.status, len(done.errors)) == (2, 1)
    assert "ZeroDivisionError" in done.errors[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "recipe.yaml", "student", "eval_answers.jsonl", "results.json"}


def test_first_the_student_then_figures_then_the_report(
    tree: dict[str, Any], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    replace = os.replace

    def note(source: Any, target: Any) -> None:
        written.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    assert cli("distill", write_recipe(tmp_path, tree)).status == 0
    assert [name for name in written if not name.startswith(("model", "token"))] == [
        "recipe.yaml", "student", "eval_answers.jsonl", "results.json", "README.md",
        "report.html"]


def test_questions_are_of_records_that_can_be_used(
    tree: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    """The first held-out records: no answer at all, a blank one, no text; then good ones."""
    user = {"role": "user", "content": "what is red"}
    unusable = [{"messages": [user]},
                {"messages": [user, {"role": "assistant", "content": " "}]}]
    good = [{"messages": [user, {"role": "assistant", "content": row["completion"]}]}
            for row in pairs(3, 5)]
    write_jsonl(tmp_path / "eval.jsonl", [*unusable, *good])
    done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 0, done.err
    results = loaded(tmp_path / "out/results.json")
    assert [example["source"] for example in results["examples"]] == [
        "eval.jsonl:3", "eval.jsonl:4"]
    assert sum(results["eval"]["after"]["dropped"].values()) == 2
    assert results["eval"]["after"]["n_answers"] == 3


def test_a_trainer_says_how_it_computed_its_loss(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"name": "reference", "reason": "chunks need all logits", "bodies": []}
    monkeypatch.setattr(DistillationTrainer, "loss_report", told, raising=False)
    loss = run.distill(parse_recipe(tree)).results.train.loss_implementation
    assert loss is not None
    assert loss.model_dump() == told


def test_a_run_gives_results_images_and_answers(tree: dict[str, Any], tmp_path: Path) -> None:
    outcome = run.distill(parse_recipe(tree))
    assert outcome.results.model_dump(by_alias=True).keys() == loaded(
        tmp_path / "out/results.json").keys()
    assert outcome.images == [None, None]
    assert outcome.answers == (tmp_path / "out/eval_answers.jsonl").read_text()
    assert not (tmp_path / "out/report.html").exists()  # nobody asked for one
