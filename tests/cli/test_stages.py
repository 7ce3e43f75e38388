"""Runs in stages: each is a run of its own, and the last one speaks for all."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.recipes import (
    Checkpoints,
    Outcome,
    command,
    loaded,
    picture_rows,
    write_jsonl,
    write_recipe,
)
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from taid_vlm.config.recipe import Recipe, load_recipe, parse_recipe
from taid_vlm.errors import RecipeError, TaidError
from taid_vlm.models.parts import parts_of
from taid_vlm.runs import run
from taid_vlm.runs.stages import distill_stages, expand
from taid_vlm.training.trainer import DistillationTrainer

Cli = Callable[..., Outcome]
ALIGN = {"name": "align", "train": {
    "freeze": ["tower", "language_model", "head"], "max_steps": 3, "learning_rate": 1e-2}}
ALL = {"name": "all", "train": {"learning_rates": {"tower": 1e-4}}}
PLAIN = {
    "teacher": "big", "student": {"model_name_or_path": "small", "revision": "v2"},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl"}, "train": {"max_steps": 20, "seed": 3},
    "output_dir": "runs/out",
}


def staged(*stages: Any, **sections: Any) -> Recipe:
    return parse_recipe({**PLAIN, "stages": list(stages), **sections})


# ----- the recipe ---------------------------------------------------------------------------


def test_each_stage_is_a_recipe_of_its_own() -> None:
    recipe = staged(
        {**ALIGN, "objective": "forward_kl"},
        {"name": "more", "data": {"train": {"path": "other.jsonl", "max_records": 5}}},
        ALL)
    first, second, third = expand(recipe)
    assert [stage.output_dir for stage in (first, second, third)] == [
        "runs/out/stages/1-align", "runs/out/stages/2-more", "runs/out"]
    assert first.student == recipe.student
    assert second.student.model_name_or_path == "runs/out/stages/1-align/student"
    assert third.student.model_name_or_path == "runs/out/stages/2-more/student"
    assert {s.student.processor_name_or_path for s in (second, third)} == {"small"}
    assert (first.objective, second.objective) == ("forward_kl", {"name": "taid"})
    assert first.train == {**ALIGN["train"], "seed": 3}
    assert second.train == recipe.train
    assert third.train == {**recipe.train, **ALL["train"]}
    assert second.data.train.path == "other.jsonl"
    assert second.data.eval == first.data.eval == recipe.data.eval
    assert first.data.train == third.data.train == recipe.data.train
    assert all(stage.stages is None for stage in (first, second, third))


def test_a_recipe_without_stages_is_its_own_stage() -> None:
    recipe = parse_recipe(PLAIN)
    assert expand(recipe) == [recipe]
    assert "stages" not in recipe.to_yaml()


def test_one_stage_is_the_recipe_with_its_changes() -> None:
    (only,) = expand(staged(ALIGN))
    assert (only.output_dir, only.student.model_name_or_path) == ("runs/out", "small")
    assert only.train["max_steps"] == 3


def test_the_resolved_recipe_reads_back(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("")
    tree = {**PLAIN, "stages": [
        {**ALIGN, "objective": {"name": "jsd", "beta": 0.5}, "data": {"train": "other.jsonl"}},
        {"name": "all", "train": {"freeze": []}}]}
    recipe = load_recipe(write_recipe(tmp_path, tree)).resolved()
    assert recipe.stages[0].data["train"].path == str(tmp_path / "other.jsonl")
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert expand(again)[1].train["freeze"] == []


@pytest.mark.parametrize(("stages", "told"), [
    ({}, "stages must be a list"),
    ([], "stages must be a list"),
    (["align"], "stages[0] must be a mapping"),
    ([{"train": {}}], "stages[0].name is missing"),
    ([{"name": 3}], "stages[0].name = 3"),
    ([{"name": "../up"}], "stages[0].name = '../up'"),
    ([{"name": ""}], "names a folder"),
    ([{"name": "a"}, {"name": "a"}], "the name 'a' stands twice"),
    ([{"name": "a", "trian": {}}], "Did you mean 'train'"),
    ([{"name": "a", "train": {"max_step": 3}}], "stages 'a': train has no key 'max_step'"),
    ([{"name": "a", "train": {"output_dir": "x"}}], "stages 'a': train.output_dir belongs"),
    ([{"name": "a", "train": {"freeze": ["towr"]}}], "Did you mean 'tower'"),
    ([{"name": "a", "train": {"max_length": None}}], "train.max_length has no value"),
    ([{"name": "a", "data": {"evl": "x"}}], "stages 'a': data has no key 'evl'"),
    ([{"name": "a", "data": {"train": {"pth": "x"}}}], "stages 'a': data.train has no key 'pth'"),
    ([{"name": "a", "data": {"train": {"path": "x", "max_records": 0}}}], "max_records = 0"),
    ([{"name": "a", "objective": "tiad"}], "Did you mean 'taid'"),
])
def test_what_is_wrong_with_stages(stages: Any, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**PLAIN, "stages": stages})
    assert told in str(caught.value)


@pytest.mark.parametrize(("train", "told"), [
    ({"freeze": "tower"}, "train.freeze = 'tower', but it must be a list"),
    ({"freeze": ["towr"]}, "train.freeze: a model has no part 'towr'. Did you mean 'tower'"),
    ({"learning_rates": {"haed": 1e-4}}, "train.learning_rates: a model has no part 'haed'"),
    ({"learning_rates": {"head": 0}}, "train.learning_rates.head = 0, but"),
    ({"freeze": ["head"], "learning_rates": {"head": 1e-4}}, "'head' is frozen"),
])
def test_what_is_wrong_with_parts(train: Mapping[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**PLAIN, "train": train})
    assert told in str(caught.value)


def test_a_stage_needs_a_teacher_too() -> None:
    tree = {**PLAIN, "teacher": None, "objective": "ce"}
    parse_recipe({**tree, "stages": [ALIGN]})
    with pytest.raises(RecipeError, match="'teacher' is missing"):
        parse_recipe({**tree, "stages": [{**ALIGN, "objective": "taid"}]})


# ----- a whole run --------------------------------------------------------------------------


def tree_of(folder: Path, checkpoints: Checkpoints, **sections: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    data = {side: str(write_jsonl(folder / f"{side}.jsonl", picture_rows(folder, number, number)))
            for side, number in (("train", 16), ("eval", 6))}
    return {
        "teacher": checkpoints("internvl"), "student": checkpoints("llava", "permuted", seed=1),
        "data": data,
        "train": {"learning_rate": 5e-3, "use_cpu": True, "disable_tqdm": True, "max_steps": 4,
                  "save_strategy": "steps", "save_steps": 2, "logging_steps": 1},
        "evaluate": {"examples": 0, "canary": 0}, "stages": [ALIGN, ALL],
        "output_dir": str(folder / "out"), **sections,
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> Path:
    """The folder of a finished run in two stages; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("staged")
    recipe = write_recipe(folder, tree_of(folder, checkpoints))
    assert command("distill", recipe) == 0
    return folder


