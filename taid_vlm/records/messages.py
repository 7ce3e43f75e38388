"""One turn of a conversation: who speaks, how much it counts, its thought and its tool calls.

Of a message's keys these are read, beside role and content (or LLaVA's from and value):
- `weight`, `loss_weight`, `train`, `trainable`, `training`, `loss`, `masked`: whether, or how much,
  the turn is learned; several multiply;
- `tool_calls`, or `function_call`; `name` and `tool_call_id`;
- `reasoning_content`, `reasoning` or `thinking`: the thought before an answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from taid_vlm.errors import HalfCharacterError, RecordError, nearest

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "function": "tool", "ipython": "tool", "observation": "tool"}
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", **ROLES}
LEARNED, UNLEARNED = ("weight", "loss_weight", "train", "trainable", "training", "loss"), "masked"
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
_CARRIERS = ("image", "images", "video", "videos", "audio", "audios", "refusal", "mask")
_READ = {*LEARNED, UNLEARNED, *THOUGHTS, *CALLS, "name", "tool_call_id"}


@dataclass(frozen=True)
class Message:
    """One turn.

    parts: texts, and None where an image stands.
    weight: a factor of its tokens' losses; 0 is not learned.
    thought: what came under a key of its own; one that the content spells stays there.
    calls: {"type": "function", "function": {"name", "arguments"}} each, with an "id" if it has one.
    """

    role: str
    parts: tuple[str | None, ...]
    weight: float = 1.0
    thought: str | None = None
    calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if part is not None)

    @property
    def is_empty(self) -> bool:
        """Whether an answer says nothing at all."""
        return not (self.text.strip() or self.calls or (self.thought or "").strip())


@dataclass(frozen=True)
class Turn:
    """A message before its content is split into texts and images; `extra` goes into Message."""

    role: str
    content: Any
    extra: Mapping[str, Any]
    calls: tuple[Mapping[str, Any], ...] = ()
    unread: tuple[str, ...] = ()


def read_turns(
    value: Any, column: str, source: str, keys: tuple[str, str] = ("role", "content"),
    roles: Mapping[str, str] = ROLES,
) -> list[Turn]:
    """The messages of one column; raises RecordError with file, line and place."""
    turns = []
    for index, item in enumerate(expect_list(value, column, source)):
        where = f"{column}[{index}]"
        whole = isinstance(item, Mapping) and keys[0] in item and (
            keys[1] in item or any(item.get(key) for key in (*CALLS, *THOUGHTS)))
        if not whole:
            raise RecordError(f"{source}: {where} must hold '{keys[0]}' and '{keys[1]}', got "
                              f"{shown(item)}.")
        turns.append(_turn(item, where, column, source, keys, roles))
    return turns


def _turn(
    item: Mapping[str, Any], where: str, column: str, source: str, keys: tuple[str, str],
    roles: Mapping[str, str],
) -> Turn:
    given = {key: value for key, value in item.items() if value is not None}
    role = str(given.get(keys[0]))
    if role not in roles:
        raise RecordError(f"{source}: {where}.{keys[0]} = '{role}'.{nearest(role, roles)}")
    for key in _CARRIERS:
        if given.get(key):
            mend = ("say train: false or weight: 0" if key == "mask" else
                    "it belongs into content" if key == "refusal" else
                    f"{key.rstrip('s')}s stand in a column of the row or in typed parts of content")
            raise RecordError(f"{source}: {where}.{key} is not read; {mend}.")
    content, place = given.get(keys[1]), f"{source}: {where}"
    calls = [*_calls(given, place)]
    if role == "function_call":  # ShareGPT: the call is the text
        calls, content = [*_listed(content, f"{place}.{keys[1]}")], None
    if roles[role] == "tool":
        content = _result(content)
    extra: dict[str, Any] = {
        "weight": _weight(given, place), "thought": _thought(given, place),
        "name": _text(given, "name", place),
        "tool_call_id": _text(given, "tool_call_id", place)}
    if calls and roles[role] != "assistant":
        raise RecordError(f"{place} calls tools, but its role is '{role}'.")
    unread = tuple(f"{column}[].{key}: nothing reads it"
                   for key in given if key not in {*_READ, *keys})
    return Turn(roles[role], content, extra, tuple(calls), unread)


def _weight(given: Mapping[str, Any], place: str) -> float:
    weight = 1.0
    for key in (*LEARNED, UNLEARNED):
        value = given.get(key, key != UNLEARNED)
        if not isinstance(value, (bool, int, float)) or not 0 <= value < math.inf:
            raise RecordError(f"{place}.{key} = {shown(value)}, but it must be true, false or a "
                              "number from 0: how much this turn counts.")
        weight *= (0.0 if value else 1.0) if key == UNLEARNED else float(value)
    return weight


def _thought(given: Mapping[str, Any], place: str) -> str | None:
    texts = [_text(given, key, place) for key in THOUGHTS]
    return next((text for text in texts if text and text.strip()), None)


def _text(given: Mapping[str, Any], key: str, place: str) -> str | None:
    value = given.get(key)
    return value if value is None else expect_text(value, f"{place}.{key}")


def _result(content: Any) -> Any:
    """A tool's result as text; what is no text is written as JSON."""
    typed = isinstance(content, (list, tuple)) and all(
        isinstance(part, Mapping) and "type" in part for part in content)
    return content if content is None or isinstance(content, str) or typed else as_json(content)


