"""The facts of both sides as rows of words, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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
    for section, labels in SECTIONS.items():
        for label, (describe, compared) in labels.items():
            values = tuple(describe(side) for side in facts.values())
            if any(value != MISSING for value in values):
                rows.append(FactRow(section, label, values, compared and len(set(values)) > 1))
    return rows + list(_image_rows(facts))


def _image_rows(facts: Mapping[str, Facts]) -> Iterator[FactRow]:
    sizes = next((side.images.tokens for side in facts.values() if side.images), {})
    for size in sizes:
        values = tuple(MISSING if side.images is None else _count(side.images.tokens[size])
                       for side in facts.values())
        known = {value for value in values if value != MISSING}
        yield FactRow("Images", f"tokens of {size}", values, len(known) > 1)


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


# ----- the words ----------------------------------------------------------------------------

Describe = Callable[[Facts], str]


def _of(part: str, describe: Callable[..., str]) -> Describe:
    """A description of one part of the facts; of a part that is not known, a dash."""
    def described(side: Facts) -> str:
        found = getattr(side, part)
        return MISSING if found is None else describe(found)
    return described


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


def _short(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _options(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} = {value:g}" for key, value in values.items()) or "none"


def _end(side: Facts) -> str:
    if side.end_of_turn is None:
        return MISSING if side.one_end is None and side.tokenizer is None else "no special token"
    return side.end_of_turn + (", also ends a document" if side.one_end else ", ends a turn only")


def _padding(side: Facts) -> str:
    """Rows of the head that no token names."""
    if side.head is None or side.tokenizer is None:
        return MISSING
    spare = side.head.rows - side.tokenizer.tokens
    return f"{spare:,}" if spare >= 0 else f"{-spare:,} too few"


def _limit(side: Facts) -> str:
    return MISSING if side.tokenizer is None else (
        "none" if side.max_length is None else f"{side.max_length:,}")


Labels = dict[str, tuple[Describe, bool]]  # and whether a difference means something
SECTIONS: dict[str, Labels] = {
    "Model": {
        "name": (lambda side: side.name, False),
        "type": (_of("model", lambda model: model.model_type), False),
        "class": (_of("model", lambda model: model.architecture or UNKNOWN), False),
        "parameters": (_of("model", lambda model: _parameters(model.parameters)), False),
    },
    "Head": {
        "rows": (_of("head", lambda head: f"{head.rows:,}"), True),
        "padding rows": (_padding, True),
        "tied to the embeddings": (_of("head", lambda head: "yes" if head.tied else "no"), False),
        "bias": (_of("head", lambda head: "yes" if head.bias else "no"), True),
        "softcap": (_of("head", lambda head: _options(head.softcap)), True),
        "scale": (_of("head", lambda head: _options(head.scale)), True),
    },
    "Tokenizer": {
        "class": (_of("tokenizer", lambda it: it.name), False),
        "kind": (_of("tokenizer", lambda it: it.kind), True),
        "tokens": (_of("tokenizer", lambda it: f"{it.tokens:,} ({it.special:,} special)"), True),
        "changes the text": (_of("tokenizer", lambda it: it.normalizer), True),
        "adds by itself": (_of("tokenizer", lambda it: it.adds), True),
        "begin of text": (_of("tokenizer", lambda it: it.bos or "none"), True),
        "end of text": (_of("tokenizer", lambda it: it.eos or "none"), True),
        "end of turn": (_end, True),
        "padding": (_of("tokenizer", lambda it: it.pad or "none"), False),
    },
    "Chat template": {
        "from": (_of("template", lambda it: it.source), False),
        "content as": (_of("template", lambda it: it.content or MISSING), False),
        "default system prompt": (_of("template", lambda it: _quoted(it.system)), True),
        "before a question": (_of("template", lambda it: _quoted(it.before_question)), True),
        "before an answer": (_of("template", lambda it: _quoted(it.before_answer)), True),
        "glued to an answer": (_of("template", lambda it: _quoted(it.glued)), True),
        "after an answer": (_of("template", lambda it: _quoted(it.after_answer)), True),
        "thought before an answer": (_of("template", lambda it: it.thought or MISSING), True),
        "thought when asked": (_of("template", lambda it: it.asked_thought or MISSING), True),
    },
    "Limits": {
        "tokens per record": (_limit, True),
        "positions": (_of("model", lambda it: _count(it.positions)), False),
        "padding side": (_of("tokenizer", lambda it: it.padding_side), False),
    },
    "Images": {
        "processor": (_of("images", lambda it: it.processor), False),
        "image processor": (_of("images", lambda it: it.image_processor), False),
        "image token": (_of("images", lambda it: it.token or UNKNOWN), False),
    },
}
