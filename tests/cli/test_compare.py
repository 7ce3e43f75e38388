"""`taid-vlm compare` over runs that `taid-vlm distill` has just made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import Checkpoints, Outcome, loaded, pairs, write_jsonl, write_recipe

from taid_vlm.commands.compare import compare
from taid_vlm.compare import as_markdown
from taid_vlm.evaluation.answers import read_answers


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> Path:
    """Different tokenizers, so that not every figure is of every token."""
    folder = tmp_path_factory.mktemp("compared")
    tree: dict[str, Any] = {
        "teacher": {"model_name_or_path": checkpoints("llama")},
        "student": {"model_name_or_path": checkpoints("qwen2", "other", seed=1)},
        "data": {side: str(write_jsonl(folder / f"{side}.jsonl", pairs(number, number)))
                 for side, number in (("train", 16), ("eval", 12))},
        "train": {"max_steps": 4, "learning_rate": 5e-3, "use_cpu": True, "disable_tqdm": True,
                  "logging_steps": 2},
        "evaluate": {"examples": 2, "max_new_tokens": 4},
        "output_dir": str(folder / "taid"),
    }
    return write_recipe(folder, tree)


@pytest.fixture(scope="module")
def runs(recipe: Path) -> list[Path]:
    from cli.recipes import command

    made = []
    for name in ("taid", "sft"):
        folder = recipe.parent / name
        assert command("distill", recipe, f"objective.name={name}", f"output_dir={folder}") == 0
        made.append(folder)
    return made


def test_a_run_says_what_it_was_measured_on(runs: list[Path]) -> None:
    first, second = (loaded(folder / "results.json") for folder in runs)
    assert first["data"] == second["data"]
    assert first["data"]["eval"]["records"] == 12
    assert len(first["data"]["eval"]["sha256"]) == 16
    assert first["train"]["answer_tokens"] == second["train"]["answer_tokens"] > 0
    logged = next(line for line in first["history"] if "loss" in line)
    assert "kl" in logged
    assert "jsd" not in logged  # what costs is for evaluation only
    example = first["examples"][0]
    assert set(example["answers"]) == {"teacher", "before", "after"}
    assert example["source"] == "eval.jsonl:1"


def test_answers_add_up_to_the_results(runs: list[Path]) -> None:
    results = loaded(runs[0] / "results.json")
    answers = read_answers(runs[0] / "eval_answers.jsonl")
    for when in ("before", "after"):
        summary = results["eval"][when]
        names = [name for name in answers[0].after if name in summary]
        assert {"kl", "nll", "jsd", "chunk_kl", "head_mass"} <= set(names)
        for name in names:
            total = math.fsum(getattr(a, when).get(name, 0.0) for a in answers)
            weight = sum(a.size(name) for a in answers)
            assert total / weight == pytest.approx(summary[name], rel=1e-6, abs=1e-9), name


def test_compared(runs: list[Path], cli: Callable[..., Outcome], tmp_path: Path) -> None:
    done = cli("compare", f"TAID={runs[0]}", f"SFT={runs[1]}", "--baseline", "SFT", "--json",
               "--html", tmp_path / "page.html")
    assert done.status == 0
    found = json.loads(done.out)
    for folder, name in zip(runs, ("TAID", "SFT"), strict=True):
        after = loaded(folder / "results.json")["eval"]["after"]
        for key in ("kl", "chunk_kl", "nll", "ece"):
            assert found["held_out"][key]["figures"][name]["value"] == pytest.approx(
                after[key], rel=1e-6)
    difference = found["held_out"]["kl"]["against_baseline"]["TAID"]
    assert difference["test"] == "paired t"
    assert not found["warnings"]
    page = (tmp_path / "page.html").read_text()
    assert "KL of chunks" in page
    assert "TAID and SFT, compared" in page


def test_from_python(runs: list[Path], tmp_path: Path) -> None:
    comparison = compare(runs=[f"TAID={runs[0]}", f"SFT={runs[1]}"], baseline="SFT",
                         html=tmp_path / "page.html", markdown=tmp_path / "card.md")
    assert (comparison.names, comparison.baseline) == (["TAID", "SFT"], "SFT")
    assert as_markdown(comparison) == (tmp_path / "card.md").read_text()
    assert "TAID and SFT, compared" in (tmp_path / "page.html").read_text()


def test_other_held_out_data_are_refused(
    runs: list[Path], recipe: Path, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "eval.jsonl", pairs(12, 3))
    assert cli("distill", recipe, f"data.eval={other}", "train.max_steps=1",
               f"output_dir={tmp_path}/other").status == 0
    done = cli("compare", runs[0], tmp_path / "other")
    assert done.status == 2
    assert len(done.errors) == 1
    assert "the held-out data (sha256) is not the same" in done.errors[0]
