"""The collator: whole batches, what is left out of them and counted, and what must not change."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters.samples import KINDS, Row, adapter, answers, built, paired, record, row, with_eos
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from zoo import build
from zoo.images import image, noise

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.batch.collator import TOO_LONG, DistillationCollator
from taid_vlm.batch.figures import token_figures
from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.batch.losses import token_losses
from taid_vlm.errors import TaidError
from taid_vlm.objectives import parse_objective
from taid_vlm.records import ImageRef, parse_record

BOS = ("llama", "gemma2", "gemma3", "idefics3")  # added to texts, written by templates
FAMILIES = ("internvl", "smolvlm")  # teacher and student: other tiles, other template, a glue
GOOD = [row(kind) for kind in KINDS]
DOCUMENT: Row = {"text": "The picture shows a red square on the left. " * 4}
PLACES = pytest.mark.parametrize("place", [0, 2, len(GOOD)], ids=["first", "middle", "last"])
BOTH = pytest.mark.parametrize("side", ["left", "right"])


def collator(**options: Any) -> DistillationCollator:
    teacher, student, pairing = paired(*FAMILIES)
    return DistillationCollator(student, teacher, pairing, **options)


def picture_row(**changes: Any) -> Row:
    return {"prompt": "What?", "completion": "A cat.", "images": [image()], **changes}


def broken_file() -> bytes:
    out = io.BytesIO()
    noise(64, 64).save(out, "PNG")
    return out.getvalue()[:2000]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b}, key=str)
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if a == b else [path]


# ----- a batch ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("supervise", ["answers", "all"])
def test_labels_are_the_next_tokens_of_both_models(side: Any, supervise: Any) -> None:
    batch = collator(padding_side=side, supervise=supervise)([*GOOD, DOCUMENT])
    for role, labels in (("student", "labels"), ("teacher", "teacher_labels")):
        ids, mask = batch[f"{role}_inputs"]["input_ids"], batch[f"{role}_mask"]
        assert mask.shape == ids.shape
        assert torch.equal(ids.roll(-1, 1)[mask], batch[labels])
        assert not mask[:, -1].any()
    assert torch.equal(batch["student_mask"].nonzero()[:, 0], batch["row"])
    lengths = {len(batch[k]) for k in ("labels", "turn", "row", "categories", "chunk_student")}
    assert lengths == {batch["counts"]["aligned_tokens"]}
    assert len(batch["teacher_labels"]) == len(batch["chunk_teacher"])
    assert len(batch["map_index"]) == len(batch["pair_student"]) == len(batch["pair_teacher"])


@BOTH
def test_labels_spell_the_answers(side: Any) -> None:
    batch = collator(padding_side=side)(GOOD)
    for index, role in enumerate(("teacher", "student")):
        tokenizer = paired(*FAMILIES)[index].tokenizer
        rows = batch[f"{role}_mask"].nonzero()[:, 0]
        for place, kind in enumerate(KINDS):
            own = batch["labels" if role == "student" else "teacher_labels"][rows == place]
            text = tokenizer.decode(own, skip_special_tokens=True)
            assert text.replace(" ", "") == "".join(answers(kind)).replace(" ", "")


def test_map_index_marks_the_glued_tokens() -> None:
    batch = collator()(GOOD)
    _, _, pairing = paired(*FAMILIES)
    marked = batch["map_index"] == 1
    assert 0 < marked.sum() <= sum(len(answers(kind)) for kind in KINDS)
    student, teacher = pairing.maps[1].student.shared, pairing.maps[1].teacher.shared
    ours, theirs = (batch[labels][batch[pairs][marked]] for labels, pairs in (
        ("labels", "pair_student"), ("teacher_labels", "pair_teacher")))
    for s, t in zip(ours, theirs, strict=True):
        found = [(ids == token).nonzero().flatten().tolist()
                 for ids, token in ((student, s), (teacher, t))]
        assert found[0] == found[1]


def test_counts_of_a_good_batch() -> None:
    counts = collator()([*GOOD, DOCUMENT])["counts"]
    assert counts["rows"] == len(GOOD) + 1
    assert counts["dropped"] == {}
    assert counts["supervised_tokens"] == counts["aligned_tokens"]
    assert 0 < counts["chunk_tokens"] < 12  # first words that no token holds with their space


def test_all_texts_cover_the_questions() -> None:
    tokenizer = paired(*FAMILIES)[1].tokenizer
    some, every = collator()(GOOD), collator(supervise="all")(GOOD)
    assert every["counts"]["aligned_tokens"] > some["counts"]["aligned_tokens"]
    assert "colour of the cats" in tokenizer.decode(every["labels"])
    assert "colour of the cats" not in tokenizer.decode(some["labels"])
    assert "They are green" in tokenizer.decode(every["labels"])
    assert not (some["student_mask"] & ~every["student_mask"]).any()


def test_categories_follow_the_turns() -> None:
    labelled = [row("turns") | {"categories": ["a", "b", "c"]}, row("text") | {"category": "d"},
                row("image")]
    batch = collator()(labelled)
    names = {(r, t): c for r, t, c in zip(batch["row"].tolist(), batch["turn"].tolist(),
                                          batch["categories"], strict=True)}
    assert names == {(0, 0): "a", (0, 1): "b", (0, 2): "c", (1, 0): "d", (2, 0): ""}


def test_records_and_rows_give_the_same() -> None:
    found, expected = collator()([record(kind) for kind in KINDS]), collator()(GOOD)
    assert set(differences(found, expected)) <= {"/sources"}  # a row has no name


def test_student_alone() -> None:
    batch = DistillationCollator(collator().student)(GOOD)
    assert "teacher_inputs" not in batch
    assert "teacher_labels" not in batch
    ids, mask = batch["student_inputs"]["input_ids"], batch["student_mask"]
    assert torch.equal(ids.roll(-1, 1)[mask], batch["labels"])
    counts = batch["counts"]
    assert counts["aligned_tokens"] == counts["supervised_tokens"] == len(batch["labels"])


def test_student_alone_with_a_token_over_two_texts() -> None:
    parts = [{"type": "text", "text": text} for text in ("What is in this pict", "ure?")]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes"}]
    batch = DistillationCollator(adapter("qwen3_vl"), supervise="all")([{"messages": messages}])
    ids, mask = batch["student_inputs"]["input_ids"], batch["student_mask"]
    assert torch.equal(ids.roll(-1, 1)[mask], batch["labels"])


# ----- bad rows --------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], Row], str]] = {
    "broken image": (lambda: picture_row(images=[broken_file()]), "unreadable image"),
    "missing image": (lambda: picture_row(images=["/nowhere.png"]), "unreadable image"),
    "empty answer": (lambda: picture_row(completion="  "), "empty answer"),
    "no answer": (lambda: {"messages": [{"role": "user", "content": "a"}]}, "no answer"),
    "no columns": (lambda: {"statement": "a", "reply": "b"}, "malformed record"),
    "bad role": (lambda: {"messages": [{"role": "robot", "content": "a"}]}, "malformed record"),
    "too few images": (lambda: picture_row(prompt="<image><image>?"), "malformed record"),
    "marks": (lambda: picture_row(completion="\ue000"), "marking characters in the text"),
    "other normal form": (lambda: picture_row(completion="cafe\u0301"), "cannot be aligned"),
    "empty text": (lambda: {"text": " "}, "empty text"),
}


@PLACES
@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_counted_and_nothing_else_changes(name: str, place: int) -> None:
    make, reason = BAD[name]
    found = collator()([*GOOD[:place], make(), *GOOD[place:]])
    assert found["counts"].pop("dropped") == {reason: 1}
    expected = collator()(GOOD)
    expected["counts"].pop("dropped")
    assert differences(found, expected) == []


def test_every_picture_is_decoded_once_for_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 64 million pixels takes a second and hundreds of megabytes."""
    decoded: list[str] = []
    load = ImageRef.load
    monkeypatch.setattr(ImageRef, "load", lambda ref: decoded.append(ref.source) or load(ref))
    records = [parse_record(picture_row(), f"row {n}") for n in range(3)]
    batch = collator()(records)
    assert batch["counts"]["rows"] == 3
    assert decoded == ["row 0", "row 1", "row 2"]


