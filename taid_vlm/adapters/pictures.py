"""A record's pictures as a processor takes them: images, videos, and how large they are shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from PIL import Image

from taid_vlm.errors import SampleDropped
from taid_vlm.records import Record
from taid_vlm.records.images import SIZES
from taid_vlm.records.videos import Clip, Picture, VideoRef

NO_SIZES, NO_VIDEO = "pixel limits of one picture", "video for a model that takes none"
VARYING = "videos of different numbers of frames"
# families whose model has the frames of a batch's videos in one tensor
STACKING = ("LlavaOnevisionProcessor", "InternVLProcessor", "SmolVLMProcessor")


def check_pictures(record: Record, processor: Any, role: str, takes_videos: bool) -> None:
    """Raise SampleDropped for what this model's processor does not take, by name."""
    name = type(processor).__name__
    videos = [image for image in record.images if isinstance(image, VideoRef)]
    if videos and not takes_videos:
        raise SampleDropped(
            NO_VIDEO, f"{record.source} holds a video, which the {role}'s processor ({name}, with "
            "its chat template) does not take; choose a model that does, or give its frames as "
            "images.")
    if name in STACKING and any(video.sampling and video.sampling.fps for video in videos):
        raise SampleDropped(
            VARYING, f"{record.source}: {role} ({name}) takes the same number of frames of every "
            "video; set data.video: {frames: 8} in place of fps.")
    if any(image.sizes for image in record.images) and not takes_sizes(processor):
        raise SampleDropped(
            NO_SIZES, f"{record.source}: an image part says how many pixels it is shown with, "
            f"which the {role}'s processor ({name}) does not take; leave that out, or set "
            "processor_kwargs for all pictures.")


def arguments(rows: Sequence[Sequence[Picture]], processor: Any) -> dict[str, Any]:
    """A batch's pictures as arguments of a processor's call; frames are not sampled again."""
    images = [[sized(image, processor) for image in row if not isinstance(image, Clip)]
              for row in rows]
    clips = [clip for row in rows for clip in row if isinstance(clip, Clip)]
    named: dict[str, Any] = {"images": images if any(images) else None}
    if clips:
        named["videos"] = [clip.array() for clip in clips]
        named["videos_kwargs"] = video_arguments(clips)
    return named


def video_arguments(clips: Sequence[Clip]) -> dict[str, Any]:
    return {"video_metadata": [clip.metadata() for clip in clips], "do_sample_frames": False,
            "input_data_format": "channels_last", "return_metadata": True}


# ----- sizes --------------------------------------------------------------------------------


def takes_sizes(processor: Any) -> bool:
    """Whether a family has pixel limits per picture: those with Qwen2-VL's image processor."""
    return type(getattr(processor, "image_processor", None)).__name__.startswith("Qwen2VLImage")


def sized(image: Image.Image, processor: Any) -> Image.Image:
    """The picture as large as it asks for, in whole tokens, as qwen_vl_utils' `fetch_image` makes
    it.

    Raises:
        SampleDropped: outside of the processor's own limits, which it would be resized to again.
    """
    wanted = image.info.get(SIZES)
    if not wanted:
        return image
    part = processor.image_processor
    resize = sys.modules[type(part).__module__].smart_resize
    limits = {"min_pixels": part.size["shortest_edge"], "max_pixels": part.size["longest_edge"]}
    width, height = (wanted.get(f"resized_{side}", of_image)
                     for side, of_image in zip(("width", "height"), image.size, strict=True))
    height, width = resize(height, width, factor=part.patch_size * part.merge_size,
                           **{key: wanted.get(key, value) for key, value in limits.items()})
    least, most = limits.values()
    if not least <= width * height <= most:
        raise SampleDropped(NO_SIZES, f"{wanted} asks for {width} x {height} pixels, but the "
                                      f"processor shows from {least:,} to {most:,}")
    return image.resize((width, height), Image.Resampling.BICUBIC)
