"""The student's model card says what was measured, and nothing of the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.recipes import Checkpoints, Outcome, loaded, pairs, picture_rows, write_jsonl, write_recipe

from taid_vlm.report.card import model_card, public_name


def distilled(folder: Path, checkpoints: Checkpoints, cli: Callable[..., Outcome],
              images: bool = False, **sections: Any) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Metadata and text of a run's card, and its results."""
    teacher, student = ("internvl", "llava") if images else ("llama", "qwen2")
    make = (lambda n, seed: picture_rows(folder, n, seed)) if images else pairs
    done = cli("distill", write_recipe(folder, {
        "teacher": checkpoints(teacher), "student": checkpoints(student, seed=1),
        "data": {side: str(write_jsonl(folder / f"{side}.jsonl", make(number, number)))
                 for side, number in (("train", 8), ("eval", 4))},
        "train": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"},
        "evaluate": {"examples": 0}, "output_dir": str(folder / "out"), **sections}))
    assert done.status == 0, done.err
    _, head, text = (folder / "out/student/README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text, loaded(folder / "out/results.json")


@pytest.mark.parametrize("images", [False, True])
def test_the_card_of_a_run(images: bool, checkpoints: Checkpoints, cli: Callable[..., Outcome],
                           tmp_path: Path) -> None:
    head, text, results = distilled(tmp_path, checkpoints, cli, images)
    assert head == {"library_name": "transformers", "tags": ["distillation", "taid-vlm"],
                    "pipeline_tag": "image-text-to-text" if images else "text-generation"}
    before, after = (results["eval"][when] for when in ("before", "after"))
    assert (f"| {before['kl']:.4f} ± {before['kl_stderr']:.4f} | {after['kl']:.4f} ± "
            f"{after['kl_stderr']:.4f} |") in text
    for words in ("train.jsonl", "eval.jsonl (4 records)", "2 steps", f"seed {results['seed']}",
                  "'name': 'taid'", results["recipe_hash"], f"over {after['n_tokens']:,} tokens",
                  "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"):
        assert words in text, words
    for path in (tmp_path, checkpoints.folder):
        assert str(path) not in text and path.name + "/" not in text
    assert "icen" not in text  # nobody knows the licence


def test_without_teacher_and_held_out_data(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    data = {"train": str(write_jsonl(tmp_path / "train.jsonl", pairs(8)))}
    _, text, _ = distilled(tmp_path, checkpoints, cli, teacher=None, objective="ce", data=data)
    assert "fine-tuned" in text and "Teacher" not in text and "Held-out" not in text


def test_stages_are_named(
    checkpoints: Checkpoints, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    stages = [{"name": "first", "train": {"max_steps": 1}}, {"name": "second"}]
    _, text, results = distilled(tmp_path, checkpoints, cli, stages=stages)
    assert "2 steps, after 1 of stage first" in text
    recipe = (tmp_path / "out/recipe.yaml").read_text()
    hub = recipe.replace(checkpoints("qwen2", seed=1), "me/student")
    assert "base_model: me/student\n" in model_card(results, hub)
    assert "# me/student, distilled from " in model_card(results, hub)


@pytest.mark.parametrize(("name", "shown"), [
    ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("/home/me/secret/model", "model"),
    ("runs/a/student", "student"), ("~/models/x", "x"), ("./x", "x"), ("../a/b.jsonl", "b.jsonl")])
def test_paths_are_cut(name: str, shown: str) -> None:
    assert public_name(name) == shown
