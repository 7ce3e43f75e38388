"""One decoder: what it gives of every kind of picture, and what it refuses without decoding it."""

import base64
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageDraw, ImageFile

from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import RecordError, SampleDropped
from taid_vlm.records import ImageRef, parse_record
from taid_vlm.records.images import FORMATS, MAX_PIXELS, TOO_LARGE, UNREADABLE


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def loaded(value, **options):
    return np.asarray(ImageRef(value, "data.jsonl:3", **options).load())


def refused(value, **options):
    """The reason and the message."""
    with pytest.raises(SampleDropped) as caught:
        ImageRef(value, "data.jsonl:3", **options).load()
    return caught.value.reason, str(caught.value)


# ----- whatever a decoder raises ------------------------------------------------------------

ODD = Image.new("RGB", (8, 6), "red")
# a width that is text, and an orientation that makes Pillow write the block anew
ODD_EXIF = (b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\0\0\x02\0\0\0\x06\0\0\0&"
            b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0maker\0")


def test_odd_exif_is_an_unreadable_image():
    reason, message = refused(encoded(ODD, "JPEG", exif=ODD_EXIF))
    assert reason == UNREADABLE
    assert message.startswith("unreadable image: data.jsonl:3: ")


@pytest.mark.parametrize("error", [
    struct.error("a"), OSError("a"), ValueError("a"), SyntaxError("a"), zlib.error("a"),
    MemoryError(), RecursionError("a"), KeyError("a"), IndexError("a"), TypeError("a"),
    OverflowError("a"), ZeroDivisionError("a"), AttributeError("a"), EOFError("a"),
    NotImplementedError("a"), RuntimeError("a"), UnicodeDecodeError("utf-8", b"a", 0, 1, "a"),
    Warning("a"), AssertionError("a"),
], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stored", ["bytes", "path", "what gives it"])
def test_whatever_a_decoder_raises(error, stored, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise error

    (tmp_path / "a.png").write_bytes(encoded(ODD))
    value = {"bytes": encoded(ODD), "path": tmp_path / "a.png", "what gives it": fail}[stored]
    if stored != "what gives it":
        monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    reason, message = refused(value)
    assert reason == UNREADABLE
    assert type(error).__name__ in message


@pytest.mark.parametrize("data", [
    encoded(ODD)[:45], encoded(ODD, "JPEG")[:300], encoded(ODD, "GIF")[:20], b"", b"\x89PNG\r\n",
    b"II*\0" + b"\xff" * 60, b"BM" + b"\xff" * 60,
])
def test_broken_files(data):
    assert refused(data)[0] == UNREADABLE


def test_a_stop_by_the_user_is_no_broken_image(monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", stop)
    with pytest.raises(KeyboardInterrupt):
        loaded(encoded(ODD))


# ----- what is not opened, or not decoded ---------------------------------------------------


def header(width, height):
    """A PNG that says how large it is and holds nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(8193, 8192), (13_000, 13_000), (2**20, 2**20), (2**27, 1)])
def test_a_picture_of_too_many_pixels_is_not_decoded(size, tmp_path):
    (tmp_path / "a.png").write_bytes(header(*size))
    tracemalloc.start()
    for value in (header(*size), tmp_path / "a.png"):
        reason, message = refused(value)
        assert reason == TOO_LARGE == "image larger than max_pixels"
        assert "data.jsonl:3" in message
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_the_bound_is_in_pixels_and_can_be_set():
    assert MAX_PIXELS == 64 * 2**20
    picture = encoded(Image.new("L", (10, 10), 7))
    assert loaded(picture, max_pixels=100).shape == (10, 10, 3)
    assert "10 x 10 pixels; at most 99" in refused(picture, max_pixels=99)[1]
    assert refused(Image.new("L", (10, 10)), max_pixels=99)[0] == TOO_LARGE
    row = {"prompt": "a", "completion": "b", "image": picture}
    assert parse_record(row, "x", max_pixels=9).images[0].max_pixels == 9
    assert parse_record(row, "x").images[0].max_pixels == MAX_PIXELS


def test_pipes_devices_and_folders_are_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("it was opened"))
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path, Path("/dev/null")):
        reason, message = refused(path)
        assert (reason, path.name in message, "there is no such file" in message) == (
            UNREADABLE, True, True)


def test_only_named_formats_are_decoded(tmp_path, monkeypatch):
    """EPS would start Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("it was started"))
    picture = encoded(ODD, "EPS")
    (tmp_path / "a.png").write_bytes(picture)
    assert refused(picture)[0] == refused(tmp_path / "a.png")[0] == UNREADABLE
    assert refused(encoded(ODD, "PCX"))[0] == UNREADABLE
    assert not {"EPS", "WMF", "PSD", "FITS", "HDF5"} & set(FORMATS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA"])
def test_the_usual_formats(kind):
    found = loaded(encoded(ODD, kind))
    assert np.abs(found.astype(int) - [255, 0, 0]).max() < 5


# ----- transparency, depth, direction -------------------------------------------------------


def drawing(mode="RGBA"):
    """A black square on what is transparent, whose hidden colour is black, too."""
    image = Image.new("RGBA", (12, 8), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((4, 2, 7, 5), fill=(0, 0, 0, 255))
    return image if mode == "RGBA" else image.convert(mode)


def with_clear_colour(mode):
    """Without an alpha channel: one colour, or one entry of the palette, is transparent."""
    colour = {"RGB": (9, 9, 9), "L": 9, "P": 1, "1": 1}[mode]
    image = Image.new(mode, (12, 8), colour)
    if mode == "P":
        image.putpalette([0, 0, 0] * 256)
    ImageDraw.Draw(image).rectangle((4, 2, 7, 5), fill=(0, 0, 0) if mode == "RGB" else 0)
    return image, colour


def palette_and_alpha():
    image = Image.new("P", (12, 8))
    image.putpalette([0, 0, 0] * 256)
    image.putalpha(drawing().getchannel("A"))
    assert image.mode == "PA"
    return image


PICTURES = {
    "RGBA": lambda: drawing(), "RGBA png": lambda: encoded(drawing()),
    "RGBA webp": lambda: encoded(drawing(), "WEBP", lossless=True, exact=True),
    "RGBA tiff": lambda: encoded(drawing(), "TIFF"), "LA": lambda: drawing("LA"),
    "LA png": lambda: encoded(drawing("LA")), "PA": lambda: palette_and_alpha(),
    "RGBa": lambda: drawing("RGBa"),
    "gif": lambda: encoded(drawing(), "GIF"),
    **{f"{mode} with a clear colour": lambda mode=mode: encoded(
        with_clear_colour(mode)[0], transparency=with_clear_colour(mode)[1])
       for mode in ("RGB", "L", "P")},
    "palette of alphas": lambda: encoded(
        with_clear_colour("P")[0], transparency=b"\xff\0" + b"\xff" * 254),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_what_is_transparent_is_white(kind):
    expected = np.full((8, 12, 3), 255)
    expected[2:6, 4:8] = 0
    assert np.array_equal(loaded(PICTURES[kind]()), expected)


def test_half_transparent_is_half_white():
    assert loaded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).tolist() == [[[127] * 3]]


def test_a_picture_of_the_users_own_stays_as_it_is():
    image = drawing()
    before = image.tobytes()
    loaded(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


GREY16 = np.array([[0, 257, 32_896, 65_535], [128, 129, 1000, 60_000]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "memory"])
def test_16_bits_are_scaled_by_value(kind):
    image = Image.fromarray(GREY16)
    assert image.mode == "I;16"
    found = loaded(image if kind == "memory" else encoded(image, kind))
    expected = np.rint(GREY16 / 257).astype(int)
    assert expected.tolist() == [[0, 1, 128, 255], [0, 1, 4, 233]]
    assert np.array_equal(found, np.repeat(expected[..., None], 3, -1))


def test_a_clear_value_of_16_bits_is_white():
    found = loaded(encoded(Image.fromarray(GREY16), transparency=1000))
    assert found[1, 2].tolist() == [255] * 3
    assert found[1, 1].tolist() == [1] * 3


@pytest.mark.parametrize(("values", "expected"), [
    (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
    (np.array([[-3.0, 0.0, 3.0]], np.float32), [0, 128, 255]),
    (np.array([[7.5, 7.5, 7.5]], np.float32), [0, 0, 0]),
    (np.array([[-100, 0, 100_000]], np.int32), [0, 0, 255]),
    (np.array([[0, 257, 65_535]], np.int32), [0, 1, 255]),
])
def test_floats_and_whole_numbers_are_scaled_and_never_clipped(values, expected):
    image = Image.fromarray(values)
    for value in (image, encoded(image, "TIFF")):
        assert loaded(value)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_grey_that_is_no_number_is_refused(bad):
    reason, message = refused(Image.fromarray(np.array([[0.0, bad]], np.float32)))
    assert (reason, "not finite" in message) == (UNREADABLE, True)


# ----- what a row says of an image ----------------------------------------------------------


def read(image, root=None, **row):
    return parse_record({"prompt": "a", "completion": "b", "image": image, **row},
                        "data.jsonl:3", root)


NOISE = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
PNG = encoded(Image.fromarray(NOISE))
TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize("text", [
    f"data:image/png;base64,{TEXT}", f"data:;base64,{TEXT}", TEXT,
    "\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)),
    "\r\n".join(TEXT[i : i + 64] for i in range(0, len(TEXT), 64)) + "\r\n",
    TEXT.rstrip("="), base64.urlsafe_b64encode(PNG).decode(),
    f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode().rstrip('=')}",
])
@pytest.mark.parametrize("form", ["column", "struct", "part", "image_url"])
def test_images_in_text(text, form):
    part = {"type": "image", "image": text} if form == "part" else {
        "type": "image_url", "image_url": {"url": text}}
    record = {"column": lambda: read(text), "struct": lambda: read({"bytes": text})}.get(
        form, lambda: parse_record({"messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"}]}, "data.jsonl:3"))()
    assert record.images[0].stored() == PNG
    assert np.array_equal(np.asarray(record.images[0].load()), NOISE)


def test_files_as_urls(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    (ref,) = read(f"file://{tmp_path}/a%20b.png", Path("/elsewhere")).images
    assert ref.value == tmp_path / "a b.png"
    assert np.array_equal(np.asarray(ref.load()), NOISE)


@pytest.mark.parametrize("url", ["https://a.b/c.png", "http://a.b/c.png", "s3://a/b.png"])
def test_other_urls_are_named_and_not_fetched(url):
    (ref,) = read(url, Path("/root")).images
    reason, message = refused(ref.value)
    assert reason == UNREADABLE
    assert f"data.jsonl:3: {url}: " in message and "not fetched" in message


@pytest.mark.parametrize("text", [
    "data:image/png;base64,???", "data:image/svg+xml,<svg/>", f"data:image/png;base64,{TEXT[:90]}",
    "data:", "A" * 1_000_000, "no such place " * 100_000, "\0",
])
def test_what_is_no_image_is_shown_cut_short(text):
    (ref,) = read(text).images
    reason, message = refused(ref.value)
    assert reason == UNREADABLE
    assert len(message) < 500


@pytest.mark.parametrize("nothing", [None, "", [None], [""], ["", None], []])
def test_a_row_may_have_no_image(nothing):
    assert read(nothing).images == ()
    assert read(None, images=nothing).images == ()


def test_an_empty_place_among_images_counts_as_none():
    with pytest.raises(RecordError, match="more image marks in the text than images"):
        parse_record({"prompt": "<image><image>", "completion": "a", "images": [PNG, ""]}, "x")


@pytest.mark.parametrize("nothing", ["  ", float("nan"), [float("nan"), " "]])
def test_what_tables_write_for_no_image(nothing):
    assert read(nothing).images == ()
    (row,) = [Row({"image": nothing}, "t[0]")]
    assert row.images() == ()


def test_a_file_named_after_its_hash_is_no_base64(tmp_path):
    name = "0123456789abcdef" * 4
    (tmp_path / name).write_bytes(PNG)
    (ref,) = read(name, tmp_path).images
    assert ref.value == tmp_path / name
    assert np.array_equal(np.asarray(ref.load()), NOISE)


def test_a_file_of_this_machine_as_url(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (ref,) = read(f"file://localhost{tmp_path}/a.png").images
    assert np.array_equal(np.asarray(ref.load()), NOISE)


def test_the_first_picture_of_an_animation():
    frames = [drawing(), Image.new("RGBA", (12, 8), (255, 0, 0, 99))]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:],
                       **({"lossless": True} if kind == "WEBP" else {}))
        assert np.array_equal(loaded(data), loaded(drawing()))


# ----- marks in the text --------------------------------------------------------------------


def conversation(*turns, **row):
    return parse_record({"messages": [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)],
        **row}, "data.jsonl:3", Path("/root"))


def values(record):
    return [str(ref.stored()) for ref in record.images]


@pytest.mark.parametrize("path", ["a.png", " a.png\n", "file:///root/a.png"])
def test_the_paths_that_qwen_vl_wrote_into_texts(path):
    record = conversation(f"Picture 1: <img>{path}</img>\nWhat is it?", "A dog.")
    assert values(record) == ["/root/a.png"]
    assert record.messages[0].parts == ("Picture 1: ", None, "What is it?")
    record = conversation([{"type": "text", "text": f"<img>{path}</img>What?"}], "A dog.")
    assert (values(record), record.messages[0].parts) == (["/root/a.png"], (None, "What?"))


def test_paths_in_texts_and_a_column_together():
    record = conversation("<image> or <img>b.png</img> or <image>?", "Yes.",
                          images=["a.png", "c.png"])
    assert values(record) == ["/root/a.png", "/root/b.png", "/root/c.png"]
    assert record.messages[0].parts == (None, " or ", None, " or ", None, "?")


def test_a_path_that_is_none_in_text():
    with pytest.raises(SampleDropped, match="no such file"):
        conversation("<img>no.png</img>What?", "A").images[0].load()
    assert conversation("Write <img> and <i>.", "Yes <img/>.").images == ()


@pytest.mark.parametrize("text", ["It is <img>a.png</img>.", "It is <image>."])
def test_an_image_in_an_answer_is_refused(text):
    with pytest.raises(RecordError, match=r"data.jsonl:3: an image stands in an assistant's"):
        conversation("What?", text, images=["b.png"])


def mixed(*parts):
    return [{"type": "text", "text": p, "index": None} if isinstance(p, str) else
            {"type": "image", "text": None, "index": p} for p in parts]


def test_image_parts_by_index():
    record = conversation(mixed(1, "or", 0, "?"), "No.", mixed("And", 1, "?"), "Yes.",
                          images=["a.png", "b.png"])
    assert values(record) == ["/root/b.png", "/root/a.png", "/root/b.png"]


@pytest.mark.parametrize(("indices", "message"), [
    ((0, 2), r"data.jsonl:3: an image part's index = 2, but the row has 2 images"),
    ((-1, 0), "index = -1"), (("x", 0), "some have none|index = "), ((True, 0), "index = True"),
    ((0, 0), "2 image marks in the text, but 2 images"),
])
def test_an_index_that_names_no_image(indices, message):
    parts = [{"type": "image", "index": index} for index in indices]
    with pytest.raises(RecordError, match=message):
        conversation(parts, "No.", images=["a.png", "b.png"])


def test_some_parts_with_an_index_and_some_without():
    with pytest.raises(RecordError, match="give all of them one, or none"):
        conversation([{"type": "image", "index": 1}, {"type": "image"}], "No.",
                     images=["a.png", "b.png"])
