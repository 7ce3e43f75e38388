"""What nobody expected is one message and a file, and nothing that is written holds a secret."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import Checkpoints, Outcome, loaded, pairs, write_jsonl, write_recipe

from taid_vlm.config.secrets import HIDDEN
from taid_vlm.runs import run
from taid_vlm.training.trainer import DistillationTrainer

Cli = Callable[..., Outcome]
SECRET = "hf_" + "aB3" * 11


@pytest.fixture
def recipe(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, {
        "teacher": checkpoints("llama"), "student": checkpoints("qwen2", seed=1),
        "data": {side: str(write_jsonl(tmp_path / f"{side}.jsonl", pairs(number, number)))
                 for side, number in (("train", 8), ("eval", 4))},
        "train": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1},
        "evaluate": {"examples": 1}, "output_dir": str(tmp_path / "out"),
    })


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TAID_VLM_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)


def fail(*args: Any, **kwargs: Any) -> None:
    raise ZeroDivisionError(f"by {SECRET}\nand more")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("owner", "name", "log"), [
    (run, "gather", "taid-vlm-error.log"), (DistillationTrainer, "train", "out/error.log")])
def test_one_message_and_a_file(owner: Any, name: str, log: str, recipe: Path, cli: Cli,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, fail)
    done = cli("distill", recipe)
    assert done.status == 1
    assert len(done.errors) == 1 and "Traceback" not in done.err
    assert f"error: ZeroDivisionError: by {HIDDEN} (the full traceback is in" in done.err
    assert log in done.err and SECRET not in done.err
    text = (recipe.parent / log).read_text()
    assert "Traceback" in text and "and more" in text and "in fail" in text
    assert SECRET not in text


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("error", "status"), [
    (OSError(28, "No space left on device", "/data/x"), 2), (OSError("of a library"), 1)])
def test_what_the_system_refuses_is_a_users_to_mend(
    error: OSError, status: int, recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(run, "gather", refuse)
    done = cli("distill", recipe)
    assert done.status == status
    assert len(done.errors) == 1
    assert ("'/data/x': No space left on device." in done.err) == (status == 2)


def test_a_variable_lets_it_through(
    recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAID_VLM_TRACEBACK", "1")
    monkeypatch.setattr(run, "gather", fail)
    with pytest.raises(ZeroDivisionError):
        cli("distill", recipe)


@pytest.mark.usefixtures("plain")
def test_where_no_file_can_be_written(
    recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe.parent / "taid-vlm-error.log").mkdir()
    monkeypatch.setattr(run, "gather", fail)
    done = cli("distill", recipe)
    assert done.status == 1 and "TAID_VLM_TRACEBACK=1" in done.err


def test_a_run_writes_no_secret(recipe: Path, cli: Cli) -> None:
    """Not into the recipe, the report, the results or a checkpoint, and not onto the screen."""
    done = cli("distill", recipe, f"student.init_kwargs.token={SECRET}",
               f"teacher.init_kwargs={{token: {SECRET}}}")
    assert done.status == 0, done.err
    assert SECRET not in done.out + done.err
    output = recipe.parent / "out"
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "report.html", "results.json"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert HIDDEN in (output / "recipe.yaml").read_text()
    assert loaded(output / "results.json")["recipe_hash"]


def test_a_refusal_shows_no_secret(recipe: Path, cli: Cli) -> None:
    done = cli("distill", recipe, "data.train=https://me:open-sesame@host/x.jsonl")
    assert done.status == 2 and "host/x.jsonl" in done.err
    assert "sesame" not in done.err


def test_taid_says_what_to_look_at(
    recipe: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    """Its target moves, so the log leads with what is comparable."""
    done = cli("distill", recipe, "objective={name: taid, alpha: auto}")
    assert done.status == 0
    page = (recipe.parent / "out" / "report.html").read_text()
    assert caplog.text.count("a target that moves with t") == 1
    assert "a target that moves with t" in page
    assert page.index("KL(teacher ‖ student)") < page.index("Training loss")
    logged = [row for row in loaded(recipe.parent / "out/results.json")["history"] if "loss" in row]
    assert {next(iter(row)) for row in logged} == {"kl"}
    caplog.clear()
    cli("distill", recipe, "objective=forward_kl", f"output_dir={recipe.parent}/other")
    assert "moves with t" not in caplog.text


def test_alpha_auto_is_not_told_to_be_auto(
    recipe: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    cli("distill", recipe, "objective={name: taid, alpha: auto}", "train.max_steps=1")
    assert "never acted" in caplog.text and "too short for it (steps: 1)" in caplog.text
    assert "Use alpha: auto" not in caplog.text


def test_a_constant_alpha_is_told_of_auto(
    recipe: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    cli("distill", recipe, "objective={name: taid, alpha: 1e-9}")
    assert "never acted" in caplog.text and "Use alpha: auto" in caplog.text
