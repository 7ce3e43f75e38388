"""A real pretrained teacher against the zoo's tokenizers, where TAID_VLM_EXTRA_DATA names it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.samples import adapter, built, encode, head_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo.tokenizers import VARIANTS

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.alignment import Pairing, pair_models
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.figures import token_figures
from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.objectives import label_log_prob
from taid_vlm.records import parse_record

FOLDER = Path(os.environ.get("TAID_VLM_EXTRA_DATA", "/nonexistent")) / "stories260K"
EVERY = pytest.mark.parametrize("variant", VARIANTS)
DATA = [
    {"prompt": "Once upon a time", "completion": " there was a little girl named Lily."},
    {"prompt": "She said:\n", "completion": "\"Yes, I can see 10, 21 and 3.14 of them!\""},
    {"text": "The sun was bright.\nTim and his dog went to the park, and they saw a big tree."},
    {"text": "Déjà vu: 图片 🐈, naïve café."},
]

pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="TAID_VLM_EXTRA_DATA lacks stories260K")


@pytest.fixture(scope="module")
def teacher() -> tuple[ModelAdapter, Any]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float64)
    return make_adapter(AutoTokenizer.from_pretrained(FOLDER), "teacher"), model.eval()


def paired(model: ModelAdapter, rows: int, variant: str) -> tuple[ModelAdapter, Pairing]:
    student = adapter("gpt2", "student", variant)
    return student, pair_models(model, student, rows, head_rows("gpt2", variant))


@EVERY
def test_all_tokens_take_part(teacher: tuple[ModelAdapter, Any], variant: str) -> None:
    student, pairing = paired(teacher[0], teacher[1].config.vocab_size, variant)
    assert pairing.case == "c"
    counts = DistillationCollator(student, teacher[0], pairing)(DATA)["counts"]
    assert counts["dropped"] == {}
    assert counts["chunk_tokens"] > 0
    # a document without BOS: nothing on the student's side predicts its first piece
    for item in DATA[:2]:
        alone = DistillationCollator(student, teacher[0], pairing)([item])["counts"]
        assert alone["aligned_tokens"] == alone["supervised_tokens"] > 5


@EVERY
def test_its_log_likelihood_is_all_there(
    teacher: tuple[ModelAdapter, Any], variant: str
) -> None:
    """Token by token under the real model, summed up at the student's tokens."""
    reader, model = teacher
    student, pairing = paired(reader, model.config.vocab_size, variant)
    batch = DistillationCollator(student, reader, pairing)(DATA[:2])
    u = teacher_forward(model, batch)
    with torch.no_grad():
        s = student_forward(built("gpt2", variant).model, batch)
    figures = token_figures(batch, s, u, pairing)
    total = 0.0
    for item in DATA[:2]:
        before = reader.tokenizer(item["prompt"])["input_ids"]
        (row,) = encode(reader, [parse_record(item, "x")]).rows
        with torch.no_grad():
            log_p = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        first = row.answers[0].tokens[0].position
        assert first <= len(before) + 1
        total -= sum(float(log_p[p - 1, row.ids[p]]) for p in range(first, len(row.ids)))
    assert float(figures["teacher_nll"].values.sum()) == pytest.approx(total, rel=1e-9)
    assert float(-label_log_prob(u, batch["teacher_labels"]).sum()) == pytest.approx(
        total, rel=1e-9)
    assert 0 < float(figures["teacher_nll"].values.mean()) < 6  # it knows such stories


@EVERY
def test_cells_of_real_pieces(teacher: tuple[ModelAdapter, Any], variant: str) -> None:
    """Every cell is of one first byte, and what the teacher says in words is in some cell."""
    reader, model = teacher
    student, pairing = paired(reader, model.config.vocab_size, variant)
    found = pairing.maps[0]
    width = len(found.student.shared) + found.cells
    first: list[set[int]] = [set() for _ in range(width)]
    for side, table in ((found.teacher, reader.table), (found.student, student.table)):
        entries = [*enumerate(side.shared.tolist()), *zip(
            (side.cell + len(side.shared)).tolist(), side.members.tolist(), strict=True)]
        for entry, token in entries:
            text = table.text[token]
            first[entry].add(-1 if text is None else text[0])
    assert {len(bytes_) for bytes_ in first} == {1}
    strings = reader.table.strings
    assert all(strings[i].startswith("<") for i in found.teacher.rest.tolist())
