"""A video: what a row says of it, and its frames, which are sampled once for both models.

A file is decoded by PyAV (the extra `video`); a list of frames, which are images, needs nothing.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from PIL import Image

from taid_vlm.config.data import VideoSpec
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.records.images import (
    SIZES,
    TOO_LARGE,
    ImageRef,
    is_url,
    stored_image,
)

UNREADABLE_VIDEO = "unreadable video"
LIST_RATE = 2.0  # frames a second of a list that does not say, as qwen_vl_utils takes it
# playlists, and formats that name other files or devices, are not opened
# (of the container alone: `options` for streams crash PyAV where a header does not name them)
_CONTAINER = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,ogg,asf,gif"}


@dataclass(frozen=True)
class Clip:
    """Frames of a video as models are shown them.

    frames: RGB, all of one size. indices: which of the video's `total` frames they are.
    rate: frames a second of the video.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    rate: float
    total: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size

    def array(self) -> np.ndarray:
        """uint8 [frames, height, width, 3]."""
        return np.stack([np.asarray(frame) for frame in self.frames])

    def metadata(self) -> dict[str, Any]:
        """As transformers' VideoMetadata; frames are not sampled again."""
        width, height = self.size
        return {"total_num_frames": self.total, "fps": self.rate, "width": width, "height": height,
                "duration": self.total / self.rate, "frames_indices": list(self.indices)}

    def frozen(self) -> Clip:
        """The first frame all the time."""
        return replace(self, frames=self.frames[:1] * len(self.frames))


Picture: TypeAlias = Image.Image | Clip


def mapped(picture: Picture, change: Callable[[Image.Image], Image.Image]) -> Picture:
    """An image changed, or every frame of a video."""
    if isinstance(picture, Clip):
        return replace(picture, frames=tuple(map(change, picture.frames)))
    return change(picture)


def still(picture: Picture) -> Image.Image:
    """What a page shows of it: of a video, the frame in the middle."""
    return picture.frames[len(picture.frames) // 2] if isinstance(picture, Clip) else picture


def shown_as(other: Picture, picture: Picture) -> Picture:
    """`other` in the size of `picture`, with as many frames, and shown as large."""
    if isinstance(picture, Clip):
        frames = other.frames if isinstance(other, Clip) else (other,)
        places = _spread(len(frames), len(picture.frames))
        return replace(picture, frames=tuple(
            like(frames[place], picture.frames[0]) for place in places))
    return like(still(other), picture)


def like(other: Image.Image, image: Image.Image) -> Image.Image:
    """`other` in the size of `image`, and shown as large."""
    other = other.copy() if other.size == image.size else other.resize(image.size)
    other.info[SIZES] = image.info.get(SIZES)
    return other


@dataclass(frozen=True)
class VideoRef(ImageRef):
    """A video that is not decoded yet.

    value: path or bytes of a file, or a tuple of its frames, each as ImageRef has an image.
    rate: frames a second, where it is a list of frames.
    """

    kind: ClassVar[str] = "video"

    sampling: VideoSpec | None = None
    rate: float | None = None

    def load(self) -> Clip:  # type: ignore[override]
        """Decode the frames that are shown.

        Raises:
            SampleDropped: "unreadable video", or "image larger than max_pixels".
            TaidError: a file, without the library that decodes it.
        """
        try:
            value = self.stored()
            clip = self._of_frames(value) if isinstance(value, tuple) else self._of_file(value)
            first = clip.frames[0]
            return replace(clip, frames=tuple(like(frame, first) for frame in clip.frames))
        except (SampleDropped, TaidError):
            raise
        except Exception as error:  # decoders raise anything
            name = f"{self.value!s:.200}: " if isinstance(self.value, (str, Path)) else ""
            raise SampleDropped(UNREADABLE_VIDEO, f"{self.source}: {name}"
                                f"{type(error).__name__}: {error!s:.300}") from None

    def still(self) -> Image.Image:
        """The frame in the middle."""
        return still(self.load())

    def _of_frames(self, values: tuple[Any, ...]) -> Clip:
        rate = self.rate or LIST_RATE
        indices = self.sampling_of(len(values), rate)
        loaded = {i: self._frame(values[i]) for i in set(indices)}
        return Clip(tuple(loaded[i] for i in indices), indices, rate, len(values))

    def _frame(self, value: Any) -> Image.Image:
        try:
            return ImageRef(value, self.source, self.max_pixels).load()
        except SampleDropped as problem:
            reason = TOO_LARGE if problem.reason == TOO_LARGE else UNREADABLE_VIDEO
            raise SampleDropped(reason, f"a frame: {problem}") from None

    def sampling_of(self, total: int, rate: float) -> tuple[int, ...]:
        """Which frames of a video are shown: spread evenly, the first and the last among them."""
        return _spread(total, (self.sampling or VideoSpec()).number(total / rate, total))

    # ----- files ----------------------------------------------------------------------------

    def _of_file(self, value: Any) -> Clip:
        if is_url(value):
            raise ValueError("a video is not fetched from a URL; save it as a file")
        if not isinstance(value, bytes) and not Path(value).is_file():
            raise FileNotFoundError("there is no such file")
        with io.BytesIO(value) if isinstance(value, bytes) else open(value, "rb") as file, \
                _av().open(file, container_options=dict(_CONTAINER)) as container:
            if not container.streams.video:
                raise ValueError("it holds no video")
            stream = container.streams.video[0]
            self._check_size(stream.codec_context)
            times, keys = _timetable(container, stream)
            rate = float(stream.average_rate or stream.guessed_rate or LIST_RATE)
            if not keys:  # a file that says no times
                times, keys = list(range(_count(container, stream))), {}
            indices = self.sampling_of(len(times), rate)
            decoded = _decoded(container, stream, sorted({times[i] for i in indices}), keys)
            return Clip(tuple(decoded[times[i]] for i in indices), indices, rate, len(times))

    def _check_size(self, codec: Any) -> None:
        if codec.width * codec.height > self.max_pixels:
            raise SampleDropped(TOO_LARGE, f"{self.source}: frames of {codec.width:,} x "
                                f"{codec.height:,} pixels; at most {self.max_pixels:,} are decoded")


def _spread(total: int, number: int) -> tuple[int, ...]:
    """`number` of `total` frames; of fewer than that, some stand several times."""
    if total < 1:
        raise ValueError("it has no frames")
    return tuple(np.linspace(0, total - 1, number).round().astype(int).tolist())


def _timetable(container: Any, stream: Any) -> tuple[list[int], dict[int, int]]:
    """When frames are shown, in order, and at which of them decoding can start, with the place to
    seek; nothing is decoded.

    Headers are often wrong about the number of frames, and rates vary within a file. Both are empty
    for a file that does not say when its frames are shown.
    """
    packets = [packet for packet in container.demux(stream) if packet.size]
    if any(packet.pts is None for packet in packets):
        return [], {}
    keys = {packet.pts: packet.pts if packet.dts is None else packet.dts
            for packet in packets if packet.is_keyframe}
    first = min(keys, default=0)  # what was cut out of a longer file may begin with a rest
    return sorted({packet.pts for packet in packets if packet.pts >= first}), keys


def _count(container: Any, stream: Any) -> int:
    container.seek(0)
    return sum(1 for _ in container.decode(stream))


def _decoded(
    container: Any, stream: Any, wanted: Sequence[int], keys: Mapping[int, int]
) -> dict[int, Image.Image]:
    """Frames by the time they are shown at (without `keys`, by their number); what lies between is
    jumped over where it can be."""
    frames = _frames(container, stream, wanted, keys) if keys else _numbered(container, stream)
    found = {time: _upright(frame) for time, frame in frames if time in set(wanted)}
    missing = [time for time in wanted if time not in found]
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} frames cannot be decoded")
    return found


