"""What a message may hold beside its role and content: used, refused by name, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from zoo import make_tokenizer

from taid_vlm.adapters import make_adapter
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.errors import RecordError
from taid_vlm.records import Record, fingerprint, open_records, parse_record
from taid_vlm.records.record import Malformed, first_rows

TOOL = {"name": "look", "parameters": {"type": "object", "properties": {"at": {}, "null": {}}}}


def read(*answer_keys: dict[str, Any], **row: Any) -> Record:
    answers = [{"role": "assistant", "content": "It is.", **keys} for keys in answer_keys]
    return parse_record({"messages": [{"role": "user", "content": "Is it?"}, *answers], **row},
                        "a.jsonl:4")


@pytest.mark.parametrize(("keys", "said"), [
    ({"weight": -1}, r"messages\[1\]\.weight = -1, but it must be true, false or a number from 0"),
    ({"weight": float("nan")}, "weight = nan"), ({"train": "no"}, "train = 'no'"),
    ({"mask": True}, r"messages\[1\]\.mask is not read; say train: false or weight: 0"),
    ({"images": ["a.png"]}, "images is not read; images stand in a column of the row"),
    ({"refusal": "No."}, "refusal is not read; it belongs into content"),
    ({"tool_calls": "{"}, "tool_calls must be JSON"),
    ({"tool_calls": [{"function": {"arguments": {}}}]}, "a call needs 'name' and 'arguments'"),
    ({"tool_calls": [{"name": "look", "arguments": "[1]"}]}, "must be an object or its JSON"),
    ({"reasoning_content": ["x"]}, "reasoning_content must be text, got list"),
    ({"role": "assistent"}, r"role = 'assistent'\. Did you mean 'assistant'\?"),
    ({"role": "user", "tool_calls": [TOOL]}, "calls tools, but its role is 'user'"),
])
def test_what_cannot_be_meant_is_refused_by_place(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordError, match=rf"^a\.jsonl:4: .*{said}"):
        read(keys)


@pytest.mark.parametrize(("tools", "said"), [
    ("{", "must be JSON"), ([{"parameters": {}}], "JSON schemas, each with a 'name'"),
    ([3], "JSON schemas"), ("[\"look\"]", "must be JSON")])
def test_tools_that_are_none(tools: Any, said: str) -> None:
    with pytest.raises(RecordError, match=rf"^a\.jsonl:4: tools {said}|{said}"):
        read({}, tools=tools)


def test_keys_that_nothing_reads_are_kept_by_name() -> None:
    record = read({"score": 3, "id": None}, {"score": 1, "lang": "en", "name": "bot"})
    assert record.without_effect == ("messages[].score: nothing reads it",
                                     "messages[].lang: nothing reads it")
    assert record.messages[2].name == "bot"


def test_what_arrow_fills_in_is_no_argument() -> None:
    call = {"name": "look", "arguments": {"at": "x", "null": None, "other": None}}
    (message,) = read({"tool_calls": [call]}, tools=[TOOL]).messages[1:]
    assert message.calls[0]["function"]["arguments"] == {"at": "x", "null": None}
    (message,) = read({"tool_calls": [call]}).messages[1:]
    assert message.calls[0]["function"]["arguments"] == call["arguments"]
    filled = {**TOOL, "parameters": {**TOOL["parameters"], "required": None}}
    assert read({}, tools=[filled]).tools == read({}, tools=[TOOL]).tools


def test_system_column_and_system_turn() -> None:
    assert read({}, system="Be kind.").messages[0].text == "Be kind."
    row = {"prompt": "a", "completion": "b", "system": "Be kind."}
    assert [m.role for m in parse_record(row, "x").messages] == ["system", "user", "assistant"]
    same = {"messages": [{"role": "system", "content": "Be kind."},
                         {"role": "user", "content": "a"}], "system": "Be kind."}
    assert len(parse_record(same, "x").messages) == 2
    with pytest.raises(RecordError, match="another system turn; keep one"):
        parse_record({**same, "system": "Be brief."}, "x")


def test_other_weights_tools_and_thoughts_are_other_records() -> None:
    plain = [read({})]
    others = [read({"weight": 0.5}), read({"reasoning": "x"}), read({}, tools=[TOOL]),
              read({"tool_calls": [TOOL]})]
    assert len({fingerprint([one]) for one in (*plain, *others)}) == 5
    assert fingerprint(plain) == fingerprint([read({"weight": 1.0, "train": True})])


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_characters_cost_their_records_and_are_named(suffix: str, tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "It is red"}
    rows = [good, {**good, "completion": "It is red \ud83d"}, {**good, "system": "\ude00"},
            {**good, "tools": [{"name": "\ud83d"}]}, good]
    file = tmp_path / f"data{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    read_rows = list(first_rows(open_records(str(file))))
    places = [row.problem.split(": ")[0] for row in read_rows if isinstance(row, Malformed)]
    line = "data.jsonl:{}" if suffix == ".jsonl" else "data.json[{}]"
    assert places == [line.format(i + (suffix == ".jsonl")) for i in (1, 2, 3)]
    assert {row.reason for row in read_rows if isinstance(row, Malformed)} == {"half a character"}


@pytest.mark.parametrize("key", ["train", "loss", "trainable"])
def test_a_row_may_say_that_it_is_not_learned(key: str) -> None:
    record = parse_record({"prompt": "a", "completion": "b", key: False}, "row")
    assert record.learned == [] and record.unread == ()
    assert parse_record({"prompt": "a", "completion": "b", key: True}, "row").learned == [0]
    assert parse_record({"prompt": "a", "completion": "b", key: 0.3}, "row").unread == (key,)
    text = parse_record({"text": "once upon", key: False}, "row")
    collator = DistillationCollator(make_adapter(make_tokenizer("llama"), "student"))
    for row in (record, text):
        assert collator([row])["counts"]["dropped"] == {"no answer is learned": 1}
