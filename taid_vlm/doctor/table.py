"""The facts of both sides as rows of words, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from taid_vlm.doctor.facts import Facts

MISSING = "–"
UNKNOWN = "not known"


@dataclass(frozen=True)
class FactRow:
    """One line: values by role in the order of the facts; differs: where that means something."""

    section: str
    label: str
    values: tuple[str, ...]
    differs: bool = False


def fact_rows(facts: Mapping[str, Facts]) -> list[FactRow]:
    """Everything in `facts`, section by section; lines that no side can fill are left out."""
    rows = []
    for section, label, describe, compared in ROWS:
        values = tuple(describe(side) for side in facts.values())
        if any(value != MISSING for value in values):
            rows.append(FactRow(section, label, values, compared and len(set(values)) > 1))
    return rows + list(_image_rows(facts))


def _image_rows(facts: Mapping[str, Facts]) -> Iterator[FactRow]:
    for size in next((side.images.tokens for side in facts.values() if side.images), {}):
        values = tuple(MISSING if side.images is None else _count(side.images.tokens[size])
                       for side in facts.values())
        yield FactRow("Images", f"tokens of {size}", values, len({*values} - {MISSING}) > 1)


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


# ----- the words ----------------------------------------------------------------------------

Describe = Callable[[Facts], str]


def _of(part: str, attribute: str, show: Callable[[Any], str | None] = lambda value: value,
        empty: str = MISSING) -> Describe:
    """One attribute of one part of the facts; of a part that is not known, a dash.

    show: the attribute in words; empty: what stands where there are none.
    """
    def describe(side: Facts) -> str:
        facts = getattr(side, part)
        return MISSING if facts is None else show(getattr(facts, attribute)) or empty
    return describe


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _quoted(text: str | None) -> str:
    """A text with its ends and line breaks visible."""
    if text is None:
        return "none"
    return f"“{text}”".replace("\n", "↵") if text else MISSING


def _parameters(parts: Mapping[str, int]) -> str:
    """Of several parts the sum and each of them."""
    total = _short(sum(parts.values()))
    told = ", ".join(f"{part.replace('_', ' ')} {_short(n)}" for part, n in parts.items())
    return f"{total} ({told})" if len(parts) > 1 else total if parts else UNKNOWN


def _experts(side: Facts) -> str:
    model = side.model
    if model is None or model.experts is None:
        return MISSING if model is None else "none"
    return model.experts + (f", {_short(model.per_token)} parameters" if model.per_token else "")


def _short(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _options(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} = {value:g}" for key, value in values.items()) or "none"


def _tokens(side: Facts) -> str:
    it = side.tokenizer
    return MISSING if it is None else f"{it.tokens:,} ({it.special:,} special)"


def _end(side: Facts) -> str:
    if side.end_of_turn is None:
        return MISSING if side.one_end is None and side.tokenizer is None else "no special token"
    return side.end_of_turn + (", also ends a document" if side.one_end else ", ends a turn only")


def _padding(side: Facts) -> str:
    """Rows of the head that no token names."""
    spare = side.head.rows - side.tokenizer.tokens if side.head and side.tokenizer else None
    return MISSING if spare is None else f"{spare:,}" if spare >= 0 else f"{-spare:,} too few"


def _limit(side: Facts) -> str:
    return MISSING if side.tokenizer is None else (
        "none" if side.max_length is None else f"{side.max_length:,}")


_TOKENS, _CHAT = "Tokenizer", "Chat template"
ROWS: tuple[tuple[str, str, Describe, bool], ...] = (  # and whether a difference means something
    ("Model", "name", lambda side: side.name, False),
    ("Model", "type", _of("model", "model_type"), False),
    ("Model", "class", _of("model", "architecture", empty=UNKNOWN), False),
    ("Model", "parameters", _of("model", "parameters", _parameters), False),
    ("Model", "experts", _experts, False),
    ("Head", "rows", _of("head", "rows", _count), True),
    ("Head", "padding rows", _padding, True),
    ("Head", "tied to the embeddings", _of("head", "tied", _yes), False),
    ("Head", "bias", _of("head", "bias", _yes), True),
    ("Head", "softcap", _of("head", "softcap", _options), True),
    ("Head", "scale", _of("head", "scale", _options), True),
    (_TOKENS, "class", _of("tokenizer", "name"), False),
    (_TOKENS, "kind", _of("tokenizer", "kind"), True),
    (_TOKENS, "tokens", _tokens, True),
    (_TOKENS, "changes the text", _of("tokenizer", "normalizer"), True),
    (_TOKENS, "adds by itself", _of("tokenizer", "adds"), True),
    (_TOKENS, "begin of text", _of("tokenizer", "bos", empty="none"), True),
    (_TOKENS, "end of text", _of("tokenizer", "eos", empty="none"), True),
    (_TOKENS, "end of turn", _end, True),
    (_TOKENS, "padding", _of("tokenizer", "pad", empty="none"), False),
    (_CHAT, "from", _of("template", "source"), False),
    (_CHAT, "content as", _of("template", "content"), False),
    (_CHAT, "default system prompt", _of("template", "system", _quoted), True),
    (_CHAT, "before a question", _of("template", "before_question", _quoted), True),
    (_CHAT, "before an answer", _of("template", "before_answer", _quoted), True),
    (_CHAT, "glued to an answer", _of("template", "glued", _quoted), True),
    (_CHAT, "after an answer", _of("template", "after_answer", _quoted), True),
    (_CHAT, "thought before an answer", _of("template", "thought"), True),
    (_CHAT, "thought when asked", _of("template", "asked_thought"), True),
    ("Limits", "tokens per record", _limit, True),
    ("Limits", "positions", _of("model", "positions", _count), False),
    ("Limits", "padding side", _of("tokenizer", "padding_side"), False),
    ("Images", "processor", _of("images", "processor"), False),
    ("Images", "image processor", _of("images", "image_processor"), False),
    ("Images", "image token", _of("images", "token", empty=UNKNOWN), False),
)
