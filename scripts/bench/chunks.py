"""The objective of models that split text differently: ours in chunks, and over all logits.

With two tokenizers' folders, the pairing and the batch are theirs, of texts of several kinds.
Without, tokens lie as those of such pairs do: two in five are alone, of the others half are pieces
of one token each, and most entries are in groups.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.measure import gradient_errors, memory_limit, peak_extra_bytes, step
from bench.problem import LOGIT_SPREAD, TAID_T, Case, Problem
from taid_vlm.adapters import make_adapter
from taid_vlm.alignment import Pairing, VocabularyMap, pair_models
from taid_vlm.alignment.vocabulary import SideMap
from taid_vlm.batch.collator import Batch, DistillationCollator
from taid_vlm.batch.losses import token_losses
from taid_vlm.fused.divergence import FusedDivergence
from taid_vlm.fused.heads import Head
from taid_vlm.fused.pieces import Pieces
from taid_vlm.objectives import parse_objective

# tokens of student and teacher in a piece, whether the first ones are a pair, whether all are
# compared by likelihood
LAYOUT = ((1, 1, True, False), (1, 1, True, True), (2, 1, True, True), (1, 1, True, False),
          (1, 1, True, True), (1, 2, False, True), (1, 1, True, False), (3, 1, True, True))
CHECKED = 48  # tokens of the student on which gradients are compared with float64
PLACES = ("pair_student", "pair_teacher", "chunk_student", "chunk_teacher", "chunk_last")


@dataclass
class ChunkProblem(Problem):
    """A `Problem` whose models' tokens differ in number."""

    batch: Batch
    pairing: Pairing


# ----- what is compared ---------------------------------------------------------------------------


def synthetic(case: Case, teacher_vocab: int) -> tuple[Batch, Pairing]:
    """Places of tokens, of the student's about `case.tokens`, and a map with groups."""
    batch: dict[str, list[int]] = {name: [] for name in PLACES}
    for s, t, paired, likely in cycle(LAYOUT):
        at = len(batch["chunk_student"]), len(batch["chunk_teacher"])
        if at[0] >= case.tokens:
            break
        for name, place in zip(PLACES[:2], at, strict=True):
            batch[name] += [place] * paired
        chunk = len(batch["chunk_last"]) if likely else -1
        batch["chunk_student"] += [chunk] * s
        batch["chunk_teacher"] += [chunk] * t
        batch["chunk_last"] += [at[0] + s - 1] * likely
    smaller = min(case.vocab, teacher_vocab)
    shared, cells = 13 * smaller // 20, smaller // 4

    def side(rows: int) -> SideMap:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
        members, rest = order[shared:-100], order[-100:]
        cell = (torch.arange(len(members)) % cells).sort().values
        return SideMap(order[:shared], rest, order[:0], members, cell)

    vocabulary = VocabularyMap(side(teacher_vocab), side(case.vocab), False, True, cells)
    places = {name: torch.tensor(x, dtype=torch.long) for name, x in batch.items()}
    return (places | {"map_index": torch.zeros_like(places["pair_student"])},
            Pairing("c", "synthetic", (vocabulary,)))


def real(tokens: int, folders: Sequence[str], texts: Sequence[str]) -> tuple[Batch, Pairing]:
    """Of two tokenizers (the teacher's, the student's) and so many texts, over and over, as give
    about that many tokens of the student."""
    from transformers import PreTrainedTokenizerFast

    teacher, student = (make_adapter(PreTrainedTokenizerFast.from_pretrained(folder), role)
                        for folder, role in zip(folders, ("teacher", "student"), strict=True))
    pairing = pair_models(
        teacher, student, len(teacher.table), len(student.table), texts, "chunks")
    collate, rows = DistillationCollator(student, teacher, pairing), []
    for text in cycle(texts):
        rows.append({"prompt": "Say it.", "completion": text})
        batch = collate(rows)
        if len(batch["labels"]) >= tokens:
            return batch, pairing
    raise AssertionError


