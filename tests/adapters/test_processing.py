"""How large pictures are shown: by a model's `processor_kwargs`, and by a picture itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor
from zoo import build, save
from zoo.images import image

from taid_vlm.adapters import make_adapter
from taid_vlm.doctor.facts import image_tokens
from taid_vlm.errors import RecordError, SampleDropped, TaidError
from taid_vlm.evaluation.canary import blank
from taid_vlm.models.processing import set_processor
from taid_vlm.records import Record, parse_record


def record(*pictures: Any, **part: Any) -> Record:
    parts = [{"type": "image", "image": picture, **part} for picture in pictures]
    return parse_record({"messages": [
        {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A square."}]}, "data.jsonl:3")


def tokens(processor: Any, item: Record | None = None) -> int:
    adapter = make_adapter(processor, "student")
    item = item or record(image("wide"))
    images = [[ref.load() for ref in item.images]]
    return image_tokens(adapter.encode([adapter.render(item)], images).rows[0])


@pytest.mark.parametrize(("family", "settings", "before", "after"), [
    ("qwen2_5_vl", {"max_pixels": 2048}, 10, 8),
    ("qwen3_vl", {"size": {"shortest_edge": 256, "longest_edge": 1024}}, 18, 2),
    ("internvl", {"max_patches": 1}, 14, 6),
    ("smolvlm", {"do_image_splitting": False}, None, 7),
    ("ovis2", {"crop_to_patches": False}, None, None),
    ("gemma4", {"max_soft_tokens": 140}, None, None),
])
def test_settings_change_what_is_seen_and_are_saved(
    family: str, settings: dict[str, Any], before: int | None, after: int | None, tmp_path: Path
) -> None:
    built = build(family)
    first = tokens(built.processor)
    set_processor(built.processor, settings, "student")
    then = tokens(built.processor)
    assert first != then
    assert before in (None, first) and after in (None, then)
    save(built, tmp_path)
    assert tokens(AutoProcessor.from_pretrained(tmp_path)) == then


@pytest.mark.parametrize(("family", "settings", "message"), [
    ("qwen2_5_vl", {"max_pixel": 1}, r"Qwen2VLImageProcessor has no 'max_pixel'. Did you mean "
                                     "'max_pixels'"),
    ("llava", {"max_pixels": 1024}, "SiglipImageProcessor has no 'max_pixels'"),
    ("qwen2_5_vl", {"patch_size": 16}, r"patch_size cannot be set: .* made for its own, 8"),
    ("internvl", {"size": {"height": 64, "width": 64}}, "size cannot be set: .* made for its own"),
    ("llava_next", {"image_grid_pinpoints": [[32, 32]]}, "image_grid_pinpoints cannot be set"),
    ("internvl", {"crop_to_patches": False}, "the processor itself always says"),
    ("qwen3_vl", {"videos_kwargs": {"fps": 2}}, "data.video says which frames"),
    ("qwen3_vl", {"videos_kwargs": {"sise": {}}}, "videos_kwargs: .* Did you mean 'size'"),
    ("qwen3_vl", {"videos_kwargs": 3}, "must be a mapping"),
    ("llava", {"videos_kwargs": {"size": {}}}, "LlavaProcessor has no video processor"),
    ("qwen2_5_vl", {"size": {"longest_edge": 99}}, "teacher.processor_kwargs.* cannot show"),
    ("internvl", {"max_patches": "many"}, "teacher.processor_kwargs"),
    ("qwen2", {"max_pixels": 1024}, "no effect on a text model"),
])
def test_mistakes_show_before_weights(
    family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaidError, match=f"^teacher.processor_kwargs.*{message}|{message}"):
        set_processor(build(family).processor, settings, "teacher")


# ----- one picture's own ------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "expected"), [
    ({}, 18), ({"max_pixels": 2048}, 8), ({"min_pixels": 5120}, 28),
    ({"resized_height": 32, "resized_width": 48}, 6), ({"max_pixels": None}, 18),
])
def test_limits_of_one_picture(part: dict[str, Any], expected: int) -> None:
    processor = build("qwen3_vl").processor
    assert tokens(processor, record(image("wide"), **part)) == expected
    substitute = blank(record(image("wide"), **part).images[0].load())
    adapter = make_adapter(processor, "student")
    shown = adapter.encode([adapter.render(record(image("wide"), **part))], [[substitute]])
    assert image_tokens(shown.rows[0]) == expected


@pytest.mark.parametrize("part", [{"max_pixels": 512}, {"min_pixels": 99 * 99}])
def test_limits_beyond_the_processors_own(part: dict[str, Any]) -> None:
    with pytest.raises(SampleDropped, match="the processor shows from 1,024 to 9,216"):
        tokens(build("qwen3_vl").processor, record(image("wide"), **part))


def test_limits_stay_with_their_picture() -> None:
    item = parse_record({"images": [image("wide"), image("wide", 1)], "messages": [
        {"role": "user", "content": [{"type": "image", "index": 1, "max_pixels": 2048},
                                     {"type": "image", "index": 0}]},
        {"role": "assistant", "content": "Yes."}]}, "x")
    assert [ref.load().info["sizes"] for ref in item.images] == [{"max_pixels": 2048}, {}]
    assert tokens(build("qwen3_vl").processor, item) == 8 + 18


@pytest.mark.parametrize("family", ["llava", "internvl", "paligemma"])
def test_families_without_limits_per_picture_say_so(family: str) -> None:
    adapter = make_adapter(build(family).processor, "teacher")
    with pytest.raises(SampleDropped, match=r"data.jsonl:3: .* the teacher's processor"):
        adapter.render(record(image(), max_pixels=1024))


@pytest.mark.parametrize("value", ["1024", 0, -3, 1.5, True])
def test_limits_are_numbers_of_pixels(value: Any) -> None:
    with pytest.raises(RecordError, match=r"data.jsonl:3: an image part's max_pixels = "):
        record(image(), max_pixels=value)


def test_videos_have_settings_of_their_own(tmp_path: Path) -> None:
    built = build("qwen3_vl")
    item = parse_record({"prompt": "<video>What?", "completion": "A square.",
                         "videos": [[image("square", seed=i) for i in range(4)]]}, "x")
    numbers = [tokens(built.processor, item)]
    for most in (2**16, 2**13):
        size = {"shortest_edge": 1024, "longest_edge": most}
        set_processor(built.processor, {"videos_kwargs": {"size": size}}, "student")
        numbers.append(tokens(built.processor, item))
    assert numbers[0] > numbers[1] > numbers[2]
    save(built, tmp_path)
    assert tokens(AutoProcessor.from_pretrained(tmp_path), item) == numbers[-1]
