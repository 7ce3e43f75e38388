"""Every column form a record may come in, and what is said where it cannot be understood."""

import io
from pathlib import Path

import pytest
from PIL import Image

from taid_vlm.errors import RecordError, SampleDropped
from taid_vlm.records import ImageRef, Message, Record, parse_record

ASK = {"role": "user", "content": "What?"}
TELL = {"role": "assistant", "content": "That."}
TWO_TURNS = (Message("user", ("What?",)), Message("assistant", ("That.",)))


def read(**row):
    return parse_record(row, "data.jsonl:3")


def turns(record):
    return [(message.role, *message.parts) for message in record.messages]


# ----- texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [
    {"messages": [ASK, TELL]},
    {"messages": (ASK, TELL)},
    {"prompt": "What?", "completion": "That."},
    {"prompt": [ASK], "completion": [TELL]},
    {"prompt": [ASK], "completion": "That."},
    {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]},
    {"conversations": [{"from": "user", "value": "What?"},
                       {"from": "assistant", "value": "That."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}, TELL]},
    {"messages": [ASK, TELL], "prompt": None, "images": None, "text": None},
    {"messages": [ASK, TELL], "text": "What? That.", "id": 7},
], ids=lambda row: "-".join(row))
def test_every_form_of_one_conversation(row):
    record = parse_record(row, "here")
    assert record == Record("here", TWO_TURNS)
    assert record.answers == ["That."]


def test_system_and_several_turns():
    record = read(conversations=[
        {"from": "system", "value": "Be kind."}, {"from": "human", "value": "a"},
        {"from": "gpt", "value": " b\n"}, {"from": "human", "value": "c"},
        {"from": "gpt", "value": "d"}])
    roles = [message.role for message in record.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert record.messages[2].text == " b\n"  # trained on as it stands
    assert record.answers == ["b", "d"]  # compared without the space around it


def test_plain_text():
    record = read(text="Once upon a time.", images=[])
    assert record == Record("data.jsonl:3", text="Once upon a time.")


def test_several_text_parts_and_empty_ones():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text"},
             {"type": "text", "text": "b"}]
    with pytest.raises(RecordError, match="must be text, got NoneType"):
        read(messages=[{"role": "user", "content": parts}])
    del parts[2]
    assert turns(read(messages=[{"role": "user", "content": parts}])) == [("user", "a", "b")]
    assert turns(read(messages=[{"role": "user", "content": None}])) == [("user",)]


# ----- images -------------------------------------------------------------------------------


def test_image_in_every_shape(folder, png, paint, seen):
    path = folder / "pictures" / "red.png"
    shapes = [path, str(path), png("red"), {"bytes": png("red"), "path": None},
              {"bytes": png("red"), "path": "no/such/file.png"}, {"path": str(path)},
              {"bytes": None, "path": str(path)}, paint("red")]
    for shape in shapes:
        for row in ({"image": shape}, {"images": [shape]}, {"images": (shape,)}, {"images": shape}):
            record = read(prompt="What?", completion="That.", **row)
            assert seen(record) == ["red"]
            assert turns(record)[0] == ("user", None, "What?")


def test_relative_paths_start_at_the_root(folder, seen):
    row = {"image": "pictures/blue.png", "prompt": "What?", "completion": "That."}
    record = parse_record(row, "here", folder)
    assert record.images[0].value == folder / "pictures" / "blue.png"
    assert seen(record) == ["blue"]
    absolute = str(folder / "pictures" / "green.png")
    assert seen(parse_record({**row, "image": absolute}, "here", Path("/nowhere"))) == ["green"]
    assert parse_record(row, "here").images[0].value == Path("pictures/blue.png")


def test_caption(png, seen):
    record = read(image=png("green"), text="A meadow.")
    assert turns(record) == [("user", None), ("assistant", "A meadow.")]
    assert seen(record) == ["green"]
    assert record.text is None