def copied(finished: Path, folder: Path, **sections: Any) -> tuple[Path, Path]:
    """A recipe over a copy of the finished run's output; its hashes hold there, too."""
    shutil.copytree(finished / "out", folder / "out")
    tree = yaml.safe_load((finished / "recipe.yaml").read_text())
    recipe = write_recipe(folder, {**tree, "output_dir": str(folder / "out"), **sections})
    rehash(load_recipe(recipe), folder / "out")
    return recipe, folder / "out"


def rehash(recipe: Recipe, output: Path) -> None:
    """As if the run had been carried out in this folder."""
    stages = expand(recipe)
    for stage, told in ((stages[0], stages[0]), (stages[1], recipe)):
        path = Path(stage.output_dir) / "results.json"
        text = path.read_text()
        path.write_text(text.replace(loaded(path)["recipe_hash"], told.digest()))


def student(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(folder / "student")
    return dict(model.named_parameters())


def test_every_stage_leaves_a_whole_run(finished: Path) -> None:
    for folder in (finished / "out", finished / "out/stages/1-align"):
        assert {"student", "results.json", "report.html", "recipe.yaml"} <= {
            path.name for path in folder.iterdir()}
    assert [path.name for path in (finished / "out/stages").iterdir()] == ["1-align"]
    first, last = (loaded(finished / place / "results.json")
                   for place in ("out/stages/1-align", "out"))
    assert (first["train"]["steps"], last["train"]["steps"]) == (3, 4)
    assert first["stages"] == []
    assert last["stages"] == [{
        "name": "align", "folder": "stages/1-align", "recipe_hash": first["recipe_hash"],
        "steps": 3, "eval": first["eval"]}]


def test_a_stage_starts_where_the_one_before_ended(finished: Path) -> None:
    first, last = (loaded(finished / place / "results.json")["eval"]
                   for place in ("out/stages/1-align", "out"))
    assert last["before"] == first["after"]
    assert first["after"]["kl"] < first["before"]["kl"]
    assert last["after"]["kl"] < last["before"]["kl"]


def test_only_the_projector_is_aligned(finished: Path, checkpoints: Checkpoints) -> None:
    before = AutoModelForImageTextToText.from_pretrained(checkpoints("llava", "permuted", seed=1))
    parts, start = parts_of(before), dict(before.named_parameters())
    aligned, final = (student(finished / place) for place in ("out/stages/1-align", "out"))
    assert {parts[name] for name in start if not torch.equal(start[name], aligned[name])} == {
        "projector"}
    assert {parts[name] for name in start if not torch.equal(aligned[name], final[name])} == {
        "tower", "projector", "language_model", "head"}


def test_results_and_report_tell_of_parts_and_stages(finished: Path) -> None:
    first, last = (loaded(finished / place / "results.json")
                   for place in ("out/stages/1-align", "out"))
    counts = first["models"]["student"]["parts"]
    assert [part for part, count in counts.items() if count["trained"]] == ["projector"]
    assert all(count["trained"] for count in last["models"]["student"]["parts"].values())
    assert "learning_rate/tower" in last["history"][0]
    pages = [(finished / place / "report.html").read_text()
             for place in ("out/stages/1-align", "out")]
    assert f"tower ({counts['tower']['parameters']:,})" in pages[0]
    assert "after align (3 steps)" in pages[1]
    assert "after align" not in pages[0]
    assert "Learning rates" in pages[1]
    assert "Learning rates" not in pages[0]


def test_the_last_folder_holds_the_whole_recipe(finished: Path) -> None:
    whole = load_recipe(finished / "out/recipe.yaml")
    assert whole.digest() == loaded(finished / "out/results.json")["recipe_hash"]
    assert [stage.name for stage in whole.stages] == ["align", "all"]
    part = load_recipe(finished / "out/stages/1-align/recipe.yaml")
    assert part.stages is None
    assert part.digest() == loaded(finished / "out/stages/1-align/results.json")["recipe_hash"]


def test_a_stage_is_the_run_that_it_would_be_alone(finished: Path, tmp_path: Path) -> None:
    """Nothing of an earlier stage but its student reaches the next one, bit for bit."""
    tree = yaml.safe_load((finished / "recipe.yaml").read_text())
    tree["train"].update(tree["stages"][1]["train"])
    tree["student"] = str(finished / "out/stages/1-align/student")
    tree["output_dir"] = str(tmp_path / "out")
    del tree["stages"]
    assert command("distill", write_recipe(tmp_path, tree)) == 0
    weights = [(place / "student/model.safetensors").read_bytes()
               for place in (finished / "out", tmp_path / "out")]
    assert weights[0] == weights[1]


def test_a_stage_leaves_nothing_in_memory(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """When the second stage loads its models, those of the first are gone."""
    alive: list[int] = []
    load, made = run.load_model, []

    def note(*arguments: Any) -> Any:
        alive.append(sum(model() is not None for model in made))
        model = load(*arguments)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run, "load_model", note)
    distill_stages(parse_recipe(tree_of(tmp_path, checkpoints)))
    assert alive == [0, 1, 0, 1]


# ----- interruptions ------------------------------------------------------------------------


def interrupted(recipe: Path, folder: str, at: int, *arguments: str) -> None:
    """Ctrl-C at a step of the stage that writes into a folder of this name."""
    finish = DistillationTrainer.finish_step

    def stop(trainer: DistillationTrainer) -> None:
        finish(trainer)
        if Path(trainer.args.output_dir).name == folder and trainer.state.global_step == at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "finish_step", stop)
        assert command("distill", recipe, *arguments) == 130


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("folder", "at", "resumed_from"), [
    ("1-align", 3, "checkpoint-2"), ("out", 1, None), ("out", 3, "checkpoint-2"),
])
def test_resume_goes_on_with_the_unfinished_stage(
    folder: str, at: int, resumed_from: str | None, finished: Path, checkpoints: Checkpoints,
    cli: Cli, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tree_of(tmp_path, checkpoints))
    interrupted(recipe, folder, at)
    assert not (tmp_path / "out/results.json").exists()
    kept = times(tmp_path / "out/stages/1-align") if folder == "out" else None
    refused = cli("distill", recipe)
    assert (refused.status, len(refused.errors)) == (2, 1)
    assert "--resume" in refused.err
    assert cli("distill", recipe, "--resume").status == 0
    assert kept is None or times(tmp_path / "out/stages/1-align") == kept
    where = tmp_path / ("out" if folder == "out" else "out/stages/1-align")
    assert loaded(where / "results.json")["train"]["resumed_from"] == resumed_from
    for place in ("out/stages/1-align", "out"):
        whole, resumed = (load_file(root / place / "student/model.safetensors")
                          for root in (finished, tmp_path))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_run_is_left_as_it_is(finished: Path, cli: Cli, tmp_path: Path) -> None:
    recipe, output = copied(finished, tmp_path)
    before = times(output)
    done = cli("distill", recipe, "--resume")
    assert done.status == 0
    assert "held-out KL" in done.out
    assert times(output) == before