# ----- tools --------------------------------------------------------------------------------


def _calls(given: Mapping[str, Any], place: str) -> Iterator[dict[str, Any]]:
    for key in CALLS:
        if given.get(key):
            yield from _listed(given[key], f"{place}.{key}")


def _listed(value: Any, place: str) -> Iterator[dict[str, Any]]:
    value = _parsed(value, place)
    for item in value if isinstance(value, (list, tuple)) else [value]:
        yield _call(_parsed(item, place), place)


def _call(item: Any, place: str) -> dict[str, Any]:
    """A call in the one shape that chat templates know: arguments as an object."""
    inner = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RecordError(f"{place}: a call needs 'name' and 'arguments', got {shown(item)}.")
    values = [inner.get(key) for key in ("arguments", "parameters")]
    own: Any = next((value for value in values if value is not None), {})
    arguments = _parsed(own, f"{place}.arguments") if own != "" else {}
    if not isinstance(arguments, Mapping):
        raise RecordError(f"{place}.arguments of '{inner['name']}' must be an object or its JSON, "
                          f"got {shown(own)}.")
    call = {"type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}
    expect_text(as_json(call), place)
    return call if item.get("id") is None else {**call, "id": str(item["id"])}


def read_tools(value: Any, source: str) -> tuple[dict[str, Any], ...]:
    """The `tools` of a row: JSON schemas in a list, or all of it or each of them as JSON.

    Keys that are None are no part of a schema: Arrow gives every object the keys of all others.
    """
    place = f"{source}: tools"
    listed = _parsed(value, place) if value else []
    tools = []
    for item in listed if isinstance(listed, (list, tuple)) else [listed]:
        tool = _without_none(_parsed(item, place))
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordError(f"{place} must be a list of JSON schemas, each with a 'name', got "
                              f"{shown(item)}.")
        expect_text(as_json(tool), place)
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


def without_filled(
    calls: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], ...]:
    """Calls without the arguments that are None and that their tool does not have (Arrow's)."""
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

    def own(call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call["function"]
        if function["name"] not in known:
            return call
        valid = (known[function["name"]].get("properties") or {}).keys()
        kept = {key: value for key, value in function["arguments"].items()
                if value is not None or key in valid}
        return {**call, "function": {**function, "arguments": kept}}

    return tuple(map(own, calls))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [*map(_without_none, value)] if isinstance(value, (list, tuple)) else value


def _parsed(value: Any, place: str) -> Any:
    """What a text says as JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{place} must be JSON, got {shown(value)}: {error}.") from None


def as_json(value: Any) -> str:
    """As chat templates print it."""
    return json.dumps(value, ensure_ascii=False, default=str)


# ----- checks -------------------------------------------------------------------------------


def expect_text(value: Any, place: str) -> str:
    """The value; raises RecordError where it is no text, or holds half a character."""
    if not isinstance(value, str):
        raise RecordError(f"{place} must be text, got {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise HalfCharacterError(f"{place} holds half a character: {error}.") from None
    return value


def expect_list(value: Any, where: str, source: str) -> Sequence[Any]:
    """The value; raises RecordError where it is no list, or an empty one."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence) or not value:
        raise RecordError(f"{source}: {where} must be a non-empty list, got "
                          f"{shown(value)}.")
    return value