@pytest.mark.parametrize("form", ["messages", "conversations", "prompt"])
def test_tags_stand_where_they_are_written(form, png, seen):
    first, answer, second = "<image>\nIs it\n<image>?", "Yes.", "And <image>"
    row = {
        "messages": {"messages": [
            {"role": "user", "content": first}, {"role": "assistant", "content": answer},
            {"role": "user", "content": second}]},
        "conversations": {"conversations": [
            {"from": "human", "value": first}, {"from": "gpt", "value": answer},
            {"from": "human", "value": second}]},
        "prompt": {"prompt": [
            {"role": "user", "content": first}, {"role": "assistant", "content": answer},
            {"role": "user", "content": second}], "completion": "No."},
    }[form]
    record = read(images=[png("red"), png("green"), png("blue")], **row)
    # the newlines LLaVA writes around a tag are no part of the text
    assert turns(record)[:3] == [("user", None, "Is it", None, "?"), ("assistant", "Yes."),
                                 ("user", "And ", None)]
    assert seen(record) == ["red", "green", "blue"]


def test_typed_image_parts_take_the_column_in_order(png, seen):
    content = [{"type": "text", "text": "From"}, {"type": "image"}, {"type": "text", "text": "to"},
               {"type": "image", "image": None, "text": None}]
    record = read(messages=[{"role": "user", "content": content}, TELL],
                  images=[png("blue"), png("red")])
    assert turns(record)[0] == ("user", "From", None, "to", None)
    assert seen(record) == ["blue", "red"]


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_inline_images_need_no_column(key, folder, seen):
    content = [{"type": "image", key: "pictures/green.png"}, {"type": "text", "text": "Where?"},
               {"type": "image", key: "pictures/red.png"}]
    row = {"messages": [{"role": "user", "content": content}, TELL]}
    record = parse_record(row, "here", folder)
    assert turns(record)[0] == ("user", None, "Where?", None)
    assert seen(record) == ["green", "red"]


def test_inline_images_as_bytes_and_pil_beside_the_column(png, paint, seen):
    content = [{"type": "image", "image": png("green")}, {"type": "image"},
               {"type": "image", "image": paint("red")}]
    record = read(messages=[{"role": "user", "content": content}, TELL], image=png("blue"))
    assert seen(record) == ["green", "blue", "red"]


def test_a_tag_beside_typed_parts_is_text(png):
    """Where parts are typed, a question about "<image>" is a question, not a picture."""
    content = [{"type": "image"}, {"type": "text", "text": "What does <image> mean in HTML?"}]
    record = read(messages=[{"role": "user", "content": content}, TELL], image=png("red"))
    assert turns(record)[0] == ("user", None, "What does <image> mean in HTML?")


def test_images_without_marks_open_the_first_question(png, seen):
    record = read(messages=[{"role": "system", "content": "Be kind."}, ASK, TELL, ASK],
                  images=[png("red"), png("blue")])
    assert turns(record) == [("system", "Be kind."), ("user", None, None, "What?"),
                             ("assistant", "That."), ("user", "What?")]
    assert seen(record) == ["red", "blue"]


@pytest.mark.parametrize(("text", "images", "message"), [
    ("<image><image>", 1, "more image marks in the text than images"),
    ("<image>", 2, "1 image marks in the text, but 2 images"),
    ("<image> and <image>", 3, "2 image marks in the text, but 3 images"),
])
def test_marks_and_images_must_match(text, images, message, png):
    with pytest.raises(RecordError, match=f"^data.jsonl:3: {message}"):
        read(prompt=text, completion="That.", images=[png("red")] * images)


# ----- loading ------------------------------------------------------------------------------


def broken(png):
    return {"not an image": b"hello", "empty": b"", "cut short": png("red")[:40],
            "no such file": Path("no/such/picture.png"), "a folder": Path("/")}


@pytest.mark.parametrize("kind", broken(lambda _: b""))
def test_unreadable_image_is_dropped_only_when_loaded(kind, png):
    record = read(prompt="What?", completion="That.", image=broken(png)[kind])
    with pytest.raises(SampleDropped, match=r"unreadable image: data\.jsonl:3") as caught:
        record.images[0].load()
    assert caught.value.reason == "unreadable image"


