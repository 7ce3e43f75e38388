"""Records written as lines read back as they were; prompts are found in all forms of rows."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from zoo.images import images

from taid_vlm.config.data import DataSource, VideoSpec
from taid_vlm.errors import TaidError
from taid_vlm.generate.prompts import parse_source, read_prompts
from taid_vlm.generate.rows import Files, answered, row_of
from taid_vlm.io.images import png
from taid_vlm.records import Record, fingerprint, parse_record
from taid_vlm.records.columns import as_prompt
from taid_vlm.records.videos import VideoRef

Rows = dict[str, Any]
TOOL = {"type": "function", "function": {
    "name": "look", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"x": 3}}}


def message(role: str, content: Any, **more: Any) -> Rows:
    return {"role": role, "content": content, **more}


def texts(folder: Path) -> Rows:
    """Rows by what is odd about them; pictures lie in `folder`."""
    picture = base64.b64encode(png(images(1)[0], None)).decode()
    two = [message("user", [{"type": "image", "max_pixels": 900}, {"type": "text", "text": "a "},
                            {"type": "text", "text": "<image> is no image"}, {"type": "image"}]),
           message("assistant", "<image> neither")]
    return {
        "pair": {"prompt": "what?", "completion": " spaces stay \n"},
        "system": {"system": "be brief", "prompt": "naïve?", "completion": "é"},
        "llava": {"conversations": [{"from": "human", "value": "<image>\nwhat?"},
                                    {"from": "gpt", "value": "red"}], "image": "0.png"},
        "inline": {"prompt": "what?", "completion": "red", "image": picture},
        "typed": {"messages": two, "images": ["0.png", "1.png"]},
        "tools": {"tools": [TOOL], "messages": [
            message("user", "see"), message("assistant", "", tool_calls=[CALL]),
            message("tool", "[1, 2]", name="look", tool_call_id="c1"), message("assistant", "2")]},
        "thought": {"messages": [message("user", "2?"), message(
            "assistant", "B", reasoning_content="one, two", weight=0.5)]},
        "pieces": {"messages": [message("user", [{"type": "text", "text": "a"},
                                                 {"type": "text", "text": "b"}]),
                                message("assistant", "c")]},
        "category": {"prompt": "a", "completion": "b", "category": "kind", "teacher": "first"},
        "frames": {"prompt": "<video>what?", "completion": "b", "videos": [
            {"frames": ["0.png", "1.png", "0.png"], "sample_fps": 4, "nframes": 2}]},
        "film": {"prompt": "<video>what?", "completion": "b", "videos": [
            {"path": "film.mp4", "fps": 2, "max_frames": 5}]},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, picture in enumerate(images(2)):
        picture.save(tmp_path / f"{index}.png")
    (tmp_path / "film.mp4").write_bytes(b"a film")
    return tmp_path


def shown(record: Record) -> Any:
    """All that a record says, images by their bytes."""
    how = [(i.kind, i.sizes, getattr(i, "rate", None), getattr(i, "sampling", None))
           for i in record.images]
    return (fingerprint([record]), record.messages, record.tools, record.categories, record.teacher,
            how, [message.weight for message in record.messages])


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("name", texts(Path()))
def test_a_record_reads_back_as_it_was(name: str, copies: bool, folder: Path) -> None:
    output = folder / "out"
    output.mkdir()
    record = parse_record(texts(folder)[name], "rows:1", folder)
    row = json.loads(json.dumps(row_of(record, Files(output, copies)), ensure_ascii=False))
    again = parse_record(row, "records:1", output)
    assert shown(again) == shown(record)
    assert again.unread == ("teacher",) * (name == "category") and not again.without_effect
    inside = [image for image in again.images if image.kind == "image"
              and output in Path(image.stored()).parents]
    assert len(inside) == (len(record.images) if copies or name == "inline" else 0) or \
        name in ("frames", "film")
    for path in folder.glob("*.*"):
        path.unlink()  # a copy needs nothing outside
    if copies and name not in ("film", "frames"):
        for image in again.images:
            image.load()


def test_one_answer_takes_another_s_place(folder: Path) -> None:
    rows = texts(folder)
    first = answered(parse_record(rows["tools"], "r", folder), 0, "", calls=(CALL,))
    assert [m.role for m in first.messages] == ["user", "assistant"]
    assert first.messages[1].calls == (CALL,) and first.messages[1].weight == 1
    last = answered(parse_record(rows["tools"], "r", folder), 1, "new", "why")
    assert [m.weight for m in last.messages] == [1, 0, 1, 1]
    assert (last.messages[-1].text, last.messages[-1].thought) == ("new", "why")
    assert last.tools and last.messages[1].calls
    assert answered(parse_record(rows["thought"], "r"), 0, "x").messages[-1].weight == 0.5
    assert len(answered(parse_record(rows["typed"], "r", folder), 0, "x").images) == 2


def test_a_video_s_frames_are_pinned_where_its_source_says_them(folder: Path) -> None:
    record = parse_record({"prompt": "a", "completion": "b", "video": ["0.png", "1.png", "0.png"]},
                          "r", folder, video=VideoSpec(fps=1))
    again = parse_record(row_of(record, Files(folder)), "r", folder)
    [then], [now] = record.images, again.images
    assert isinstance(then, VideoRef) and isinstance(now, VideoRef)
    assert now.load().indices == then.load().indices


# ----- prompts ------------------------------------------------------------------------------


def turns(tmp_path: Path, rows: list[Rows], which: Any = "each", **keys: Any) -> Any:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(DataSource(path=str(path), **keys), which)


def test_answers_may_be_absent(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"question": "b", "id": 3}, {"instruction": "c", "input": "d"},
            {"query": "e", "history": [["f", "g"]]}, {"prompt": [message("user", "h")]},
            {"messages": [message("user", "i")]}, {"prompt": "j", "completion": "own"},
            {"prompt": "k", "completion": None}]
    read = turns(tmp_path, rows, "last")
    assert len(read.asked) == len(rows) and not read.left_out
    asked = [prompt.asked() for prompt in read.asked]
    assert [record.question(turn) for record, turn in asked] == [*list("ab"), "c\nd", *"ehijk"]
    assert [prompt.reference for prompt in read.asked] == ["", "", "", "", "", "", "own", ""]
    assert len({prompt.sha256 for prompt in read.asked}) == len(rows)
    assert as_prompt({"question": "a", "answer": "b"}) == {"question": "a", "answer": "b"}
    renamed = turns(tmp_path, [{"q": "a"}], columns={"prompt": "q"})
    assert renamed.asked[0].asked()[0].question(0) == "a"


def test_which_answers_are_written(tmp_path: Path) -> None:
    talk = [message("user", "a"), message("assistant", "b"), message("user", "c"),
            message("assistant", "d", weight=0), message("user", "e"), message("assistant", "f")]
    rows = [{"messages": talk}, {"messages": talk[:5]}, {"text": "a document"},
            {"messages": talk[:2], "train": False}, {"messages": talk[1:4]}]

    def which(turn: str) -> list[str]:
        return [prompt.id.split(":")[1] for prompt in turns(tmp_path, rows, turn).asked]

    assert which("each") == ["1/0", "1/2", "2/2"]
    assert which("last") == ["1/2", "2/2"]
    assert turns(tmp_path, rows).left_out == {"nothing is asked": 2, "no answer is learned": 1}
    with pytest.raises(TaidError, match=r"no record of .* asks for an answer: 1 x nothing"):
        turns(tmp_path, rows[2:3])


def test_records_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a/x", "b/x"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "f.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(TaidError, match=r"two records are called 'x/f.jsonl:1/0'"):
        read_prompts(DataSource(path=str(tmp_path / "*/x/f.jsonl")), "each")


@pytest.mark.parametrize(("data", "words"), [
    ('{"path": "x", "colums": {}}', "Did you mean 'columns'"), ('{"path": ', "not valid JSON"),
    ('{"path": "x", "weight": 2}', "weight has no effect"),
    ('{"path": "x", "max_records": 4}', "max_records stands twice"),
    ('{"name": "x"}', "'path' is missing")])
def test_data_that_cannot_be(data: str, words: str) -> None:
    with pytest.raises(TaidError, match=words):
        parse_source(data, 3)


def test_data_with_its_keys() -> None:
    source = parse_source('{"path": "x", "columns": {"prompt": "q"}}', 3, 2)
    assert source == DataSource(path="x", columns={"prompt": "q"}, max_records=3,
                                video=VideoSpec(frames=2))