def test_usable_records_of_a_data_set() -> None:
    rows = [*(make() for make, _ in BAD.values()), *GOOD]
    whole = collator()
    found = list(whole.usable(rows, lambda record: record.messages))
    assert [record.source for record in found] == [
        f"row {len(BAD) + index}" for index in range(len(GOOD))]
    assert set(whole.reported) == {reason for _, reason in BAD.values()} - {
        "empty text", "malformed record"}  # not wanted; no record
    assert list(whole.usable(rows, lambda record: False)) == []
    assert list(whole.usable((), lambda record: True)) == []


def test_reasons_are_counted_one_by_one() -> None:
    bad = [make() for make, _ in BAD.values()]
    found = collator()([*GOOD, *bad, *bad])["counts"]
    assert found["rows"] == len(GOOD)
    assert found["dropped"] == {
        "unreadable image": 4, "empty answer": 2, "no answer": 2, "malformed record": 6,
        "marking characters in the text": 2, "cannot be aligned": 2, "empty text": 2}


def test_special_token_in_an_answer_is_counted_as_such() -> None:
    bad = picture_row(completion="one<end_of_utterance>two")
    found = collator()([*GOOD, bad])["counts"]
    assert found["dropped"] == {"special token inside an answer": 1}


# ----- nothing left ----------------------------------------------------------------------------


