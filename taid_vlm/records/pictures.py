"""Which images and videos a row holds, and which of them every mark in its text shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from PIL import Image

from taid_vlm.config.data import VideoSpec
from taid_vlm.errors import RecipeError, RecordError
from taid_vlm.records.images import SIZE_KEYS, ImageRef, no_image, stored_image
from taid_vlm.records.videos import VideoRef, own_sampling, stored_video

_NOT_OF_VIDEOS = (*SIZE_KEYS, "total_pixels", "video_start", "video_end")
_TAG = re.compile(r"<image>|<video>|<img>(?P<path>.*?)</img>", re.DOTALL)


def image_column(row: Mapping[str, Any], source: str, root: Path | None) -> list[ImageRef]:
    value = row.get("images", row.get("image"))
    listed = value if isinstance(value, (list, tuple)) else [value]
    return [_image_ref(item, source, root) for item in listed if not no_image(item)]


def _image_ref(value: Any, source: str, root: Path | None) -> ImageRef:
    value = stored_image(value, root)
    if not isinstance(value, (str, Path, bytes, Image.Image)):
        raise RecordError(f"{source}: an image must be a path, bytes or a PIL image, got "
                          f"{type(value).__name__}.")
    return ImageRef(value, source)


def video_column(row: Mapping[str, Any], source: str, root: Path | None) -> list[ImageRef]:
    """`videos`: one a place; `video`: a file, or the frames of one."""
    if row.get("videos") is None:
        return [] if no_image(row.get("video")) else [_video_ref(row["video"], {}, source, root)]
    listed = row["videos"] if isinstance(row["videos"], (list, tuple)) else [row["videos"]]
    return [_video_ref(item, {}, source, root) for item in listed if not no_image(item)]


def _video_ref(
    value: Any, part: Mapping[str, Any], source: str, root: Path | None
) -> VideoRef:
    """`part`: what says beside it which frames are shown."""
    stored = stored_video(value, root)
    frames = stored if isinstance(stored, tuple) else (stored,)
    if not frames or not all(isinstance(x, (str, Path, bytes, Image.Image)) for x in frames):
        raise RecordError(f"{source}: a video must be a path, bytes or a list of frames, got "
                          f"{shown(value)}.")
    said = {**(value if isinstance(value, Mapping) else {}), **part}
    try:
        sampling, rate = own_sampling(said, isinstance(stored, tuple))
    except (RecipeError, ValueError, TypeError) as error:
        raise RecordError(f"{source}: a video's frames: {error}") from None
    return VideoRef(stored, source, rate=rate, sampling=sampling)


def settled(image: ImageRef, max_pixels: int, video: VideoSpec | None) -> ImageRef:
    if isinstance(image, VideoRef) and image.sampling is None:
        image = replace(image, sampling=video)
    return replace(image, max_pixels=max_pixels)


@dataclass
class _Column:
    """A row's images, or its videos, and which of them marks in its text have taken."""

    what: str
    values: Sequence[ImageRef]
    source: str
    used: set[int] = field(default_factory=set)
    by_index: set[bool] = field(default_factory=set)

    def take(self, index: Any = None) -> ImageRef:
        """The one at `index`, or the next one."""
        self.by_index.add(index is not None)
        if len(self.by_index) > 1:
            raise RecordError(f"{self.source}: some {self.what} parts have an 'index' and some "
                              "have none; give all of them one, or none.")
        place = len(self.used) if index is None else index
        if isinstance(place, bool) or place not in range(len(self.values)):
            raise RecordError(
                f"{self.source}: more {self.what} marks in the text than {self.what}s."
                if index is None else
                f"{self.source}: an {self.what} part's index = {shown(index)}, but the row has "
                f"{len(self.values)} {self.what}s, counted from 0.")
        self.used.add(int(place))
        return self.values[int(place)]


