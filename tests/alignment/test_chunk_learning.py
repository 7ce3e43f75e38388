"""What a student learns from a teacher of another tokenizer, where the truth is known.

Letters are drawn from a process; the teacher is a table of its own tokens' true frequencies, the
student a table (next token after the last one) that is fitted with the losses of case c alone.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from alignment.test_cells import letters
from torch import Tensor

from taid_vlm.adapters import ModelAdapter
from taid_vlm.alignment import Pairing, build_vocabulary_map
from taid_vlm.alignment.cells import build_cell_map
from taid_vlm.batch.collator import Batch, DistillationCollator
from taid_vlm.batch.losses import token_losses
from taid_vlm.objectives import parse_objective

LETTERS = 1000
NEXT = {"independent": dict.fromkeys("abc", (0.5, 0.3, 0.2)),
        "dependent": {"a": (0.2, 0.6, 0.2), "b": (0.5, 0.1, 0.4), "c": (0.6, 0.3, 0.1)}}
MERGES = [([], [("a", "b")]), ([("a", "b")], []), ([("a", "b")], [("b", "c")])]


class Task(NamedTuple):
    """teacher: its logits at the batch's tokens; truth: log P(student's token | the one before);
    before: the token that stands before each of the student's."""

    batch: Batch
    pairing: Pairing
    teacher: Tensor
    truth: Tensor
    before: Tensor


def text_of(process: str) -> str:
    rng, text = random.Random(1), "a"
    while len(text) < LETTERS:
        text += rng.choices("abc", NEXT[process][text[-1]])[0]
    return text


def frequencies(ids: Tensor, tokens: int) -> Tensor:
    """log P(token | the one before) [tokens, tokens] as they are in this text."""
    count = torch.full((tokens, tokens), 1e-9, dtype=torch.float64)
    count.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1).double(), accumulate=True)
    return (count / count.sum(-1, keepdim=True)).log()


def made(process: str, theirs: list[tuple[str, str]], ours: list[tuple[str, str]]) -> Task:
    teacher, student = (model(role, merges) for role, merges in
                        (("teacher", theirs), ("student", ours)))
    rows = len(teacher.table), len(student.table)
    pairing = Pairing("c", "", (build_cell_map(teacher, student, *rows),))
    batch = DistillationCollator(student, teacher, pairing)([{"text": text_of(process)}])
    t, s = (batch[f"{role}_inputs"]["input_ids"][0] for role in ("teacher", "student"))
    u = frequencies(t, rows[0])[t[batch["teacher_mask"][0]]]
    return Task(batch, pairing, u, frequencies(s, rows[1]), s[batch["student_mask"][0]])


def model(role: str, merges: list[tuple[str, str]]) -> ModelAdapter:
    made_ = letters(merges)
    made_.role = role
    return made_


def without_chunks(task: Task) -> Task:
    none = {f"chunk_{role}": torch.full_like(task.batch[f"chunk_{role}"], -1)
            for role in ("teacher", "student")}
    return task._replace(batch=task.batch | none | {"chunk_last": task.batch["chunk_last"][:0]})


def without_cells(task: Task, theirs: ModelAdapter, ours: ModelAdapter) -> Task:
    """Shared tokens and a rest at the same positions."""
    found = build_vocabulary_map(theirs.table, ours.table, len(theirs.table), len(ours.table))
    return task._replace(pairing=replace(task.pairing, maps=(found,)))


def distance(task: Task, logits: Tensor) -> float:
    """KL from the truth, in nats per token of the student."""
    gaps = (task.truth.exp() * (task.truth - logits.log_softmax(-1))).sum(-1)
    return float(gaps[task.before].mean())


def learned(task: Task) -> float:
    """The distance of a table fitted with KL(teacher || student), its best one."""
    objective = parse_objective("forward_kl")
    table = torch.zeros_like(task.truth, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = token_losses(objective, task.batch, table[task.before], task.teacher, task.pairing)
        loss = losses["forward_kl"].mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return distance(task, table.detach())


@pytest.mark.parametrize(("theirs", "ours"), MERGES)
@pytest.mark.parametrize("process", NEXT)
def test_a_student_learns_most_of_the_truth(
    process: str, theirs: list[tuple[str, str]], ours: list[tuple[str, str]]
) -> None:
    """Not all: what the end of one tokenizer's token says about the next letter is its own."""
    task = made(process, theirs, ours)
    start = distance(task, torch.zeros_like(task.truth))
    assert start > 0.4
    assert learned(task) < 0.5 * start


@pytest.mark.parametrize(("theirs", "ours"), MERGES[1:])
def test_within_cells_only_chunks_teach(
    theirs: list[tuple[str, str]], ours: list[tuple[str, str]]
) -> None:
    task = made("dependent", theirs, ours)
    assert learned(without_chunks(task)) > 3 * learned(task)


@pytest.mark.parametrize("process", NEXT)
def test_without_cells_long_tokens_are_unlearned(process: str) -> None:
    """The teacher has letters only; against shared tokens and a rest, "ab" must never be said."""
    theirs, ours = MERGES[0]
    task = made(process, theirs, ours)
    teacher, student = letters(theirs), letters(ours)
    assert learned(without_cells(task, teacher, student)) > 1.5 * learned(task)
    assert learned(without_chunks(without_cells(task, teacher, student))) > 5 * learned(task)
