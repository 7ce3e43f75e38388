"""Videos from the recipe to a benchmark's figure, as the command line carries them out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import Checkpoints, Outcome, answer, write_jsonl, write_recipe
from zoo.images import image

from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.tasks.videomme import BENCHMARK
from taid_vlm.config.data import DataSource, VideoSpec

Cli = Callable[..., Outcome]


def film(folder: Path, seed: int) -> str:
    """A file of 20 frames."""
    av = pytest.importorskip("av")
    (folder / "data").mkdir(exist_ok=True)
    path = folder / "data" / f"v{seed}.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(20):
            picture = image("square", seed=100 * seed + index // 4).resize((64, 48))
            output.mux(stream.encode(av.VideoFrame.from_image(picture)))
        output.mux(stream.encode())
    return f"data/{path.name}"


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    import random

    rng = random.Random(0)
    return [{"messages": [{"role": "user", "content": "<video>What happens?"},
                          {"role": "assistant", "content": answer(rng)}],
             "videos": [film(tmp_path, index)]} for index in range(4)]


def recipe(
    folder: Path, rows: list[dict[str, Any]], teacher: str, student: str, **data: Any
) -> Path:
    path = write_jsonl(folder / "train.jsonl", rows)
    return write_recipe(folder, {
        "teacher": teacher, "student": student, "objective": "taid",
        "data": {"train": str(path), "eval": str(path), "video": {"frames": 4}, **data},
        "train": {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2},
        "evaluate": {"examples": 1, "max_new_tokens": 2}, "output_dir": str(folder / "out")})


def test_a_run_over_files(
    rows: list[dict[str, Any]], checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "data" / "broken.mp4").write_bytes(b"no video at all")
    rows.append({**rows[0], "videos": ["data/broken.mp4"]})
    path = recipe(tmp_path, rows, checkpoints("qwen3_vl"),
                  checkpoints("internvl", "permuted", seed=1))
    inspected = cli("inspect", path, "--all", "--json")
    assert inspected.status == 0, inspected.err
    found = json.loads(inspected.out)
    assert found["record"]["images"] == 1
    (left_out,) = found["preflight"][0]["dropped"]
    assert (left_out["reason"], left_out["count"]) == ("unreadable video", 1), left_out
    planned = cli("plan", path)
    assert planned.status == 0, planned.err
    assert cli("distill", path).status == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    looks = json.dumps(results)
    assert "kl_frozen" in looks
    again = cli("inspect", tmp_path / "out" / "recipe.yaml", "--json")
    assert again.status == 0, again.err


def test_who_takes_no_video_is_refused_before_training(
    rows: list[dict[str, Any]], checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    outcome = cli("distill", recipe(tmp_path, rows, checkpoints("qwen3_vl"),
                                    checkpoints("llava", "permuted", seed=1)))
    assert (outcome.status, len(outcome.errors)) == (2, 1)
    assert "holds a video, which the student's processor (LlavaProcessor" in outcome.errors[0]
    assert not (tmp_path / "out" / "student").exists()


def video_mme(folder: Path) -> Path:
    return write_jsonl(folder / "mme.jsonl", [
        {"video_id": "001", "videoID": f"v{index // 2}", "question_id": f"00{index}-1",
         "duration": ("short", "long")[index // 2], "domain": "Knowledge", "question": "Which?",
         "options": ["A. Red.", "B. Blue.", "C. Green.", "D. None of them."],
         "answer": "ABCD"[index]} for index in range(4)])


def test_a_benchmark_about_videos(checkpoints: Checkpoints, cli: Cli, tmp_path: Path) -> None:
    film(tmp_path, 0)
    film(tmp_path, 1)
    data = video_mme(tmp_path)
    first, *_, last = read_questions(
        BENCHMARK, DataSource(path=str(data), video=VideoSpec(frames=3)))
    assert first.prompt[0] is None and first.prompt[1] is not None
    assert first.prompt[1].endswith("Which?\nA. Red.\nB. Blue.\nC. Green.\nD. None of them.\n"
                                    "The best answer is:")
    assert (first.answers, first.choices[3], first.group) == (("A",), "None of them.", "v0")
    assert len(first.images[0].load().frames) == 3
    assert last.tags == {"duration": "long", "domain": "Knowledge"}
    command = ("evaluate", "--model", checkpoints("qwen2_5_vl"), "--tasks", f"videomme={data}",
               "--output-dir", tmp_path / "eval", "--method", "likelihood", "--json")
    outcome = cli(*command, "--video-frames", "2")
    assert outcome.status == 0, outcome.err
    (results,) = json.loads(outcome.out).values()
    entry = results["tasks"]["videomme"]
    assert (entry["n"], entry["unanswered"], entry["video_frames"]) == (4, {}, 2)
    asked = [json.loads(line)["asked"] for line in
             (tmp_path / "eval" / "answers" / "videomme.jsonl").read_text().splitlines()]
    assert cli(*command, "--video-frames", "3").status == 0
    other = [json.loads(line)["asked"] for line in
             (tmp_path / "eval" / "answers" / "videomme.jsonl").read_text().splitlines()]
    assert not set(asked) & set(other)  # other frames are another question


def test_a_server_is_not_asked_about_videos() -> None:
    from taid_vlm.benchmarks.question import Question
    from taid_vlm.benchmarks.remote import chat_messages
    from taid_vlm.errors import SampleDropped
    from taid_vlm.records.videos import VideoRef

    with pytest.raises(SampleDropped, match="video for a served model"):
        chat_messages(Question("q", (None, "What?"), (VideoRef((image(),), "x"),)))