def test_unreadable_file_is_named():
    with pytest.raises(SampleDropped, match=r"no/such/picture\.png"):
        ImageRef(Path("no/such/picture.png"), "here").load()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16", "LA"])
def test_every_mode_becomes_rgb(mode):
    assert ImageRef(Image.new(mode, (4, 3)), "here").load().mode == "RGB"


def test_photographs_stand_upright():
    lying = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    buffer = io.BytesIO()
    lying.save(buffer, "JPEG", exif=exif)
    assert ImageRef(buffer.getvalue(), "here").load().size == (4, 8)


# ----- categories ---------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "expected"), [
    ({}, ["", "", ""]),
    ({"category": "colour"}, ["colour"] * 3),
    ({"category": 4}, ["4"] * 3),
    ({"categories": ["shape", "count"]}, ["shape", "count", "count"]),
    ({"categories": "shape"}, ["shape"] * 3),
    ({"categories": ["shape"], "category": "colour"}, ["shape"] * 3),
    ({"categories": [], "category": "colour"}, ["", "", ""]),
    ({"categories": None, "category": "colour"}, ["colour"] * 3),
])
def test_categories(row, expected):
    record = read(messages=[ASK, TELL], **row)
    assert [record.category(turn) for turn in range(3)] == expected


def test_text_keeps_its_category():
    assert read(text="a", category="news").category(0) == "news"


# ----- messages -----------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "message"), [
    ({"statement": "a", "reply": "b"}, r"'messages' is missing \(found: reply, statement\).*"
     r"'prompt'.*data\.train\.columns: \{prompt: statement, completion: reply\}"),
    ({}, r"'messages' is missing \(found: none\)"),
    ({"messages": None, "text": None}, r"'messages' is missing \(found: none\)"),
    ({"prompt": "a"}, r"'completion' is missing \(found: prompt\)"),
    ({"completion": "a", "id": 1}, r"'prompt' is missing \(found: completion, id\)"),
    ({"messages": []}, "messages must be a non-empty list"),
    ({"messages": "a"}, "messages must be a non-empty list, got 'a'"),
    ({"messages": {"role": "user"}}, "messages must be a non-empty list"),
    ({"messages": ["a"]}, r"messages\[0\] must hold 'role' and 'content', got 'a'"),
    ({"messages": [ASK, {"role": "user"}]}, r"messages\[1\] must hold 'role' and 'content'"),
    ({"messages": [{"role": "asistant", "content": "a"}]},
     r"messages\[0\].role = 'asistant'. Did you mean 'assistant'"),
    ({"messages": [{"role": "user", "content": 5}]}, "the user message must be text, got int"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]},
     "type 'video' in a user message"),
    ({"conversations": []}, "conversations must be a non-empty list"),
    ({"conversations": [{"role": "user"}]}, r"conversations\[0\] must hold 'from' and 'value'"),
    ({"conversations": [{"from": "humman", "value": "a"}]},
     r"conversations\[0\].from = 'humman'. Did you mean 'human'"),
    ({"prompt": 5, "completion": "a"}, "prompt must be text or a list of messages"),
    ({"text": 5}, "text must be text, got int"),
    ({"text": ["a"], "image": "a.png"}, "text must be text, got list"),
    ({"text": "a", "image": 5}, "an image must be a path, bytes or a PIL image, got int"),
    ({"text": "a", "image": {"bytes": None, "path": None}}, "PIL image, got NoneType"),
    ({"messages": [TELL], "image": "a.png"}, "no user message they could stand in"),
])
def test_mistakes_name_file_line_and_way_out(row, message):
    with pytest.raises(RecordError, match=f"^data.jsonl:3: .*{message}"):
        parse_record(row, "data.jsonl:3")


def test_prompt_and_completion_win_over_text():
    row = {"prompt": "a", "completion": "b", "text": "a b"}
    assert parse_record(row, "x").answers == ["b"]


@pytest.mark.parametrize("url", ["a.png", {"url": "a.png"}])
def test_image_url_parts(url):
    part = {"type": "image_url", "image_url": url}
    row = {"messages": [{"role": "user", "content": [part]}]}
    assert str(parse_record(row, "x").images[0].value) == "a.png"
