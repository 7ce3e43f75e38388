"""Rows in the forms that users have them in, and the line to paste where they cannot be read."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from taid_vlm.errors import RecordError
from taid_vlm.records import Record, open_records, parse_record

TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
SHARED = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]


def read(**row):
    return parse_record(row, "a.jsonl:3")


def turns(record):
    return [(message.role, message.text) for message in record.messages]


# ----- one conversation in every form -------------------------------------------------------


@pytest.mark.parametrize("row", [
    {"messages": np.array(TURNS, dtype=object)},
    {"messages": json.dumps(TURNS)},
    {"messages": {"role": ["user", "assistant"], "content": ["What?", "That."]}},
    {"messages": {"role": np.array(["user", "assistant"]),
                  "content": np.array(["What?", "That."])}},
    {"messages": [{"role": "user", "content": np.array([{"type": "text", "text": "What?"}])},
                  TURNS[1]]},
    {"messages": [{**TURNS[0], "content": {"type": ["text"], "text": ["What?"]}}, TURNS[1]]},
    {"messages": SHARED},
    {"conversations": TURNS},
    {"conversations": json.dumps(SHARED)},
    {"conversations": {"from": ["human", "gpt"], "value": ["What?", "That."]}},
    {"prompt": np.array(TURNS[:1], dtype=object), "completion": TURNS[1:]},
    {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])},
    {"query": "What?", "response": "That."},
    {"query": "What?", "response": "That.", "history": []},
    {"query": "What?", "response": "That.", "history": None},
    {"instruction": "What?", "input": "", "output": "That."},
    {"instruction": "What?", "output": "That."},
    {"instruction": "What?", "context": "", "response": "That."},
    {"question": "What?", "answer": "That.", "hint": float("nan")},
    {"messages": TURNS, "prompt": float("nan"), "image": float("nan"), "text": pd.NA},
], ids=str)
def test_every_form_of_one_conversation(row):
    assert turns(read(**row)) == [("user", "What?"), ("assistant", "That.")]
    assert read(**row).unread == ()


def test_a_prompt_that_only_begins_like_json_is_text():
    text = '[{"role": "user"}] is what?'
    assert turns(read(prompt=text, completion="A list."))[0] == ("user", text)


def test_alpacas_input_is_read():
    record = read(instruction="Add.", input="1 and 2", output="3", text="Below is an instruction")
    assert turns(record) == [("user", "Add.\n1 and 2"), ("assistant", "3")]
    assert record.unread == ("text",)


def test_history_stands_before_the_question():
    record = read(query="c", response="d", history=np.array([["a", "b"]]))
    assert turns(record) == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_columns_win_over_other_names():
    record = read(prompt="a", completion="b", question="c", answer="d")
    assert record.answers == ["b"]
    assert record.unread == ("question", "answer")


# ----- no image -----------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [
    "", [None], [], [""], float("nan"), np.float32("nan"), [float("nan")], np.array([None]), "[]",
    "[null]", pd.NaT], ids=repr)
@pytest.mark.parametrize("column", ["image", "images"])
def test_no_image(nothing, column):
    assert read(text="a", **{column: nothing}) == Record("a.jsonl:3", text="a")
    record = read(prompt="a", completion="b", **{column: nothing})
    assert (record.images, record.unread) == ((), ())


# ----- columns that nothing reads -----------------------------------------------------------


def test_unread_columns_are_named():
    record = read(messages=TURNS, id=7, loss=0.3, name="x", source="", tags=[], category="c")
    assert record.unread == ("loss", "name")
    assert read(text="a", prompt=None, reward=1.0).unread == ("reward",)


# ----- refused, with the line to paste ------------------------------------------------------


@pytest.mark.parametrize(("row", "message"), [
    ({"Question": "a", "Answer": "b"}, r"data\.train\.columns: \{prompt: Question, completion: An"),
    ({"input": "a", "output": "b"}, r"\{prompt: input, completion: output\}"),
    ({"prompt": "a", "chosen": "b"}, r"'completion' is missing.* \{completion: chosen\}"),
    ({"ask": "a", "completion": "b"}, r"'prompt' is missing.* \{prompt: ask\}"),
    ({"content": "a", "url": ""}, r"\{text: content\}"),
    ({"dialog": TURNS}, r"\{messages: dialog\}"),
    ({"query": "a", "response": None}, r"\{prompt: \.\.\., completion: \.\.\.\}"),
    ({"pro\ud83dmpt": "a"}, r"found: pro\\ud83dmpt"),
    ({"first": "a", "second": "b"}, r"\{prompt: first, completion: second\}"),
    ({"question": "a", "answer": "b", "choices": ["b", "c"]},
     r"'choices', which can be joined.*\{prompt: question, completion: answer\}"),
    ({"question": "a", "answer": "b", "query": "c", "response": "d"},
     r"'query' with 'response' and 'question' with 'answer'.*\{prompt: query, completion: resp"),
    ({"question": "a", "answer": 3}, "answer must be text, got 3"),
    ({"query": "a", "response": "b", "history": ["c"]}, r"history must be a list of \[question"),
    ({"messages": {"role": ["user"], "content": ["a", "b"]}},
     "different lengths .role 1, content 2"),
    ({"messages": "[{"}, "messages: not valid JSON"),
    ({"text": "a", None: ["b"]}, "more cells than the header has names"),
])
def test_what_cannot_be_read(row, message):
    with pytest.raises(RecordError, match=f"^a.jsonl:3: ?.*{message}") as caught:
        parse_record(row, "a.jsonl:3")
    assert str(caught.value).encode()  # half a character could not be printed


# ----- through files ------------------------------------------------------------------------


def test_parquet_of_pandas(tmp_path):
    """Lists come out of a DataFrame as arrays, absent cells as NaN."""
    frame = pd.DataFrame({"messages": [TURNS, TURNS], "image": [None, float("nan")]})
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "a.parquet")
    again = pd.read_parquet(tmp_path / "a.parquet")
    assert isinstance(again["messages"][0], np.ndarray)
    assert [turns(parse_record(row, "x")) for row in again.to_dict("records")] == [
        turns(record) for record in open_records(str(tmp_path / "a.parquet"))]


def test_a_row_of_a_table_with_too_many_cells(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc,d,e\n")
    with pytest.raises(RecordError, match=r"^a\.csv\[1\]: more cells than the header has names"):
        open_records(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_conversation_is_read_as_messages(keys: tuple[str, str], as_text: bool) -> None:
    """As Mantis calls it; a text beside a prompt is none."""
    said = [dict(zip(keys, turn, strict=True)) for turn in (("user", "a"), ("assistant", "b"))]
    row = {"conversation": json.dumps(said) if as_text else said, "options": []}
    assert parse_record(row, "row 0") == parse_record({"messages": said}, "row 0")
    other = {"prompt": "a", "completion": "b", "conversation": said}
    assert parse_record(other, "row 0").unread == ("conversation",)