def make_problem(case: Case, batch: Batch, pairing: Pairing) -> ChunkProblem:
    """Random heads and hidden states of the batch's shape, with labels drawn from both models."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for role, width in (("student", case.student_hidden), ("teacher", case.teacher_hidden)):
        side: SideMap = getattr(pairing.maps[0], role)
        rows = 1 + max(int(ids.max()) for ids in (
            side.shared, side.rest, side.padding, side.members) if len(ids))
        hidden = torch.randn(len(batch[f"chunk_{role}"]), width, generator=generator)
        head = torch.randn(rows, width, generator=generator) * LOGIT_SPREAD / width**0.5
        labels = torch.cat([(part @ head.T).softmax(-1).multinomial(1, generator=generator)[:, 0]
                            for part in hidden.split(64)])
        sides.append((hidden.to(case.dtype), head.to(case.dtype), labels))
    (hidden, head, labels), (teacher_hidden, teacher_head, teacher_labels) = sides
    every = torch.arange(len(hidden))
    return ChunkProblem(
        hidden.requires_grad_(), head.requires_grad_(not case.frozen_head), teacher_hidden,
        teacher_head, torch.ones_like(every, dtype=torch.bool), every,
        {**batch, "labels": labels, "teacher_labels": teacher_labels}, pairing)


def first(problem: ChunkProblem, tokens: int) -> ChunkProblem:
    """The same up to the last whole piece before that many tokens of the student."""
    pieces = pieces_of(problem.batch)
    begins = pieces.begins[:, pieces.begins[0] <= tokens][:, -1].tolist()
    s, t, pairs, chunks = begins
    sizes = {"pair_student": pairs, "pair_teacher": pairs, "chunk_student": s, "chunk_teacher": t,
             "chunk_last": chunks, "map_index": pairs, "labels": s, "teacher_labels": t}
    return replace(
        problem, student_hidden=problem.student_hidden.detach()[:s].clone().requires_grad_(),
        teacher_hidden=problem.teacher_hidden[:t],
        batch={name: problem.batch[name][:size] for name, size in sizes.items()})


def pieces_of(batch: Batch) -> Pieces:
    return Pieces(*(batch[name] for name in Pieces.__dataclass_fields__))


# ----- the two implementations --------------------------------------------------------------------


def ours(case: Case, pairing: Pairing) -> Callable[[Any], Tensor]:
    """`FusedDivergence` on pieces."""
    fused = FusedDivergence(parse_objective(case.objective), pairing.maps,
                            memory_budget=case.memory_budget)

    def loss(problem: ChunkProblem) -> Tensor:
        batch = problem.batch
        return fused(problem.student_hidden, Head(problem.student_head), problem.teacher_hidden,
                     Head(problem.teacher_head), batch["labels"], t=TAID_T,
                     map_index=batch["map_index"], pieces=pieces_of(batch)
                     ).loss / len(problem.student_hidden)

    return loss


def all_logits(case: Case, pairing: Pairing) -> Callable[[Any], Tensor]:
    """What the trainer does with `loss_implementation: reference`."""
    objective = parse_objective(case.objective)

    def loss(problem: ChunkProblem) -> Tensor:
        s = linear(problem.student_hidden, problem.student_head)
        with torch.no_grad():
            u = linear(problem.teacher_hidden, problem.teacher_head)
        losses = token_losses(objective, problem.batch, s, u, pairing, TAID_T)
        return objective.weighted(losses).sum() / len(s)

    return loss


IMPLEMENTATIONS = {"ours": ours, "all logits": all_logits}


# ----- measuring ----------------------------------------------------------------------------------


def measure(
    case: Case, teacher_vocab: int, folders: Sequence[str], texts: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """One row per implementation: error, memory, and time in turn with the floor."""
    batch, pairing = (real(case.tokens, folders, texts) if folders
                      else synthetic(case, teacher_vocab))
    with memory_limit("cpu"):
        problem = make_problem(case, batch, pairing)
        steps = {name: step(make(case, pairing)) for name, make in IMPLEMENTATIONS.items()}
        found: dict[str, dict[str, Any]] = errors(case, first(problem, CHECKED), steps)
        for name, run in steps.items():
            found[name]["gradient_bytes"] = sum(  # of a call that warms up
                g.nbytes for g in run(problem) if g is not None)
            found[name]["peak_extra_bytes"] = peak_extra_bytes(
                lambda name=name: step(IMPLEMENTATIONS[name](case, pairing))(problem), "cpu")
        times = alternate({"floor": floor, **steps}, problem, repeats)
    return [_row(case, name, values, problem, times) for name, values in found.items()]


def errors(
    case: Case, problem: ChunkProblem, steps: Mapping[str, Callable[[Any], Any]]
) -> dict[str, dict[str, Any]]:
    """Of the gradients of every step, against all logits in float64."""
    doubles = replace(problem, **{name: getattr(problem, name).detach().double().requires_grad_(
        name.startswith("student")) for name in (
        "student_hidden", "student_head", "teacher_hidden", "teacher_head")})
    want = step(all_logits(case, problem.pairing))(doubles)
    return {name: gradient_errors(run(problem), want) for name, run in steps.items()}


def floor(problem: ChunkProblem) -> None:
    """The four GEMMs, 256 rows at a time."""
    head = problem.student_head.detach()
    g_x, g_w = torch.empty_like(problem.student_hidden), torch.zeros_like(head)
    for x, part in zip(problem.student_hidden.detach().split(256), g_x.split(256), strict=True):
        s = x @ head.T
        torch.mm(s, head, out=part)
        torch.addmm(g_w, s.T, x, out=g_w)
    for x in problem.teacher_hidden.split(256):
        x @ problem.teacher_head.T


def alternate(
    steps: Mapping[str, Callable[[Any], object]], problem: ChunkProblem, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, processor seconds) of every step in every round; each begins with another."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(repeats):
        for name in islice(cycle(steps), number % len(steps), number % len(steps) + len(steps)):
            gc.collect()
            begun = time.perf_counter(), time.process_time()
            steps[name](problem)
            times[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return times


def _row(
    case: Case, name: str, values: dict[str, Any], problem: ChunkProblem,
    times: Mapping[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    batch = problem.batch
    wall, processor = ([t[i] for t in times[name]] for i in (0, 1))
    base = [t[1] for t in times["floor"]]  # processor time: a busy machine tells less in it
    ratios = [a / b for a, b in zip(processor, base, strict=True)]
    n, m = len(problem.student_hidden), len(problem.teacher_hidden)
    flops = 6 * n * problem.student_head.numel() + 2 * m * problem.teacher_head.numel()
    return {
        "implementation": name, "objective": case.objective,
        "dtype": str(case.dtype).removeprefix("torch."), "tokens": n, "answers": n,
        "teacher_tokens": m, "pairs": len(batch["pair_student"]),
        "tokens_in_pieces": int((batch["chunk_student"] >= 0).sum()),
        "entries": problem.pairing.maps[0].width, **values,
        "ratio_to_floor": median(ratios), "ratio_spread": [min(ratios), max(ratios)],
        "seconds": median(wall), "seconds_spread": [min(wall), max(wall)],
        "cpu_seconds": median(processor), "cpu_seconds_spread": [min(processor), max(processor)],
        "vocab": len(problem.student_head), "teacher_vocab": len(problem.teacher_head),
        "student_hidden": case.student_hidden, "teacher_hidden": case.teacher_hidden,
        "frozen_head": case.frozen_head, "floor_seconds": median(base), "floor_flops": flops}


def folder(text: str) -> str:
    """A flag's folder of a tokenizer, which must be there."""
    if not Path(text).is_dir():
        raise ValueError(text)
    return text