def test_a_changed_earlier_stage_is_refused(finished: Path, cli: Cli, tmp_path: Path) -> None:
    changed = {**ALIGN, "train": {**ALIGN["train"], "max_steps": 2}}
    recipe, output = copied(finished, tmp_path)
    (output / "results.json").unlink()
    write_recipe(tmp_path, {**yaml.safe_load(recipe.read_text()), "stages": [changed, ALL]})
    before = times(output)
    done = cli("distill", recipe, "--resume")
    assert done.status == 2
    assert all(word in done.err for word in ("1-align", "another recipe", "output_dir"))
    assert times(output) == before


def test_a_later_stage_may_change_before_it_ran(
    finished: Path, cli: Cli, tmp_path: Path
) -> None:
    recipe, output = copied(finished, tmp_path)
    run.clear_results(output)
    write_recipe(tmp_path, {**yaml.safe_load(recipe.read_text()), "stages": [
        ALIGN, {"name": "all", "train": {"max_steps": 1}}]})
    before = times(output / "stages")
    assert cli("distill", recipe, "--resume").status == 0
    assert loaded(output / "results.json")["train"]["steps"] == 1
    assert times(output / "stages") == before


def test_a_stopped_rerun_does_not_take_old_stages_for_its_own(
    finished: Path, cli: Cli, tmp_path: Path
) -> None:
    recipe, output = copied(finished, tmp_path)
    interrupted(recipe, "1-align", 3, "--overwrite")
    assert not (output / "results.json").exists()
    assert not (output / "stages/1-align/results.json").exists()
    assert cli("distill", recipe, "--resume").status == 0
    assert loaded(output / "stages/1-align/results.json")["train"]["resumed_from"] == "checkpoint-2"
    assert loaded(output / "results.json")["train"]["resumed_from"] is None


