"""`taid-vlm distill` end to end: the README's recipe in, a student that loads anywhere out."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.recipes import (
    Checkpoints,
    Outcome,
    byte_rows,
    command,
    loaded,
    pairs,
    picture_rows,
    texts,
    write_jsonl,
    write_parquet,
    write_recipe,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from taid_vlm.config.model import ModelSpec
from taid_vlm.config.recipe import load_recipe
from taid_vlm.runs import run
from taid_vlm.training.trainer import DistillationTrainer

FAST = {"learning_rate": 5e-3, "use_cpu": True, "disable_tqdm": True, "logging_steps": 5}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def jsonl(rows: Callable[..., Any]) -> Callable[[Path], dict[str, str]]:
    return lambda folder: {
        side: str(write_jsonl(folder / f"{side}.jsonl", rows(number, seed=number)))
        for side, number in (("train", 16), ("eval", 6))}


def pictures(folder: Path) -> dict[str, str]:
    return {side: str(write_jsonl(folder / f"{side}.jsonl", picture_rows(folder, number, number)))
            for side, number in (("train", 16), ("eval", 6))}


def parquet(folder: Path) -> dict[str, str]:
    return {side: str(write_parquet(folder / f"{side}.parquet", byte_rows(number, number)))
            for side, number in (("train", 16), ("eval", 6))}


SCENARIOS: dict[str, tuple[str, str, str, Callable[[Path], dict[str, str]]]] = {
    "pairs": ("llama", "qwen2", "plain", jsonl(pairs)),
    "texts": ("llama", "qwen2", "plain", jsonl(texts)),
    "image paths": ("internvl", "llava", "permuted", pictures),
    "image bytes": ("internvl", "llava", "permuted", parquet),
}


def minimal(folder: Path, checkpoints: Checkpoints, scenario: str = "pairs",
            train: Mapping[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """The README's recipe for a scenario, its data beside it."""
    teacher, student, tokenizer, data = SCENARIOS[scenario]
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "teacher": {"model_name_or_path": checkpoints(teacher)},
        "student": {"model_name_or_path": checkpoints(student, tokenizer, seed=1)},
        "data": data(folder),
        "objective": {"name": "taid"},
        "train": {**FAST, "max_steps": 30, **(train or {})},
        "evaluate": {"examples": 2, "max_new_tokens": 6},
        "output_dir": str(folder / "out"),
        **sections,
    }


@dataclass(frozen=True)
class Finished:
    """A run that has ended, and the trainer it ended with."""

    scenario: str
    status: int
    recipe: Path
    output: Path
    results: dict[str, Any]
    trainer: DistillationTrainer

    @property
    def student(self) -> Path:
        return self.output / "student"

    @property
    def sees_images(self) -> bool:
        return self.scenario.startswith("image")


def carry_out(folder: Path, tree: Mapping[str, Any], scenario: str = "pairs",
              *arguments: str) -> Finished:
    """Distil, and keep hold of the trainer."""
    kept: list[DistillationTrainer] = []
    save = run.save_student

    def keep(trainer: DistillationTrainer, place: Path, base: ModelSpec | None) -> None:
        kept.append(trainer)
        save(trainer, place, base)

    recipe = write_recipe(folder, tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "save_student", keep)
        status = command("distill", recipe, *arguments)
    output = Path(tree["output_dir"])
    return Finished(scenario, status, recipe, output, loaded(output / "results.json"), kept[0])


@pytest.fixture(scope="module", params=SCENARIOS)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    checkpoints: Checkpoints,
) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("run")
    yield carry_out(folder, minimal(folder, checkpoints, request.param), request.param)
    shutil.rmtree(folder)


# ----- what a run leaves behind -------------------------------------------------------------


def test_the_student_comes_nearer(finished: Finished) -> None:
    assert finished.status == 0
    before, after = (finished.results["eval"][when] for when in ("before", "after"))
    for figures in (before, after):
        assert all(math.isfinite(figures[key]) for key in ("kl", "kl_stderr", "agreement", "nll"))
        assert figures["n_tokens"] > 20
        assert 0 < figures["coverage"] <= 1
        assert figures["dropped"] == {}
    assert after["n_tokens"] == before["n_tokens"]
    assert after["kl"] < 0.6 * before["kl"]


def test_results_tell_what_was_done(finished: Finished) -> None:
    results = finished.results
    assert results["train"]["steps"] == 30
    assert results["train"]["records_left_out"] == {}
    assert results["train"]["texts_cut"] == 0
    assert results["train"]["t"] > 0.9
    assert results["models"].keys() == {"teacher", "student"}
    assert results["alignment"]["case"] == "b"
    assert {"torch", "transformers"} <= results["versions"].keys()
    assert [row["t"] for row in results["history"] if "t" in row]