@pytest.mark.parametrize("families", [FAMILIES, ("qwen3_vl", "llava")])
@pytest.mark.parametrize("name", ["taid", "jsd", "ce"])
def test_batch_of_bad_rows_has_no_loss_but_a_gradient(
    families: tuple[str, str], name: str
) -> None:
    teacher, student, pairing = paired(*families)
    batch = DistillationCollator(student, teacher, pairing)([make() for make, _ in BAD.values()])
    assert batch["counts"]["rows"] == batch["counts"]["aligned_tokens"] == 0
    assert sum(batch["counts"]["dropped"].values()) == len(BAD)
    assert len(batch["labels"]) == 0
    assert not batch["student_mask"].any()
    model = built(families[1], "permuted").model
    model.zero_grad()
    s, t = student_forward(model, batch), teacher_forward(built(families[0]).model, batch)
    losses = token_losses(parse_objective(name), batch, s, t, pairing, t=0.5)[name]
    assert losses.shape == (0,)
    losses.sum().backward()
    assert losses.sum() == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all((g == 0).all() for g in gradients)
    assert all(len(figure.values) == 0 for figure in token_figures(batch, s, t, pairing).values())
    model.zero_grad(set_to_none=True)


def test_a_picture_beside_texts_changes_nothing_that_is_learned() -> None:
    """It is there for a tower that all processes have to use; a batch with pictures is as ever."""
    beside = parse_record(picture_row(), "beside")
    for rows, alone in (([DOCUMENT], False), ([picture_row()], True), ([], False)):
        plain, other = collator()(rows), collator(beside=beside)(rows)
        for role in ("student", "teacher"):
            assert "pixel_values" in other[f"{role}_inputs"]
        same = ("labels", "teacher_labels", "map_index", "row", "turn", "categories", "counts",
                "notes", "intake")
        assert not differences({key: plain[key] for key in same}, {key: other[key] for key in same})
        assert not alone or not differences(plain, other)


def test_empty_list_is_a_placeholder_too() -> None:
    assert collator()([])["counts"] == {
        "dropped": {}, "cut": 0, "supervised_tokens": 0, "aligned_tokens": 0,
        "chunk_tokens": 0, "rows": 0}


# ----- too long ----------------------------------------------------------------------------------


def limited(student: int | None = None, teacher: int | None = None) -> DistillationCollator:
    whole = collator()
    models = [make_adapter(whole.student.processor, "student", student),
              make_adapter(whole.teacher.processor, "teacher", teacher)]
    return DistillationCollator(*models, whole.pairing)


