"""`taid-vlm inspect` shows what is compared before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.recipes import Checkpoints, Outcome, picture_rows, write_jsonl, write_recipe

from taid_vlm.config.recipe import load_recipe
from taid_vlm.doctor import inspect_recipe
from taid_vlm.doctor.text import as_text

Cli = Callable[..., Outcome]
ANSWER = "a red square"


def recipe(folder: Path, rows: Sequence[dict[str, Any]], **models: str) -> Path:
    data = write_jsonl(folder / "train.jsonl", rows)
    return write_recipe(folder, {
        **models, "data": {"train": str(data)}, "output_dir": str(folder / "out"),
        "objective": "taid" if "teacher" in models else "ce", "train": {"use_cpu": True},
    })


def sides(text: str) -> dict[str, str]:
    """{role: what is shown of it}, the head line first."""
    found = re.split(r"^--- (teacher|student): ", re.split("^marks: |    teacher: position", text,
                                                            flags=re.MULTILINE)[0],
                     flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def marked(shown: str) -> str:
    return "".join(re.findall("⟦(.*?)⟧", shown, flags=re.DOTALL))


@pytest.fixture
def vision_pair(checkpoints: Checkpoints) -> dict[str, str]:
    return {"teacher": checkpoints("internvl"),
            "student": checkpoints("llava", "permuted", seed=1)}


@pytest.fixture
def text_pair(checkpoints: Checkpoints) -> dict[str, str]:
    return {"teacher": checkpoints("llama"), "student": checkpoints("qwen2", seed=1)}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspecting loads processors and configurations only."""
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr("taid_vlm.models.loading.load_model", refuse)
    torch.set_num_threads(1)


def test_a_pair_with_images(cli: Cli, vision_pair: dict[str, str], tmp_path: Path) -> None:
    rows = [{**row, "completion": ANSWER} for row in picture_rows(tmp_path, 4)]
    done = cli("inspect", recipe(tmp_path, rows, **vision_pair), "--record=1")
    assert done.status == 0
    assert not done.errors
    head, shown = done.out.split("---")[0], sides(done.out)
    assert "train.jsonl:2" in head
    assert re.search(r"case +b: ", head)
    aligned, total = re.search(r"aligned +(\d+) of (\d+) answer tokens", head).groups()
    assert 0 < int(aligned) <= int(total)
    assert shown.keys() == {"teacher", "student"}
    for text in shown.values():
        assert re.search(r"\[image: \d+ tokens\]", text)
        assert "<IMG_CONTEXT>" not in text
        assert marked(text).startswith(ANSWER)
        assert "what is this" in text
        assert "what" not in marked(text)


def test_image_tokens_are_counted_as_the_processor_gives_them(
    cli: Cli, vision_pair: dict[str, str], tmp_path: Path
) -> None:
    """LLaVA: always 16. InternVL: 4 per tile, by the picture's shape."""
    path = recipe(tmp_path, picture_rows(tmp_path, 4), **vision_pair)
    counts = {role: [] for role in ("teacher", "student")}
    for index in range(3):  # a small square, a square, a wide picture
        for role, text in sides(cli("inspect", path, f"--record={index}").out).items():
            counts[role].append(int(re.search(r"\[image: (\d+) tokens\]", text)[1]))
    assert counts["student"] == [16, 16, 16]
    assert all(count >= 4 for count in counts["teacher"])
    assert len(set(counts["teacher"])) > 1


def test_two_images_are_folded_one_by_one(
    cli: Cli, vision_pair: dict[str, str], tmp_path: Path
) -> None:
    picture_rows(tmp_path, 2)
    rows = [{"prompt": "<image> and <image>?", "completion": ANSWER, "images": ["0.png", "1.png"]}]
    done = cli("inspect", recipe(tmp_path, rows, **vision_pair))
    for text in sides(done.out).values():
        assert len(re.findall(r"\[image: \d+ tokens\]", text)) == 2


