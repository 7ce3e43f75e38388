"""Videos through every family that takes them: the same frames, sampled once, aligned as images."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_contract import adapter, built, covered, logits, paired
from zoo import TEXT_FAMILIES, VLM_FAMILIES
from zoo.images import image

from taid_vlm.adapters import ModelAdapter
from taid_vlm.alignment import student_positions, supervised_positions, teacher_positions
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.config.data import VideoSpec
from taid_vlm.errors import SampleDropped
from taid_vlm.evaluation.canary import canary
from taid_vlm.models.generation import generate_answers
from taid_vlm.records import ImageRef, Record, parse_record
from taid_vlm.records.videos import Clip, VideoRef

torch.set_num_threads(1)

VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "hy_v4_vl", "qwen3_5",
                  "internvl", "smolvlm", "llava_onevision", "gemma3", "gemma4")
SIDES = ("left", "right")
ANSWER = "The picture shows a red square, then 图片 🐈."
TURNS: dict[str, list[Any]] = {
    "video": ["<video>What happens?", ANSWER],
    "two": ["<video>Like <video>?", ANSWER, "Sure?", "It is"],
    "both": ["<image>In <video> or <image>?", ANSWER],
    "image": ["<image>What is in this picture?", "The picture shows a red square."],
    "text": ["How many objects?", "The 21 of them."],
}


def frames(seed: int, number: int = 6) -> list[Image.Image]:
    return [image("square", seed=seed + i) for i in range(number)]


@cache
def record(kind: str, still: bool = False) -> Record:
    turns, own = TURNS[kind], 100 * list(TURNS).index(kind)
    text = "".join(turns)
    clips = [frames(own + 10 * i, 6 - i) for i in range(text.count("<video>"))]
    clips = [clip[:1] * len(clip) for clip in clips] if still else clips
    pictures = [image("odd", seed=own + 50 + i) for i in range(text.count("<image>"))]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn}
                for i, turn in enumerate(turns)]
    row = {"messages": messages, "videos": clips or None, "images": pictures or None}
    return parse_record(row, kind, video=VideoSpec(frames=4))


def shown(model: ModelAdapter, kinds: list[str], side: Any = "right", still: bool = False) -> Any:
    items = [record(kind, still) for kind in kinds]
    pictures = [[ref.load() for ref in item.images] for item in items]
    return model.encode([model.render(item) for item in items], pictures, side)


@cache
def encoded(family: str, role: str, side: str) -> Any:
    return shown(adapter(family, role), list(TURNS), side)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_all_that_is_learned_is_the_answer(family: str) -> None:
    for kind, row in zip(TURNS, encoded(family, "student", "right").rows, strict=True):
        assert len(row.images) == len(record(kind).images)
        for text, answer in zip(record(kind).answers, row.answers, strict=True):
            said = b"".join(covered(row, token.position)[len(token.prefix) :]
                            for token in answer.tokens)
            assert said == text.encode()
            assert answer.end_of_turn is not None


@pytest.mark.parametrize(("teacher", "student"), itertools.permutations(VIDEO_FAMILIES, 2))
def test_every_token_of_every_answer_is_aligned(teacher: str, student: str) -> None:
    pairing = paired(teacher, student)
    for side, (index, _) in itertools.product(SIDES, enumerate(TURNS)):
        t = encoded(teacher, "teacher", side).rows[index]
        s = encoded(student, "student", side).rows[index]
        found = pairing.align(t, s)
        for role, row in ((teacher_positions, t), (student_positions, s)):
            assert [p for pair in found for p in role(pair)] == [
                p for p, _ in supervised_positions(row)]


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_batch_mates_and_padding_do_not_matter(family: str) -> None:
    model, students = built(family, "permuted").model, adapter(family, "student")
    together = [logits(model, encoded(family, "student", side)) for side in SIDES]
    for index, kind in enumerate(TURNS):
        alone = logits(model, shown(students, [kind]))[0]
        for batch in together:
            torch.testing.assert_close(batch[index], alone, rtol=1e-3, atol=4e-3)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_every_frame_is_seen(family: str) -> None:
    """Against a video that stands still, answers change; those without a video do not."""
    model, students = built(family, "permuted").model, adapter(family, "student")
    moving = logits(model, encoded(family, "student", "right"))
    standing = logits(model, shown(students, list(TURNS), still=True))
    for kind, a, b in zip(TURNS, moving, standing, strict=True):
        change = float((a - b).abs().max())
        assert change > 1e-2 if "video" in kind or kind in ("two", "both") else change < 4e-3, kind


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_the_pixels_are_those_of_the_processor_alone(family: str) -> None:
    """Four frames of six, and no second choice among them."""
    clip = record("video").images[0].load()
    assert isinstance(clip, Clip)
    assert clip.indices == (0, 2, 3, 5)
    expected = [frames(0)[i] for i in clip.indices]
    assert all(np.array_equal(a, b) for a, b in zip(clip.frames, expected, strict=True))
    students, processor = adapter(family, "student"), built(family, "permuted").processor
    inputs = shown(students, ["video"]).inputs
    if family == "gemma3":
        own = processor.image_processor(list(clip.frames), return_tensors="pt")["pixel_values"]
    else:
        own = next(iter(value for key, value in processor.video_processor(
            [clip.array()], do_sample_frames=False, return_tensors="pt").items()
            if key.startswith("pixel_values")))
    name = "pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"
    assert torch.equal(inputs[name].flatten(), own.flatten())


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_a_model_answers_about_a_video(family: str) -> None:
    answers = generate_answers(built(family, "permuted").model, adapter(family, "student"),
                               [(record("both"), 0)], max_new_tokens=3)
    assert len(answers) == 1


@pytest.mark.parametrize("family", [family for family in (*VLM_FAMILIES, *TEXT_FAMILIES)
                                    if family not in VIDEO_FAMILIES])
def test_who_takes_no_video_says_so_by_name(family: str) -> None:
    model = adapter(family, "student")
    with pytest.raises(SampleDropped, match=r"^(video|image) for a .*: video holds an? "):
        model.render(record("video"))


@pytest.mark.parametrize("family", ["internvl", "smolvlm", "llava_onevision"])
def test_who_stacks_videos_takes_no_rate(family: str) -> None:
    item = parse_record({"prompt": "<video>a", "completion": "b", "videos": [frames(0)]}, "x:1",
                        video=VideoSpec(fps=1.0))
    with pytest.raises(SampleDropped, match=r"x:1: student .* same number of frames"):
        adapter(family, "student").render(item)


def test_timestamps_are_no_answers() -> None:
    row = encoded("qwen3_vl", "student", "right").rows[0]
    assert "seconds>" in row.text
    start, end = row.images[0]
    inside = row.text.encode()[start:end].decode()
    assert inside.startswith("<0.5 seconds>") and inside.count("seconds>") == 2


def test_the_canary_freezes_videos() -> None:
    model, students = built("qwen3_vl", "permuted").model, adapter("qwen3_vl", "student")
    records = [record("video"), record("image"),
               parse_record({"prompt": "<video>What?", "completion": "The circle.",
                             "videos": [frames(7)]}, "other", video=VideoSpec(frames=4))]
    found = canary(model, students, records)
    assert found["kl_frozen"] > 1e-4 and found["kl_blank"] > 1e-4 and found["kl_shuffled"] > 1e-4
    assert found["without_partner"] == 1
    still = [record("video", still=True)]
    assert canary(model, students, still)["kl_frozen"] == 0
    assert "kl_frozen" not in canary(model, students, [record("image")])


def test_a_broken_video_costs_one_record() -> None:
    collate = DistillationCollator(adapter("qwen3_vl", "student"))
    rows = [record("video"), parse_record({"prompt": "<video>a", "completion": "b",
                                           "videos": [[b"no frame"]]}, "x:2")]
    counts = collate(rows)["counts"]
    assert (counts["rows"], counts["dropped"]) == (1, {"unreadable video": 1})


def test_every_picture_is_decoded_once_for_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    for kind in (ImageRef, VideoRef):
        load = kind.load
        monkeypatch.setattr(kind, "load", lambda ref, load=load: decoded.append(ref.kind)
                            or load(ref))
    pairing = paired("qwen3_vl", "internvl")
    collate = DistillationCollator(adapter("internvl", "student"), adapter("qwen3_vl", "teacher"),
                                   pairing)
    files = parse_record({"prompt": "<image><image>What?", "completion": "It is",
                          "images": [image("odd", 1), image("odd", 2)]}, "x")
    assert collate([files])["counts"]["rows"] == 1
    assert decoded == ["image", "image"]
    collate([record("video")])
    assert decoded[2:] == ["video", *["image"] * 4]  # the frames that are shown, one by one