def test_recipe_and_results_agree(finished: Finished) -> None:
    resolved = load_recipe(finished.output / "recipe.yaml")
    assert resolved == load_recipe(finished.recipe)
    assert resolved.digest() == finished.results["recipe_hash"]


def test_the_student_loads_with_plain_auto_classes(finished: Finished) -> None:
    """Same ids from its tokenizer, bitwise the same logits, and it generates."""
    auto = AutoModelForImageTextToText if finished.sees_images else AutoModelForCausalLM
    model = auto.from_pretrained(finished.student).eval()
    trained = finished.trainer.accelerator.unwrap_model(finished.trainer.model).eval()
    ours = finished.trainer.data_collator.student.processor
    processor = (AutoProcessor if finished.sees_images else AutoTokenizer).from_pretrained(
        finished.student)
    record = finished.trainer.eval_dataset[0]
    inputs, expected = (question(p, record, finished.sees_images) for p in (processor, ours))
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, trained(**expected).logits)
        new = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert new.shape[1] == inputs["input_ids"].shape[1] + 4


def question(processor: Any, record: Any, with_image: bool) -> dict[str, torch.Tensor]:
    """A prompt as a user of the student would make it."""
    if not with_image:
        return dict(processor("what is a red square", return_tensors="pt"))
    content = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}],
                                         add_generation_prompt=True, tokenize=False)
    image = record.images[0].load()
    return dict(processor(text=[text], images=[[image]], return_tensors="pt"))


def test_nothing_in_the_student_is_a_pickle(finished: Finished) -> None:
    names = [path.name for path in finished.student.rglob("*")]
    assert "model.safetensors" in names
    assert not [name for name in names if Path(name).suffix in PICKLES]
    assert not list(finished.output.glob(".*"))


def test_the_report_needs_nothing_but_itself(finished: Finished) -> None:
    page = (finished.output / "report.html").read_text()
    assert f"{finished.results['eval']['after']['kl']:.4f}" in page
    assert "output_dir" in page  # the recipe is part of it
    linked = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page) + re.findall(
        r"url\(([^)]+)\)", page)
    assert not [link for link in linked if not link.startswith(("data:", "#"))]
    assert "<script src" not in page
    assert "@import" not in page


def test_the_resolved_recipe_repeats_the_run(finished: Finished, tmp_path: Path) -> None:
    status = command("distill", finished.output / "recipe.yaml", f"output_dir={tmp_path}/again",
                     "evaluate.examples=0")
    again = loaded(tmp_path / "again" / "results.json")
    assert status == 0
    assert again["eval"] == finished.results["eval"]
    assert again["train"]["t"] == finished.results["train"]["t"]