def test_nothing_to_resume(checkpoints: Checkpoints, cli: Cli, tmp_path: Path) -> None:
    done = cli("distill", write_recipe(tmp_path, tree_of(tmp_path, checkpoints)), "--resume")
    assert done.status == 2
    assert "1-align' holds no whole checkpoint" in done.err
    assert not (tmp_path / "out").exists()


# ----- mistakes come before the first stage -------------------------------------------------


@pytest.mark.parametrize(("stage", "told"), [
    ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
    ({"train": {"eval_strategy": "steps", "bf16": True, "fp16": True}}, "fp16"),
    ({"train": {"freeze": ["tower", "projector", "language_model", "head"]}}, "nothing is left"),
    ({"train": {"learning_rates": {"head": 1e-4}, "freeze": ["head"]}}, "'head' is frozen"),
])
def test_a_mistake_in_a_later_stage(
    stage: Mapping[str, Any], told: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    tree = tree_of(tmp_path, checkpoints, stages=[ALIGN, {"name": "wrong", **stage}])
    done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 2
    assert "stages 'wrong': " in done.err
    assert told in done.err
    assert not (tmp_path / "out").exists()


def test_what_a_model_lacks_shows_without_its_weights(
    checkpoints: Checkpoints, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = tree_of(tmp_path, checkpoints, student=checkpoints("qwen2"), data={
        "train": str(write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}]))})
    tree["stages"] = None
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("weights were loaded"))
    done = cli("distill", write_recipe(tmp_path, tree), "train.freeze=[tower]")
    assert done.status == 2
    assert "this student has no 'tower'. It has: language_model, head." in done.err


def test_stages_are_not_passed_over(checkpoints: Checkpoints, tmp_path: Path) -> None:
    recipe = parse_recipe(tree_of(tmp_path, checkpoints))
    with pytest.raises(TaidError, match="distill_stages"):
        run.distill(recipe)
    with pytest.raises(TaidError, match="no whole checkpoint"):
        distill_stages(recipe, resume=True)