def _numbered(container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    container.seek(0)
    return enumerate(container.decode(stream))


def _frames(
    container: Any, stream: Any, wanted: Sequence[int], keys: Mapping[int, int]
) -> Iterator[tuple[int, Any]]:
    frames, last, jumps = _from(container, stream, keys[min(keys)]), None, True
    for time in wanted:
        key = max((key for key in keys if key <= time), default=min(keys))
        if jumps and (min(keys) if last is None else last) < key:
            frames = _from(container, stream, keys[key])
            first = next(frames, None)
            jumps = first is not None and first.pts is not None and first.pts <= time
            # some containers (MPEG-TS) find no place exactly, and are read from the beginning then
            frames = itertools.chain([first], frames) if jumps else _from(
                container, stream, keys[min(keys)])
        for frame in frames:
            last = frame.pts
            if last is not None and last >= time:
                yield last, frame
                break


def _from(container: Any, stream: Any, place: int) -> Iterator[Any]:
    container.seek(place, stream=stream)
    return iter(container.decode(stream))


def _upright(frame: Any) -> Image.Image:
    """RGB; phones write how a video is to be turned beside it."""
    image: Image.Image = frame.to_image()
    turned = int(getattr(frame, "rotation", 0) or 0)
    return image.rotate(turned, expand=True) if turned else image


@functools.cache
def _av() -> Any:
    try:
        import av
    except ImportError:
        raise TaidError("A video file is decoded by PyAV: pip install 'taid-vlm[video]'; a list of "
                        "frames as images needs nothing.") from None
    av.logging.set_level(av.logging.PANIC)  # what it says of broken files stands in our message
    return av


# ----- what a row says ----------------------------------------------------------------------


def stored_video(value: Any, root: Path | None) -> Any:
    """What a column or a part says of a video, as `VideoRef.value`; other types as they came.

    Args:
        value: a file as `stored_image` has an image, a list of frames, or {"frames": [...]}.
        root: folder that relative paths start from.
    """
    if isinstance(value, Mapping) and value.get("frames"):
        value = value["frames"]
    if isinstance(value, (list, tuple)):
        return tuple(stored_image(frame, root) for frame in value)
    return stored_image(value, root)


def own_sampling(part: Mapping[str, Any], is_list: bool) -> tuple[VideoSpec | None, float | None]:
    """Sampling and rate that a part gives itself, under Qwen-VL's names.

    nframes: so many frames. fps, max_frames: of a file, so many a second; of a list, its own rate
    (also sample_fps).
    """
    fps = part.get("sample_fps") or part.get("fps") if is_list else part.get("fps")
    keys = {"frames": part.get("nframes"), "fps": None if is_list else fps,
            "max_frames": part.get("max_frames")}
    keys = {key: value for key, value in keys.items() if value is not None}
    return VideoSpec(**keys) if keys else None, float(fps) if is_list and fps else None