def lengths(role: str) -> list[int]:
    return [int(n) for n in collator()(GOOD)[f"{role}_inputs"]["attention_mask"].sum(-1)]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_long_conversations_are_dropped_whole(role: str) -> None:
    limit = sorted(lengths(role))[2]
    kept = [item for item, n in zip(GOOD, lengths(role), strict=True) if n <= limit]
    assert 0 < len(kept) < len(GOOD)
    found = limited(**{role: limit})(GOOD)
    assert found["counts"].pop("dropped") == {TOO_LONG: len(GOOD) - len(kept)}
    expected = collator()(kept)
    expected["counts"].pop("dropped")
    assert differences(found, expected) == []


def test_row_of_exactly_the_limit_stays() -> None:
    found = limited(max(lengths("student")), max(lengths("teacher")))(GOOD)
    assert found["counts"]["dropped"] == {}
    assert found["counts"]["rows"] == len(GOOD)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("limit", [5, 12, 13])
@pytest.mark.parametrize("text", [DOCUMENT["text"], "图片里有一只 🐈🐈🐈 naïve 猫" * 3])
def test_long_texts_are_cut_and_counted(role: str, limit: int, text: str) -> None:
    batch = limited(**{role: limit})([{"text": text}, row("text")][:1])
    assert (batch["counts"]["dropped"], batch["counts"]["cut"]) == ({}, 1)
    assert batch["counts"]["rows"] == 1
    ids = batch[f"{role}_inputs"]["input_ids"][0]
    assert limit - 3 <= len(ids) <= limit  # a character is never cut
    model: ModelAdapter = getattr(collator(), role)
    assert text.startswith(model.tokenizer.decode(ids))
    assert model.tokenizer.eos_token_id not in ids  # it does not end here
    labels = batch["labels" if role == "student" else "teacher_labels"]
    assert torch.equal(labels, ids[1:])


def test_cut_texts_keep_their_beginning() -> None:
    tokenizer = built("idefics3", "permuted").tokenizer
    alone = DistillationCollator(make_adapter(built("idefics3", "permuted").processor,
                                              "student", 6))
    ids = alone([DOCUMENT])["student_inputs"]["input_ids"][0]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 6
    assert "The picture" in tokenizer.decode(ids)


@pytest.mark.parametrize("family", ["qwen2", "internvl", *BOS])
def test_texts_beside_conversations_are_cut_as_alone(family: str) -> None:
    found = DistillationCollator(make_adapter(built(family).processor, "student", 36))
    short = {"prompt": "Is it?", "completion": "Yes"}
    both, alone = found([short, DOCUMENT]), found([DOCUMENT])
    assert (both["counts"]["dropped"], both["counts"]["cut"], both["counts"]["rows"]) == ({}, 1, 2)
    assert torch.equal(both["labels"][both["row"] == 1], alone["labels"])


def test_cutting_ends_where_the_tokenizer_adds_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_adapter(with_eos(), "student", 8)
    calls, encode = [], model.encode

    def counted(*args: Any) -> Any:
        calls.append(args)
        assert len(calls) < 10, "it would go on forever"
        return encode(*args)

    monkeypatch.setattr(model, "encode", counted)
    batch = DistillationCollator(model)([DOCUMENT])
    ids = batch["student_inputs"]["input_ids"][0].tolist()
    assert len(ids) <= 8
    assert model.tokenizer.eos_token_id not in ids
    assert batch["counts"]["cut"] == 1


def test_short_texts_are_not_counted_as_cut() -> None:
    counts = limited(student=200)([DOCUMENT, row("text"), {"text": "A cat. " * 300}])["counts"]
    assert (counts["dropped"], counts["cut"], counts["rows"]) == ({}, 1, 3)


def test_image_tokens_are_never_cut() -> None:
    caption = {"text": "A cat. " * 30, "images": [image("wide")]}
    limit = 40
    assert lengths("student")[0] > limit
    batch = limited(student=limit)([caption, row("text"), DOCUMENT])
    assert (batch["counts"]["dropped"], batch["counts"]["cut"]) == ({TOO_LONG: 1}, 1)
    assert "pixel_values" not in batch["student_inputs"]
    assert batch["student_inputs"]["input_ids"].shape[1] <= limit