def test_the_resolved_recipe_repeats_a_run_with_relative_paths(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Data beside the recipe, the output elsewhere, and the working directory a third place."""
    tree = minimal(tmp_path / "project", checkpoints, train={"max_steps": 1})
    tree["data"] = {"train": "train.jsonl", "eval": "eval.jsonl"}
    tree["output_dir"] = str(tmp_path / "elsewhere" / "out")
    recipe = write_recipe(tmp_path / "project", tree)
    assert command("distill", recipe) == 0
    output = tmp_path / "elsewhere" / "out"
    assert yaml.safe_load((output / "recipe.yaml").read_text())["data"]["train"]["path"] == str(
        tmp_path / "project" / "train.jsonl")
    assert loaded(output / "results.json")["recipe_hash"] == load_recipe(recipe).digest()
    assert command("inspect", output / "recipe.yaml") == 0


def test_the_resolved_recipe_finds_images_in_another_folder(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    tree = minimal(project, checkpoints, "image paths")
    (project / "pictures").mkdir()
    for picture in project.glob("*.png"):
        picture.rename(project / "pictures" / picture.name)
    tree["data"] = {"train": {"path": "train.jsonl", "image_root": "pictures"}}
    recipe = write_recipe(project, tree)
    assert command("inspect", recipe) == 0
    resolved = write_recipe(tmp_path, yaml.safe_load(load_recipe(recipe).resolved().to_yaml()))
    assert command("inspect", resolved) == 0


def test_the_command_closes_with_the_figures(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    tree = minimal(tmp_path, checkpoints, train={"max_steps": 1})
    done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 0
    after = loaded(tmp_path / "out" / "results.json")["eval"]["after"]
    assert f"-> {after['kl']:.4f} nats" in done.out
    assert f"{tmp_path}/out/report.html" in done.out


def test_no_eval_data(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    tree = minimal(tmp_path, checkpoints, train={"max_steps": 1})
    done = cli("distill", write_recipe(tmp_path, tree), "data.eval=null")
    assert done.status == 0
    results = loaded(tmp_path / "out" / "results.json")
    assert results["eval"] == {"before": None, "after": None}
    assert (tmp_path / "out" / "report.html").exists()


# ----- stopping and going on ----------------------------------------------------------------

STEPS = {"max_steps": 8, "save_steps": 3}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def interrupted(folder: Path, checkpoints: Checkpoints, at: int = 5, **student: Any) -> Path:
    """A run that Ctrl-C ends in step `at`; returns its recipe."""
    tree = minimal(folder, checkpoints, "image paths", STEPS)
    if student:
        tree["student"] |= student
        tree["evaluate"] = {"examples": 0}
    recipe = write_recipe(folder, tree)
    finish = DistillationTrainer.finish_step

    def stop(trainer: DistillationTrainer) -> None:
        finish(trainer)
        if trainer.state.global_step == at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "finish_step", stop)
        assert command("distill", recipe, "--overwrite") == 130
    return recipe


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> Path:
    """The folder of an interrupted run; tests copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    interrupted(folder, checkpoints)
    return folder


def copied(stopped: Path, folder: Path) -> tuple[Path, Path]:
    """Recipe and output folder of a copy of the interrupted run."""
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    return write_recipe(folder, {**tree, "output_dir": str(folder / "out")}), folder / "out"


def test_an_interrupted_run_has_no_results(stopped: Path) -> None:
    assert sorted(path.name for path in (stopped / "out").iterdir()) == [
        "checkpoint-3", "recipe.yaml"]


def test_ctrl_c_names_the_way_on(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "distill", stop)
    tree = {"student": "s", "teacher": "t", "data": {"train": "x"}, "output_dir": "out"}
    done = cli("distill", write_recipe(tmp_path, tree))
    assert (done.status, done.out) == (130, "")
    assert len(done.err.splitlines()) == 1
    assert "--resume" in done.err


def test_a_fresh_start_over_an_unfinished_run_is_refused(
    stopped: Path, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    recipe, output = copied(stopped, tmp_path)
    done = cli("distill", recipe)
    assert done.status == 2
    assert all(word in done.err for word in ("checkpoint-3", "--resume", str(output)))
    assert (output / "checkpoint-3").exists()


def test_resume_ends_where_the_whole_run_ends(
    stopped: Path, cli: Callable[..., Outcome], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    recipe, output = copied(stopped, tmp_path)
    (output / "checkpoint-7").mkdir()  # what a crash in the middle of a save leaves
    done = cli("distill", recipe, "--resume")
    whole = cli("distill", recipe, f"output_dir={tmp_path}/whole")
    assert (done.status, whole.status) == (0, 0)
    resumed, straight = loaded(output / "results.json"), loaded(tmp_path / "whole/results.json")
    assert resumed["train"]["resumed_from"] == "checkpoint-3"
    assert resumed["eval"] == straight["eval"]
    for key in ("t", "answer_tokens"):
        assert resumed["train"][key] == straight["train"][key]
    assert resumed["train"]["answer_tokens"] > 0
    answers = [(place / "eval_answers.jsonl").read_text() for place in (output, tmp_path / "whole")]
    assert answers[0] == answers[1]
    assert resumed["train"]["steps"] == 8
    assert [row["step"] for row in resumed["history"]] == [
        row["step"] for row in straight["history"]]
    weights = [(place / "student/model.safetensors").read_bytes()
               for place in (output, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_a_lora_run_resumes(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    recipe = interrupted(tmp_path, checkpoints, peft=LORA)
    assert cli("distill", recipe, "--resume").status == 0
    assert cli("distill", recipe, f"output_dir={tmp_path}/whole").status == 0
    assert loaded(tmp_path / "out/results.json")["eval"] == loaded(
        tmp_path / "whole/results.json")["eval"]


def test_nothing_to_resume(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = cli("distill", write_recipe(tmp_path, minimal(tmp_path, checkpoints)), "--resume")
    assert done.status == 2
    assert "--resume" in done.err
    assert str(tmp_path / "out") in done.err
    assert not (tmp_path / "out").exists()


def test_a_fresh_start_over_a_finished_run_replaces_it(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, minimal(tmp_path, checkpoints, train=STEPS))
    assert cli("distill", recipe).status == 0
    first = loaded(tmp_path / "out/results.json")
    changes = ("train.max_steps=2", "train.save_steps=2")
    refused = cli("distill", recipe, *changes)
    assert (refused.status, loaded(tmp_path / "out/results.json")) == (2, first)
    assert "holds a finished run: give --overwrite" in refused.err
    assert cli("distill", recipe, *changes, "--overwrite").status == 0
    second = loaded(tmp_path / "out/results.json")
    assert (first["train"]["steps"], second["train"]["steps"]) == (8, 2)
    assert first["eval"]["before"] == second["eval"]["before"]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_stopped_rerun_of_a_finished_run_is_unfinished(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    """The old results.json must not pass for the new run's; the old student stays until then."""
    train = {"max_steps": 1, "save_steps": 1}
    recipe = write_recipe(tmp_path, minimal(tmp_path, checkpoints, "image paths", train))
    assert cli("distill", recipe).status == 0
    student = tmp_path / "out/student/model.safetensors"
    first = student.read_bytes()
    interrupted(tmp_path, checkpoints)
    assert not (tmp_path / "out/results.json").exists()
    assert student.read_bytes() == first
    done = cli("distill", recipe)
    assert done.status == 2
    assert "--resume" in done.err
    assert cli("distill", recipe, "--resume").status == 0
    assert student.read_bytes() != first


def test_a_mistake_leaves_a_finished_run_as_it_was(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, minimal(tmp_path, checkpoints, train={"max_steps": 1}))
    assert cli("distill", recipe).status == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert cli("distill", recipe, "student.peft={r: 4, target_modules: [nope]}").status == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


# ----- other objectives and students --------------------------------------------------------


def test_supervised_fine_tuning_needs_no_teacher(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    tree = minimal(tmp_path, checkpoints, "image paths", {"max_steps": 8}, objective="ce",
                   teacher=None)
    done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 0
    results = loaded(tmp_path / "out/results.json")
    before, after = results["eval"]["before"], results["eval"]["after"]
    assert after["nll"] < before["nll"]
    assert "kl" not in after
    assert results["train"]["t"] is None
    assert results["alignment"] is None


def test_texts_cut_are_not_left_out(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Two epochs of 16 texts, all of them too long."""
    train = {"max_steps": 4, "max_length": 6}
    tree = minimal(tmp_path, checkpoints, "texts", train, evaluate={"examples": 0})
    assert cli("distill", write_recipe(tmp_path, tree)).status == 0
    results = loaded(tmp_path / "out/results.json")["train"]
    assert results["texts_cut"] == 32
    assert results["records_left_out"] == {}


def test_two_terms(checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path) -> None:
    terms = {"terms": [{"name": "taid", "t_start": 0.2}, {"name": "ce", "weight": 0.25}],
             "kd_temperature": 2.0}
    train = {"max_steps": 3, "logging_steps": 1}
    tree = minimal(tmp_path, checkpoints, train=train, objective=terms)
    assert cli("distill", write_recipe(tmp_path, tree)).status == 0
    rows = [row for row in loaded(tmp_path / "out/results.json")["history"] if "loss/ce" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss/taid"] + 0.25 * row["loss/ce"], rel=1e-5)


@pytest.mark.parametrize("scenario", ["pairs", "image paths"])
def test_a_lora_student(
    scenario: str, checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    tree = minimal(tmp_path, checkpoints, scenario, {"max_steps": 20, "learning_rate": 2e-2})
    tree["student"]["peft"] = LORA
    tree["evaluate"] = {"examples": 0}
    finished = carry_out(tmp_path, tree, scenario)
    before, after = (finished.results["eval"][when] for when in ("before", "after"))
    assert after["kl"] < before["kl"]
    names = {path.name for path in finished.student.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert "model.safetensors" not in names
    auto = AutoModelForImageTextToText if finished.sees_images else AutoModelForCausalLM
    (AutoProcessor if finished.sees_images else AutoTokenizer).from_pretrained(finished.student)
    model, trained = auto.from_pretrained(finished.student).eval(), finished.trainer.model.eval()
    ids = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20).long()}
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, trained(**ids).logits)


def test_a_lora_student_answers_for_the_gallery(checkpoints: Checkpoints, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tree = minimal(tmp_path, checkpoints, train={"max_steps": 1})
    tree["student"]["peft"] = LORA
    assert command("distill", write_recipe(tmp_path, tree)) == 0