@dataclass
class Pictures:
    """Images and videos of a row in the order in which its text shows them."""

    images: _Column
    videos: _Column
    source: str
    root: Path | None
    taken: list[ImageRef] = field(default_factory=list)

    @classmethod
    def of(cls, images: Sequence[ImageRef], videos: Sequence[ImageRef], source: str,
           root: Path | None) -> Pictures:
        return cls(_Column("image", images, source), _Column("video", videos, source), source, root)

    def take_part(self, part: Mapping[str, Any], role: str) -> None:
        if kind_of(part) == "video":
            self.taken.append(self._video_part(part, role))
            return
        inline = _inline(part, "image")
        image = self._column("image").take(part.get("index")) if no_image(inline) else \
            _image_ref(inline, self.source, self.root)
        sizes = tuple((key, part[key]) for key in SIZE_KEYS if part.get(key) is not None)
        for key, value in sizes:
            if type(value) is not int or value < 1:
                raise RecordError(f"{self.source}: an image part's {key} = {shown(value)}, but it "
                                  "must be a whole number of pixels.")
        self.taken.append(replace(image, sizes=sizes))

    def _video_part(self, part: Mapping[str, Any], role: str) -> ImageRef:
        for key in _NOT_OF_VIDEOS:
            if part.get(key) is not None:
                raise RecordError(
                    f"{self.source}: a video part's {key} = {shown(part[key])} is not read; "
                    "processor_kwargs: {videos_kwargs: ...} holds for all.")
        inline = _inline(part, "video")
        if not no_image(inline):
            return _video_ref(inline, part, self.source, self.root)
        if not self.videos.values:
            raise RecordError(f"{self.source}: content part of type 'video' in a {role} message, "
                              "but neither the part nor the row holds a video.")
        return self.videos.take(part.get("index"))

    def take_tag(self, tag: re.Match[str]) -> None:
        if tag["path"] is None:
            self.taken.append(self._column(tag.group().strip("<>")).take())
        else:
            self.taken.append(_image_ref(tag["path"].strip(), self.source, self.root))

    def _column(self, kind: str) -> _Column:
        """LLaVA-Video has the tag `<image>` for its videos."""
        only_videos = self.videos.values and not self.images.values
        return self.videos if kind == "video" or only_videos else self.images

    def unmarked(self) -> list[ImageRef]:
        """Those of a kind that the text has no mark for."""
        column: list[ImageRef] = []
        for kind in (self.images, self.videos):
            marks = sum(image.kind == kind.what for image in self.taken)
            if not marks:
                column += kind.values
            elif len(kind.used) < len(kind.values):
                raise RecordError(f"{self.source}: {marks} {kind.what} marks in the text, but "
                                  f"{len(kind.values)} {kind.what}s.")
        return column


def kind_of(part: Any) -> str:
    """"image" or "video", "" for a part of another type."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    return {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}.get(
        kind, "") if isinstance(kind, str) else ""


def _inline(part: Mapping[str, Any], kind: str) -> Any:
    """What a typed part carries itself, or None; `image_url` as chat APIs write it."""
    url = part.get(f"{kind}_url")
    inline = url.get("url") if isinstance(url, Mapping) else url
    return part.get(kind) or part.get("path") or part.get("url") or inline


def split_tags(
    text: str, pictures: Pictures, role: str, tagged: bool
) -> list[str | None]:
    """Texts, and None for every `<image>`, `<video>` and Qwen-VL's `<img>path</img>`, which are
    taken; without the newlines LLaVA writes around a tag.

    Args:
        tagged: whether `<image>` in this role's texts stands for one; else it is text, as are all
            tags of an assistant's then.
    """
    if role == "assistant" and not tagged:
        return [text]
    parts: list[str | None] = []
    start = 0
    for tag in _TAG.finditer(text):
        if tag.group() == "<image>" and not tagged:
            continue
        parts += [text[start : tag.start()].strip("\n"), None]
        start = tag.end()
        pictures.take_tag(tag)
    return [*parts, text[start:].strip("\n") if parts else text]