def test_everything_too_long_is_a_placeholder() -> None:
    counts = limited(student=3)(GOOD)["counts"]
    assert counts["dropped"] == {TOO_LONG: len(GOOD)}
    assert counts["rows"] == 0


# ----- processors that fail ---------------------------------------------------------------------


class Moody:
    """An image processor that refuses some images."""

    def __init__(self, inner: Any, refuses: Callable[[Image.Image], bool]) -> None:
        self.inner, self.refuses = inner, refuses

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, images: Any, **options: Any) -> Any:
        flat = [i for item in images for i in (item if isinstance(item, list) else [item])]
        if any(self.refuses(i) for i in flat):
            raise RuntimeError("absurd aspect ratio")
        return self.inner(images, **options)


def moody(refuses: Callable[[Image.Image], bool]) -> DistillationCollator:
    whole = collator()
    processor = build("smolvlm", tokenizer="permuted").processor
    processor.image_processor = Moody(processor.image_processor, refuses)
    return DistillationCollator(make_adapter(processor, "student"), whole.teacher, whole.pairing)


@PLACES
def test_image_that_the_processor_refuses_drops_its_row(place: int) -> None:
    bad = picture_row(images=[image("tall")])
    found = moody(lambda i: i.size == (40, 80))([*GOOD[:place], bad, *GOOD[place:]])
    assert found["counts"].pop("dropped") == {"refused by the processor": 1}
    expected = collator()(GOOD)
    expected["counts"].pop("dropped")
    assert differences(found, expected) == []


def broken(message: str) -> DistillationCollator:
    """A student whose processor fails on everything."""
    whole = collator()
    student = make_adapter(build("smolvlm", tokenizer="permuted").processor, "student")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(message)

    student._process = fail  # type: ignore[method-assign]
    return DistillationCollator(student, whole.teacher, whole.pairing)


def test_processor_that_always_fails_is_an_error() -> None:
    with pytest.raises(TaidError, match="student: the processor failed: out of paper") as caught:
        broken("out of paper")(GOOD)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_batch_that_fails_only_together_is_an_error() -> None:
    whole = collator()
    student = make_adapter(build("smolvlm", tokenizer="permuted").processor, "student")
    process = student._process

    def alone_only(texts: list[str], *args: Any) -> Any:
        if len(texts) > 1:
            raise RuntimeError("cannot stack")
        return process(texts, *args)

    student._process = alone_only  # type: ignore[method-assign]
    with pytest.raises(TaidError, match="cannot stack"):
        DistillationCollator(student, whole.teacher, whole.pairing)(GOOD)


@pytest.mark.parametrize(("family", "kind", "reason", "message"), [
    ("llama", "image", "image for a text model", "cannot see it; choose a student with vision"),
    ("gpt2", "talk", "conversation for a model of one question", r"set student\.chat_template"),
    ("paligemma", "talk", "conversation for a model of one question", "PaliGemma"),
])
def test_what_a_model_cannot_take_is_counted_under_its_reason(
    family: str, kind: str, reason: str, message: str
) -> None:
    """Deep in the data it must not end a run; `_refuse_empty` sees data of nothing else."""
    alone = DistillationCollator(adapter(family))
    counts = alone([row("text"), row(kind)])["counts"]
    assert (counts["dropped"], counts["rows"]) == ({reason: 1}, 1)
    assert re.search(message, alone.reported[reason])


# ----- workers ----------------------------------------------------------------------------------


def test_pickled_collator_gives_the_same() -> None:
    again = pickle.loads(pickle.dumps(collator()))
    assert differences(again(GOOD), collator()(GOOD)) == []


def test_workers_give_the_same() -> None:
    rows = [parse_record(item, "x") for item in GOOD]
    loader = DataLoader(rows, batch_size=3, collate_fn=collator(), num_workers=2)
    for found, start in zip(loader, (0, 3), strict=True):
        assert differences(found, collator()(rows[start : start + 3])) == []
