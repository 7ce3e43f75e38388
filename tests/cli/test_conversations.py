"""Conversations with tools, thoughts and weights, from a recipe to a student and its answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.recipes import Checkpoints, Outcome, command, loaded, write_jsonl, write_recipe
from zoo import templates

TOOL = {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}
CALL = {"name": "look", "arguments": '{"at": "the left"}'}
PRINTED = '<tool_call>\n{"name": "look", "arguments": {"at": "the left"}}\n</tool_call>'
ROWS: list[dict[str, Any]] = [
    {"tools": json.dumps([TOOL]), "system": "Be kind.", "messages": [
        {"role": "user", "content": "what"},
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "a circle"},
        {"role": "tool", "content": {"colour": "red"}},
        {"role": "assistant", "content": "a red circle", "weight": 0.5, "score": 3}]},
    {"messages": [
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": "<think>two</think>blue", "lang": "en"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "a green square", "train": False},
        {"role": "user", "content": "how does <image> look"},
        {"role": "assistant", "content": "  left\n"}]},
]


@pytest.fixture
def recipe(tmp_path: Path, checkpoints: Checkpoints) -> Path:
    template, other = tmp_path / "teacher.jinja", tmp_path / "student.jinja"
    template.write_text(templates.hermes())
    other.write_text(templates.hermes())
    data = str(write_jsonl(tmp_path / "train.jsonl", ROWS * 4))
    return write_recipe(tmp_path, {
        "teacher": {"model_name_or_path": checkpoints("qwen3"), "chat_template": str(template)},
        "student": {"model_name_or_path": checkpoints("qwen2", "permuted", 1),
                    "chat_template": str(other),
                    "chat_template_kwargs": {"enable_thinking": False}},
        "data": {"train": data, "eval": data}, "objective": {"terms": [
            {"name": "kl"}, {"name": "ce"}]},
        "train": {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "bf16": True,
                  "per_device_train_batch_size": 4, "logging_steps": 1},
        "evaluate": {"examples": 2, "max_new_tokens": 4}, "output_dir": str(tmp_path / "out")})


def sums(folder: Path) -> Path:
    """A benchmark of one question."""
    write_jsonl(folder / "sums.jsonl", [
        {"id": "1", "question": "1 + 1?", "options": ["2", "3"], "answer": "A"}])
    (folder / "sums.yaml").write_text(yaml.safe_dump(
        {"type": "multiple_choice", "data": "sums.jsonl", "images": False}))
    return folder / "sums.yaml"


LEARNED = [f"<think>\na circle\n</think>\n\n{PRINTED}<|im_end|>", "a red circle<|im_end|>"]


@pytest.mark.parametrize(("record", "learned"), [
    (0, LEARNED), (1, ["blue<|im_end|>", "  left\n<|im_end|>"])])
def test_inspect_says_what_both_models_learn(
    record: int, learned: list[str], recipe: Path, cli: Callable[..., Outcome]
) -> None:
    done = cli("inspect", recipe, "--record", str(record), "--json")
    account = json.loads(done.out)
    assert done.status == 0
    for role in ("teacher", "student"):
        assert account["record"]["sides"][role]["learned"] == learned
    notes = account["preflight"][0]["notes"]
    assert notes["messages[].score: nothing reads it"] == 4
    assert notes["<image>: text, for the row has no image"] == 4
    assert any("in 4 records: messages[].lang: nothing reads it" in warning
               for warning in account["verdict"]["warnings"])


def test_a_run_learns_them_and_its_student_is_asked_as_it_was_taught(
    recipe: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    done = cli("distill", recipe)
    assert done.status == 0, done.err
    train = loaded(tmp_path / "out" / "results.json")["train"]
    assert train["records_left_out"] == {}
    assert train["without_effect"] == {
        "messages[].score: nothing reads it": 4, "messages[].lang: nothing reads it": 4,
        "<image>: text, for the row has no image": 4,
        **{f"a thought that the {role}'s chat template takes out of an earlier turn": 4
           for role in ("teacher", "student")}}
    kwargs = {}
    for name, more in (("run", []), ("other", ["--chat-template-kwargs", "{}"])):
        asked = ("evaluate", "--model", tmp_path / "out", "--tasks", sums(tmp_path),
                 "--max-new-tokens", "2", "--output-dir", tmp_path / name, *more)
        assert command(*asked) == 0
        kwargs[name] = loaded(tmp_path / name / "results.json")["model"].get(
            "chat_template_kwargs")
    assert kwargs == {"run": {"enable_thinking": False}, "other": None}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_variable_that_the_template_does_not_read_ends_a_run_before_it_begins(
    role: str, recipe: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    done = cli("distill", recipe, f"{role}.chat_template_kwargs.enable_thinkin=false")
    assert done.status == 2
    assert done.errors[0].startswith(
        f"error: {role}.chat_template_kwargs: the chat template reads no 'enable_thinkin'. "
        "Did you mean 'enable_thinking'?")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "said"), [
    ("[1]", "it must be a JSON object"), ('{"enable_thinkin": 1}', "reads no 'enable_thinkin'")])
def test_variables_on_the_command_line_are_checked(
    value: str, said: str, checkpoints: Checkpoints, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    done = cli("evaluate", "--model", checkpoints("qwen3"), "--tasks", sums(tmp_path),
               "--output-dir", tmp_path / "out", "--chat-template-kwargs", value)
    assert done.status == 2
    assert said in done.errors[0]
