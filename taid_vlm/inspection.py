"""`taid-vlm inspect`: one record as each model sees it, and what is compared, before training."""

from __future__ import annotations

from taid_vlm.adapters import EncodedRow, ModelAdapter, make_adapter
from taid_vlm.alignment import AlignedToken, Pairing, align_alone, pair_models, supervised_positions
from taid_vlm.collator import DistillationCollator
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.recipe import Recipe
from taid_vlm.records import Record
from taid_vlm.run import Ingredients, gather

SHOWN_TOKENS = 24
_PLAIN, _GREEN, _GREY = "\033[0m", "\033[32m", "\033[90m"


def inspect_recipe(recipe: Recipe, index: int = 0, colour: bool = False) -> str:
    """Text that shows how the recipe's `index`-th training record is aligned.

    Loads processors and configurations, no weights. Answer tokens that are compared stand in
    ⟦ ⟧ (and green where `colour`); the tokens of an image are folded into one mark.

    Raises:
        TaidError: whatever `distill` would refuse, and records that would be left out.
    """
    ingredients = gather(recipe)
    record = _record(ingredients, index)
    student = make_adapter(ingredients.student_processor, "student")
    if recipe.teacher is None or ingredients.teacher_processor is None:
        rows, aligned = _encode(DistillationCollator(student), record)
        return "\n".join(_side(student, rows["student"], [a.student for a in aligned], colour))
    teacher = make_adapter(ingredients.teacher_processor, "teacher")
    samples = record.answers or [record.text or ""]
    head_rows = {role: config.get_text_config().vocab_size
                 for role, config in ingredients.configs.items()}
    pairing = pair_models(teacher, student, head_rows["teacher"], head_rows["student"], samples)
    rows, aligned = _encode(DistillationCollator(student, teacher, pairing), record)
    lines = [f"record    {record.source}", *_verdict(pairing, rows, aligned), ""]
    for adapter in (teacher, student):
        positions = [getattr(token, adapter.role) for token in aligned]
        lines += [*_side(adapter, rows[adapter.role], positions, colour), ""]
    return "\n".join(lines + _table(teacher, student, rows, aligned))


def _record(ingredients: Ingredients, index: int) -> Record:
    try:
        if hasattr(ingredients.train, "__len__"):
            return ingredients.train[index]
        return next(r for i, r in enumerate(ingredients.train) if i == index)
    except (IndexError, StopIteration):
        raise TaidError(f"--record {index}: the training data has no such record.") from None


def _encode(
    collator: DistillationCollator, record: Record
) -> tuple[dict[str, EncodedRow], list[AlignedToken]]:
    """One record through every adapter; a record that would be left out says why."""
    try:
        return _encode_usable(collator, record)
    except SampleDropped as problem:
        raise TaidError(f"{record.source} would be left out: {problem}") from None


def _encode_usable(
    collator: DistillationCollator, record: Record
) -> tuple[dict[str, EncodedRow], list[AlignedToken]]:
    images = [[image.load() for image in record.images]]
    rows = {a.role: a.encode([a.render(record)], images).rows[0] for a in collator.adapters}
    if collator.pairing is None:
        return rows, align_alone(rows["student"])
    return rows, collator.pairing.align(rows["teacher"], rows["student"])


def _verdict(
    pairing: Pairing, rows: dict[str, EncodedRow], aligned: list[AlignedToken]
) -> list[str]:
    total = len(supervised_positions(rows["student"]))
    lines = [f"case      {pairing.case}: {pairing.reason}",
             f"aligned   {len(aligned)} of {total} answer tokens of the student"]
    return lines + [f"warning   {warning}" for warning in pairing.warnings]


def _side(
    adapter: ModelAdapter, row: EncodedRow, positions: list[int], colour: bool
) -> list[str]:
    """The rendered text of one model, compared tokens marked, images folded."""
    marked, pieces, data = set(positions), [], row.text.encode()
    folded: set[tuple[int, int]] = set()
    for index, (start, end) in enumerate(row.byte_spans):
        image = next((span for span in row.images if span[0] <= start < span[1]), None)
        if image is not None:
            if image not in folded:
                folded.add(image)
                count = sum(image[0] <= a < image[1] for a, _ in row.byte_spans)
                pieces.append(_paint(f"[image: {count} tokens]", _GREY, colour))
            continue
        text = data[start:end].decode(errors="replace")
        pieces.append(_paint(f"⟦{text}⟧", _GREEN, colour) if index + row.offset in marked else text)
    return [f"--- {adapter.role}: {len(row.ids)} tokens", "".join(pieces)]


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_PLAIN}" if colour else text


def _table(
    teacher: ModelAdapter, student: ModelAdapter, rows: dict[str, EncodedRow],
    aligned: list[AlignedToken],
) -> list[str]:
    def cell(adapter: ModelAdapter, position: int) -> str:
        row = rows[adapter.role]
        token = row.ids[position - row.offset]
        return f"{position:>5} {token:>7} {adapter.table.strings[token]!r:<18.18}"

    lines = [f"    {'teacher: position, id, token':<34}{'student: position, id, token'}"]
    for token in aligned[:SHOWN_TOKENS]:
        lines.append(f"    {cell(teacher, token.teacher)} {cell(student, token.student)}")
    if len(aligned) > SHOWN_TOKENS:
        lines.append(f"    ... and {len(aligned) - SHOWN_TOKENS} more")
    return lines
