"""What a row says of a video, and which frames of it are shown."""

import base64
import io
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from taid_vlm.config.data import DataSource, DataSpec, VideoSpec
from taid_vlm.errors import RecipeError, RecordError, SampleDropped, TaidError
from taid_vlm.records import open_records, parse_record
from taid_vlm.records.fingerprint import fingerprint, image_hash
from taid_vlm.records.images import TOO_LARGE
from taid_vlm.records.videos import UNREADABLE_VIDEO, Clip, VideoRef, _upright

SIZE = (32, 24)


def level(index, total):
    """Grey of a frame: other frames of a video have other greys."""
    return 20 + index * 200 // total


def picture(index, total):
    return Image.new("RGB", SIZE, (level(index, total),) * 3)


def listed(total):
    return [picture(i, total) for i in range(total)]


def levels(clip):
    return [round(float(np.asarray(frame).mean())) for frame in clip.frames]


def encoded(total, rate=10, codec="mpeg4", container="mp4", size=SIZE, **options):
    """A video file of so many frames, each grey of its own."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = options
        for index in range(total):
            frame = av.VideoFrame.from_image(picture(index, total).resize(size))
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def loaded(value, spec=None, **options):
    return VideoRef(value, "data.jsonl:3", sampling=spec, **options).load()


def refused(value, **options):
    with pytest.raises(SampleDropped) as caught:
        loaded(value, **options)
    return caught.value.reason, str(caught.value)


def conversation(*turns, **row):
    video = row.pop("spec", None)
    return parse_record({"messages": [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)],
        **row}, "data.jsonl:3", Path("/root"), video=video)


def kinds(record):
    return [ref.kind for ref in record.images]


# ----- which frames -------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "total", "expected"), [
    (None, 30, (0, 4, 8, 12, 17, 21, 25, 29)),
    (VideoSpec(frames=4), 6, (0, 2, 3, 5)), (VideoSpec(frames=1), 6, (0,)),
    (VideoSpec(frames=4), 2, (0, 0, 1, 1)), (VideoSpec(frames=3), 1, (0, 0, 0)),
    (VideoSpec(fps=1), 6, (0, 2, 5)), (VideoSpec(fps=100), 3, (0, 1, 2)),
    (VideoSpec(fps=0.01), 6, (0,)), (VideoSpec(fps=2, max_frames=2), 6, (0, 5)),
])
def test_frames_are_spread_over_the_whole_video(spec, total, expected):
    clip = loaded(tuple(listed(total)), spec)  # two frames a second
    assert clip.indices == expected
    assert levels(clip) == [level(i, total) for i in expected]
    data = clip.metadata()
    assert (data["total_num_frames"], data["fps"], data["duration"]) == (total, 2.0, total / 2)
    assert data["frames_indices"] == list(expected) and clip.size == SIZE


@pytest.mark.parametrize(("keys", "message"), [
    ({"frames": 4, "fps": 1.0}, "frames and fps cannot both be set"),
    ({"max_frames": 4}, "max_frames goes with fps"), ({"frames": 0}, "frames = 0"),
    ({"fps": 0}, "fps = 0"), ({"frame": 4}, "Did you mean 'frames'"),
])
def test_a_recipe_says_it_in_one_way(keys, message):
    with pytest.raises(RecipeError, match=message):
        DataSpec(train="a.jsonl", video=keys)


def test_a_side_may_have_its_own(tmp_path):
    for index, frame in enumerate(listed(9)):
        frame.save(tmp_path / f"{index}.png")
    names = ", ".join(f'"{i}.png"' for i in range(9))
    (tmp_path / "a.jsonl").write_text(
        f'{{"prompt": "<video>a", "completion": "b", "videos": [[{names}]]}}\n')
    records = open_records(DataSource(path=str(tmp_path / "a.jsonl"), video=VideoSpec(frames=3)))
    assert levels(records[0].images[0].load()) == [level(i, 9) for i in (0, 4, 8)]
    assert records.has_images


def test_frames_of_several_sizes_become_those_of_the_first():
    clip = loaded((Image.new("RGB", (8, 6)), Image.new("RGBA", (20, 10))))
    assert {frame.size for frame in clip.frames} == {(8, 6)}
    assert levels(clip) == [0, 0, 0, 0, 255, 255, 255, 255]  # what is clear is white


# ----- files --------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "container", "options"), [
    ("mpeg4", "mp4", {}), ("mpeg4", "avi", {}), ("mpeg4", "matroska", {"g": "5"}),
    ("libx264", "mp4", {"g": "10", "bf": "3"}), ("libvpx-vp9", "webm", {}),
    ("libx264", "mpegts", {"g": "10", "bf": "2"}), ("flv1", "flv", {"g": "7"}),
    ("mpeg4", "avi", {"bf": "2", "g": "12"}), ("libx264", "matroska", {"g": "250", "bf": "3"}),
    ("mpeg2video", "mpeg", {"g": "9"}),
])
def test_the_frames_of_a_file_are_those_at_their_places(codec, container, options, tmp_path):
    data = encoded(50, codec=codec, container=container, **options)
    (tmp_path / "a.bin").write_bytes(data)
    for value in (data, tmp_path / "a.bin"):
        clip = loaded(value, VideoSpec(frames=6))
        assert (clip.total, clip.rate, clip.indices) == (50, 10.0, (0, 10, 20, 29, 39, 49))
        expected = [level(i, 50) for i in clip.indices]
        assert max(abs(a - b) for a, b in zip(levels(clip), expected, strict=True)) <= 3


def test_a_piece_cut_out_of_a_longer_file():
    data = encoded(50, codec="libx264", container="mpegts", g="10")
    clip = loaded(data[len(data) // 3 // 188 * 188 :], VideoSpec(frames=4))
    assert 10 < clip.total < 50
    assert levels(clip) == sorted(levels(clip)) and abs(levels(clip)[-1] - level(49, 50)) <= 3


def test_a_file_that_says_no_times(monkeypatch):
    monkeypatch.setattr("taid_vlm.records.videos._timetable", lambda container, stream: ([], {}))
    clip = loaded(encoded(20), VideoSpec(frames=3))
    assert (clip.total, clip.indices) == (20, (0, 10, 19))
    assert max(abs(a - level(i, 20)) for a, i in zip(levels(clip), clip.indices, strict=True)) <= 3


def test_a_rate_is_of_the_file():
    clip = loaded(encoded(50, rate=Fraction(25, 2)), VideoSpec(fps=1))
    assert (clip.rate, len(clip.frames), clip.indices[-1]) == (12.5, 4, 49)


def test_the_same_frames_every_time():
    data = encoded(40, codec="libx264", g="12")
    first, second = (loaded(data).array() for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("value", [
    b"", b"no video at all" * 9, Path("/no/such.mp4"), Path("/dev/null"), "https://a.b/c.mp4",
    b"ffconcat version 1.0\nfile '/etc/hostname'\n", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\na.ts\n",
])
def test_what_is_no_video_costs_a_record(value):
    pytest.importorskip("av")
    reason, message = refused(value)
    assert reason == UNREADABLE_VIDEO
    assert "data.jsonl:3: " in message and len(message) < 600


def test_a_list_of_other_files_is_not_opened(tmp_path, monkeypatch):
    """ffmpeg would read whatever it names, under whatever name it has."""
    (tmp_path / "a.mp4").write_bytes(encoded(10))
    (tmp_path / "list.mp4").write_bytes(b"ffconcat version 1.0\nfile 'a.mp4'\n")
    monkeypatch.chdir(tmp_path)
    assert loaded(Path("a.mp4")).total == 10
    assert refused(Path("list.mp4"))[0] == UNREADABLE_VIDEO
    assert refused((tmp_path / "list.mp4").read_bytes())[0] == UNREADABLE_VIDEO


def test_an_animation_is_a_video():
    buffer = io.BytesIO()
    first, *rest = listed(10)
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=100)
    pytest.importorskip("av")
    clip = loaded(buffer.getvalue(), VideoSpec(frames=4))
    assert (clip.total, levels(clip)) == (10, [level(i, 10) for i in (0, 3, 6, 9)])


def test_a_file_that_breaks_off():
    data = encoded(50, container="avi")
    reason, message = refused(data[: len(data) // 3])
    assert reason == UNREADABLE_VIDEO, message


def test_sound_alone_is_no_video():
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    assert "holds no video" in refused(buffer.getvalue())[1]


def test_large_frames_are_not_decoded():
    assert refused(encoded(4), max_pixels=32 * 24 - 1)[0] == TOO_LARGE
    assert refused(tuple(listed(4)), max_pixels=32 * 24 - 1)[0] == TOO_LARGE
    assert len(loaded(encoded(4), max_pixels=32 * 24).frames) == 8


def test_without_the_library_a_file_says_what_to_install(monkeypatch):
    monkeypatch.setattr("taid_vlm.records.videos._av", VideoRef.load.__globals__["_av"].__wrapped__)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(TaidError, match=r"pip install 'taid-vlm\[video\]'"):
        loaded(b"x")
    assert isinstance(loaded(tuple(listed(3))), Clip)


def test_phones_turn_videos():
    frame = SimpleNamespace(to_image=lambda: picture(0, 1), rotation=-90)
    assert _upright(frame).size == SIZE[::-1]


def test_a_frame_that_is_broken_is_named():
    reason, message = refused((PNG, b"no image"))
    assert reason == UNREADABLE_VIDEO and "a frame: " in message


# ----- what a row says ----------------------------------------------------------------------

BUFFER = io.BytesIO()
picture(0, 1).save(BUFFER, "PNG")
PNG = BUFFER.getvalue()


@pytest.mark.parametrize(("row", "parts"), [
    ({"videos": ["a.mp4"]}, "<video>What?"), ({"video": "a.mp4"}, "What?"),
    ({"videos": "a.mp4"}, "<video>\nWhat?"), ({"video": {"path": "a.mp4"}}, "<image>\nWhat?"),
    ({"video": "file:///root/a.mp4"}, "<video>What?"),
    ({"videos": ["a.mp4"]}, [{"type": "video"}, {"type": "text", "text": "What?"}]),
    ({}, [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]),
    ({}, [{"type": "video_url", "video_url": {"url": "file:///root/a.mp4"}},
          {"type": "text", "text": "What?"}]),
])
def test_a_file_in_every_form(row, parts):
    record = conversation(parts, "A dog.", **row)
    assert record.messages[0].parts == (None, "What?")
    assert [str(ref.stored()) for ref in record.images] == ["/root/a.mp4"]
    assert kinds(record) == ["video"]


@pytest.mark.parametrize("value", [
    [["a.png", "b.png"]], [{"frames": ["a.png", "b.png"]}], [["file:///root/a.png", "b.png"]]])
def test_a_list_of_frames(value):
    (ref,) = conversation("<video>What?", "A dog.", videos=value).images
    assert [str(frame) for frame in ref.stored()] == ["/root/a.png", "/root/b.png"]


@pytest.mark.parametrize("value", ['["a.mp4"]', np.array(["a.mp4"], object)])
def test_a_list_as_a_table_has_it(value):
    record = conversation("<video>What?", "A dog.", videos=value)
    assert [str(ref.stored()) for ref in record.images] == ["/root/a.mp4"]
    assert record.unread == ()


def test_frames_in_one_column_and_bytes():
    assert len(conversation("What?", "A", video=[PNG, {"bytes": PNG, "path": None}]).images) == 1
    text = base64.b64encode(PNG).decode()
    (ref,) = conversation("What?", "A", video={"frames": [text, f"data:image/png;base64,{text}"],
                                               "fps": 5.0}).images
    assert (ref.stored(), ref.rate) == ((PNG, PNG), 5.0)
    assert len(ref.load().frames) == 8


@pytest.mark.parametrize(("part", "spec", "rate"), [
    ({"video": "a.mp4", "fps": 2.0}, VideoSpec(fps=2.0), None),
    ({"video": "a.mp4", "fps": 2.0, "max_frames": 9}, VideoSpec(fps=2.0, max_frames=9), None),
    ({"video": "a.mp4", "nframes": 5}, VideoSpec(frames=5), None),
    ({"video": ["a.png"], "fps": 3.0}, VideoSpec(frames=2), 3.0),
    ({"video": ["a.png"], "sample_fps": 3.0, "nframes": 5}, VideoSpec(frames=5), 3.0),
    ({"video": "a.mp4"}, VideoSpec(frames=2), None),
])
def test_a_part_may_say_which_frames(part, spec, rate):
    record = conversation([{"type": "video", **part}], "A dog.", spec=VideoSpec(frames=2))
    assert (record.images[0].sampling, record.images[0].rate) == (spec, rate)


def test_images_and_videos_keep_their_order():
    record = conversation("<image>In <video> or <image>?", "A", "<video>?", "B",
                          images=["a.png", "b.png"], videos=["a.mp4", "b.mp4"])
    assert kinds(record) == ["image", "video", "image", "video"]
    assert [Path(ref.stored()).name for ref in record.images] == [
        "a.png", "a.mp4", "b.png", "b.mp4"]
    record = conversation("<image>What?", "A", images=["a.png"], videos=["a.mp4"])
    assert kinds(record) == ["video", "image"]  # without a mark it opens the question


@pytest.mark.parametrize(("turn", "row", "message"), [
    ("<video>What?", {}, "more video marks in the text than videos"),
    ("<video><video>", {"videos": ["a.mp4"]}, "more video marks in the text than videos"),
    ("<video>?", {"videos": ["a.mp4", "b.mp4"]}, "1 video marks in the text, but 2 videos"),
    ("<image>?", {"images": ["a.png", "b.png"], "videos": ["a.mp4"]}, "1 image marks"),
    ("What?", {"video": 3}, "a video must be a path, bytes or a list of frames, got 3"),
    ("What?", {"videos": [[3]]}, "a video must be a path, bytes or a list of frames"),
    ("What?", {"videos": [[]]}, "a video must be a path, bytes or a list of frames"),
    ([{"type": "video", "video": "a.mp4", "max_pixels": 99}], {}, "max_pixels = 99 is not read"),
    ([{"type": "video", "video": "a.mp4", "video_end": 3.0}], {}, "video_end = 3.0 is not read"),
    ([{"type": "video", "video": "a.mp4", "nframes": -1}], {}, "a video's frames: .*-1"),
    ([{"type": "video", "video": "a.mp4", "nframes": 4, "fps": 1.0}], {}, "cannot both be set"),
])
def test_mistakes_are_named(turn, row, message):
    with pytest.raises(RecordError, match=f"^data.jsonl:3: .*{message}"):
        conversation(turn, "A dog.", **row)


@pytest.mark.parametrize("nothing", [None, "", [None], [""], []])
def test_a_row_may_have_no_video(nothing):
    assert conversation("What?", "A", videos=nothing).images == ()


def test_a_mark_in_an_answer_is_refused():
    with pytest.raises(RecordError, match="stands in an assistant's message"):
        conversation("What?", "<video>", videos=["a.mp4"])


def test_other_frames_are_other_data():
    def of(value, spec=None):
        return image_hash(VideoRef(value, "x", sampling=spec), lambda path: bytes(path))
    assert len({of((PNG,)), of((PNG, PNG)), of(PNG), of(Path("a")),
                of(Path("a"), VideoSpec(frames=2))}) == 5
    assert len(fingerprint([conversation("What?", "A", video=[PNG])])) == 16