def test_a_pair_of_text_models(cli: Cli, text_pair: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": "what is it", "completion": ANSWER}]
    done = cli("inspect", recipe(tmp_path, rows, **text_pair))
    assert done.status == 0
    assert "[image" not in done.out
    for text in sides(done.out).values():
        assert marked(text).startswith(ANSWER)
        assert "what is it" in text


def test_the_table_lists_the_tokens_of_both_sides(
    cli: Cli, text_pair: dict[str, str], tmp_path: Path
) -> None:
    rows = [{"prompt": "what is it", "completion": "a red square " * 20}]
    done = cli("inspect", recipe(tmp_path, rows, **text_pair))
    lines = done.out.split("student: position, id, token")[1].strip("\n").splitlines()
    cells = [line.split() for line in lines[:-1]]
    assert len(cells) == 24
    assert re.fullmatch(r"    ... and \d+ more", lines[-1])
    assert cells[0][2] == cells[0][5]
    assert [int(cell[0]) for cell in cells] == list(range(int(cells[0][0]), int(cells[0][0]) + 24))


def test_a_plain_text_is_marked_whole(
    cli: Cli, text_pair: dict[str, str], tmp_path: Path
) -> None:
    done = cli("inspect", recipe(tmp_path, [{"text": ANSWER}], **text_pair))
    shown = sides(done.out)
    # the student has nothing before its first token, so that one cannot be predicted
    assert "⟨a⟩" in shown["teacher"]  # the teacher's BOS predicts it, with nobody to compare to
    for text, end in ((shown["teacher"], "<|eot_id|>"), (shown["student"], "<|im_end|>")):
        assert marked(text) == ANSWER.removeprefix("a") + end
        assert ANSWER in re.sub("[⟦⟧⟨⟩]", "", text)


def test_without_a_teacher(cli: Cli, checkpoints: Checkpoints, tmp_path: Path) -> None:
    rows = [{"prompt": "what is it", "completion": ANSWER}]
    done = cli("inspect", recipe(tmp_path, rows, student=checkpoints("qwen2", seed=1)))
    assert done.status == 0
    assert re.search(r"learned +\d+ of \d+ answer tokens", done.out)
    shown = sides(done.out)
    assert shown.keys() == {"student"}
    assert marked(shown["student"]).startswith(ANSWER)


def test_every_answer_of_a_conversation_is_marked(
    cli: Cli, vision_pair: dict[str, str], tmp_path: Path
) -> None:
    picture_rows(tmp_path, 2)
    turns = [("user", "<image>what"), ("assistant", "a red one"), ("user", "and"),
             ("assistant", "two circle")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns],
             "image": "0.png"}]
    for text in sides(cli("inspect", recipe(tmp_path, rows, **vision_pair)).out).values():
        assert "a red one" in marked(text)
        assert "two circle" in marked(text)
        assert "what" not in marked(text)


def test_colours_only_where_asked(text_pair: dict[str, str], tmp_path: Path) -> None:
    path = recipe(tmp_path, [{"prompt": "what", "completion": ANSWER}], **text_pair)
    found = inspect_recipe(load_recipe(path))
    plain, coloured = (as_text(found, colour=colour) for colour in (False, True))
    assert "\033[" not in plain
    assert re.sub(r"\033\[\d+m", "", coloured) == plain


@pytest.mark.parametrize("colour", [False, True])
def test_a_record_does_not_steer_the_terminal(
    colour: bool, cli: Cli, text_pair: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steering = "\x1b[2J\x1b]0;owned\x07\r\x9b1A"
    rows = [{"prompt": f"what {steering}", "completion": f"{ANSWER}{steering}"}]
    path = recipe(tmp_path, rows, **text_pair)
    monkeypatch.setattr("sys.stdout.isatty", lambda: colour)
    done = cli("inspect", path, "--all")
    assert done.status == 0, done.err
    assert ("\x1b[" in done.out) == colour
    ours = re.sub(r"\x1b\[\d+m", "", done.out)
    assert not set(ours) & set("\x1b\x07\r\x9b")
    for text in sides(ours).values():
        assert r"what \x1b[2J\x1b]0;owned\x07\r\x9b1A" in text
        assert marked(text).replace("⟧⟦", "").startswith(ANSWER)
        assert r"\x1b[2J" in marked(text)


def test_streamed_records_can_be_looked_at(
    cli: Cli, text_pair: dict[str, str], tmp_path: Path
) -> None:
    from cli.recipes import pairs, write_parquet

    path = recipe(tmp_path, [{"text": "x"}], **text_pair)
    data = write_parquet(tmp_path / "train.parquet", pairs(3))
    options = [f"data.train={{path: {data}, streaming: true}}", "train.max_steps=1"]
    assert cli("inspect", path, *options, "--record=2").status == 0
    done = cli("inspect", path, *options, "--record=3")
    assert done.status == 2
    assert "--record 3" in done.err


@pytest.mark.parametrize("row", [
    {"prompt": "what", "completion": " "},
    {"prompt": "<image>what", "completion": ANSWER, "image": "1.png"},
])
def test_a_record_that_would_be_left_out_says_why(
    row: dict[str, Any], cli: Cli, vision_pair: dict[str, str], tmp_path: Path
) -> None:
    picture_rows(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"broken")
    good = {"prompt": "<image>what", "completion": ANSWER, "image": "0.png"}
    done = cli("inspect", recipe(tmp_path, [good, row], **vision_pair), "--record=1")
    assert done.status == 2
    assert "train.jsonl:2" in done.err
