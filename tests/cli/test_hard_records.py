"""Records as users have them: each costs itself, wherever it stands, and never the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import (
    Checkpoints,
    Outcome,
    command,
    loaded,
    pairs,
    picture_rows,
    png,
    write_jsonl,
    write_parquet,
    write_recipe,
)
from PIL import Image

FAST = {"learning_rate": 5e-3, "use_cpu": True, "disable_tqdm": True, "logging_steps": 5,
        "per_device_train_batch_size": 4}
# a width that is text, and an orientation that makes Pillow write the block anew
ODD_EXIF = (b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\0\0\x02\0\0\0\x06\0\0\0&"
            b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0maker\0")
TURNS = {"messages": [{"role": role, "content": "a red circle"}
                      for role in ("user", "assistant") * 2]}
REFUSED = {"messages": [{"role": role, "content": "a red circle"}
                        for role in ("user", "user", "assistant")]}
NO_ANSWER = {"messages": [{"role": "user", "content": "what is a red circle"}]}


def recipe(folder: Path, teacher: Any, student: Any, data: dict[str, Any], **train: Any) -> Path:
    return write_recipe(folder, {
        "teacher": teacher, "student": student, "data": data, "objective": {"name": "taid"},
        "train": {**FAST, "max_steps": 4, **train}, "output_dir": str(folder / "out"),
        "evaluate": {"examples": 3, "max_new_tokens": 4}})


@pytest.fixture
def pictures(tmp_path: Path, checkpoints: Checkpoints) -> Path:
    """Every second record's picture has odd EXIF, of the held-out ones the first."""
    rows = picture_rows(tmp_path, 8)
    Image.new("RGB", (48, 40), "red").save(tmp_path / "odd.jpg", exif=ODD_EXIF)
    odd = [{**row, "image": "odd.jpg"} for row in rows]
    data = {"train": str(write_jsonl(tmp_path / "train.jsonl", [
        row for pair in zip(rows, odd, strict=True) for row in pair])),
        "eval": str(write_jsonl(tmp_path / "eval.jsonl", [*odd[:2], *rows[:4]]))}
    return recipe(tmp_path, checkpoints("internvl"), checkpoints("llava", "permuted", 1), data,
                  max_left_out=1)


def test_odd_pictures_are_counted_alike_in_training_and_evaluation(
    pictures: Path, tmp_path: Path
) -> None:
    assert command("distill", pictures) == 0
    results = loaded(tmp_path / "out" / "results.json")
    assert results["train"]["records_left_out"] == {"unreadable image": 8}  # 4 steps of 4
    for when in ("before", "after"):
        assert results["eval"][when]["dropped"] == {"unreadable image": 2}
        assert results["eval"][when]["n_answers"] == 4
    # the gallery asks about records that can be used
    assert [e["source"] for e in results["examples"]] == [f"eval.jsonl:{n}" for n in (3, 4, 5)]


def test_odd_pictures_are_counted_by_inspect(
    pictures: Path, cli: Callable[..., Outcome]
) -> None:
    done = cli("inspect", pictures, "--all")
    assert done.status == 0
    assert "8 x unreadable image" in done.out
    assert "train.jsonl:2, train.jsonl:4, train.jsonl:6, ..." in done.out
    assert "eval.jsonl:1, eval.jsonl:2" in done.out
    assert "Traceback" not in done.out + done.err


def test_held_out_records_that_cannot_be_answered_come_first(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """One that the template refuses, one without an answer; both are counted."""
    teacher, student = checkpoints("llama"), checkpoints("qwen2", "plain", 1)
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    data = {"train": str(write_jsonl(tmp_path / "train.jsonl", pairs(16))),
            "eval": str(write_jsonl(tmp_path / "eval.jsonl", [REFUSED, NO_ANSWER, *pairs(4)]))}
    path = recipe(tmp_path, teacher, {"model_name_or_path": student,
                                      "chat_template": str(template)}, data)
    assert command("distill", path) == 0
    results = loaded(tmp_path / "out" / "results.json")
    assert results["eval"]["after"]["dropped"] == {"chat template refused": 1, "no answer": 1}
    assert [e["source"] for e in results["examples"]] == [f"eval.jsonl:{n}" for n in (3, 4, 5)]


def test_a_conversation_deep_in_a_base_models_data(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"train": str(write_jsonl(tmp_path / "train.jsonl", [*pairs(40), TURNS, *pairs(3)]))}
    path = recipe(tmp_path, checkpoints("llama"), checkpoints("gpt2"), data, max_steps=11)
    assert command("distill", path) == 0
    results = loaded(tmp_path / "out" / "results.json")
    assert results["train"]["steps"] == 11
    assert results["train"]["records_left_out"] == {"conversation for a model of one question": 1}
    assert "train.jsonl:41 is a conversation" in caplog.text


def test_a_malformed_row_in_a_stream(checkpoints: Checkpoints, tmp_path: Path) -> None:
    rows = pairs(60)
    rows[50] = {**rows[50], "prompt": None}
    sides = {side: {"path": str(write_parquet(tmp_path / f"{side}.parquet", rows)),
                    "streaming": True} for side in ("train", "eval")}
    sides["eval"]["max_records"] = 60
    path = recipe(tmp_path, checkpoints("llama"), checkpoints("qwen2", "plain", 1), sides,
                  max_steps=15)
    assert command("distill", path) == 0
    results = loaded(tmp_path / "out" / "results.json")
    assert results["train"]["records_left_out"] == {"malformed record": 1}
    assert results["eval"]["after"]["dropped"] == {"malformed record": 1}
    assert results["eval"]["after"]["n_answers"] == 59


def test_an_image_behind_the_rows_that_are_looked_at_first(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """For a text model; 512 rows of JSONL are checked before training."""
    (tmp_path / "a.png").write_bytes(png(0))
    late = {"prompt": "what", "completion": "a circle", "image": "a.png"}
    data = {"train": str(write_jsonl(tmp_path / "train.jsonl", [*pairs(600), late]))}
    path = recipe(tmp_path, checkpoints("llama"), checkpoints("qwen2", "plain", 1), data,
                  max_steps=4, per_device_train_batch_size=151)
    assert command("distill", path) == 0
    results = loaded(tmp_path / "out" / "results.json")
    assert results["train"]["records_left_out"] == {"image for a text model": 1}
