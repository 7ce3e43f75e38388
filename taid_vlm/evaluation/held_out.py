"""Held-out figures of a student against its teacher, exact under any batch size or process count.

Sums and sums of squares per category are added up in float64 and divided once at the end, so the
figures do not depend on batches; each process takes its own slice, so no sample counts twice.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from taid_vlm.alignment import Pairing
from taid_vlm.batch.collator import Batch, DistillationCollator
from taid_vlm.batch.figures import Measured, token_figures
from taid_vlm.batch.forward import student_forward
from taid_vlm.batch.several import joined_figures
from taid_vlm.batch.sparse import sparse_figures
from taid_vlm.evaluation.calibration import Calibration, Sums, binned_sums
from taid_vlm.evaluation.statistics import standard_error
from taid_vlm.models.forward import Autocast, evaluation_mode
from taid_vlm.teachers import Teacher, Teachers

ALL = ""  # the category that holds every token


@dataclass
class Moments(Sums):
    """Sums over tokens, and over records for the standard error (tokens of one record are not
    independent, so the error is the cluster-robust one of a ratio of sums)."""

    tokens: float = 0.0  # what they count together, where answers have weights
    records: int = 0
    total: float = 0.0
    total_squared: float = 0.0  # sum over records of (record total)^2
    cross: float = 0.0  # sum over records of record total * record tokens
    tokens_squared: float = 0.0
    counted: int = 0  # tokens, whatever they count

    def add(self, total: float, tokens: float, weight: float = 1.0) -> None:
        """One record's sum over `tokens` tokens."""
        self.counted += int(tokens)
        total, tokens = total * weight, tokens * weight
        self.tokens += tokens
        self.records += 1
        self.total += total
        self.total_squared += total * total
        self.cross += total * tokens
        self.tokens_squared += tokens * tokens

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else math.nan

    @property
    def stderr(self) -> float:
        """Standard error of the mean per token, with records as independent draws."""
        mean = self.mean
        squares = self.total_squared - 2 * mean * self.cross + mean**2 * self.tokens_squared
        return standard_error(squares, self.records, self.tokens)


Table = dict[str, dict[str, Moments]]  # category -> figure -> moments


@dataclass(frozen=True)
class AnswerTotals:
    """One answer's sums over its tokens: what paired comparisons between runs need.

    counts: over how many tokens, for figures that are not defined at all of `tokens`.
    weight: what the answer counts.
    """

    source: str
    turn: int
    category: str
    tokens: int
    totals: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)
    weight: float = 1.0


# figures that an evaluation gives as numbers: is less of it better, does it need a teacher?
DIRECTIONS = {
    "loss": (True, False), "nll": (True, False), "ece": (True, False),
    "token_accuracy": (False, False), "kl": (True, True), "reverse_kl": (True, True),
    "jsd": (True, True), "agreement": (False, True), "chunk_kl": (True, True),
    "chunk_reverse_kl": (True, True), "chunk_jsd": (True, True),
}


@dataclass
class Tally:
    """What one process has seen so far; single answers only where `keep_answers`."""

    # partial, unlike a lambda, can travel between processes
    table: Table = field(default_factory=lambda: defaultdict(partial(defaultdict, Moments)))
    calibration: dict[str, Calibration] = field(default_factory=lambda: defaultdict(Calibration))
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)  # supervised, aligned, chunk
    keep_answers: bool = False
    answers: list[AnswerTotals] = field(default_factory=list)

    def add(self, batch: dict[str, Any], figures: Mapping[str, Measured]) -> None:
        counts = batch["counts"]
        self.tokens.update({kind: counts[f"{kind}_tokens"]
                            for kind in ("supervised", "aligned", "chunk")})
        self.dropped.update(counts["dropped"])
        if not len(batch["row"]):
            return
        answer, first = _answers(batch)
        sums = {name: _per_answer(figure, answer, len(first)) for name, figure in figures.items()}
        sure = _binned(figures, answer, len(first))
        weights = batch["weights"][first].tolist() if "weights" in batch else [1.0] * len(first)
        for index, token in enumerate(first):
            parts = {ALL, batch["categories"][token]}
            if sure is not None:
                for part in parts:
                    self.calibration[part].add(sure[index])
            for name, (total, tokens) in sums.items():
                for part in parts if tokens[index] else ():
                    self.table[part][name].add(total[index], tokens[index], weights[index])
            if self.keep_answers:
                self.answers.append(_answer_totals(batch, token, index, sums))

    def merge(self, other: Tally) -> None:
        for category, figures in other.table.items():
            for name, moments in figures.items():
                self.table[category][name].merge(moments)
        for category, calibration in other.calibration.items():
            self.calibration[category].merge(calibration)
        self.dropped.update(other.dropped)
        self.tokens.update(other.tokens)
        self.answers.extend(other.answers)


def _answers(batch: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """Which answer every token belongs to [N], and the first token of every answer."""
    key = torch.stack([batch["row"].cpu(), batch["turn"].cpu()])
    _, answer = torch.unique(key, dim=1, return_inverse=True)
    number = int(answer.max()) + 1
    return answer, [int((answer == index).nonzero()[0, 0]) for index in range(number)]


def _per_answer(figure: Measured, answer: Tensor, number: int) -> tuple[list[float], list[int]]:
    """A figure's sum over every answer's tokens, and over how many of them."""
    if figure.tokens is not None:
        answer = answer[figure.tokens.cpu()]
    values = figure.values.double().cpu()
    total = values.new_zeros(number).index_add(0, answer, values)
    return total.tolist(), torch.bincount(answer, minlength=number).tolist()


def _binned(figures: Mapping[str, Measured], answer: Tensor, number: int) -> Tensor | None:
    """What the calibration adds up for every answer, where it is measured."""
    if "confidence" not in figures:
        return None
    confidence, hits = (figures[name].values.cpu() for name in ("confidence", "token_accuracy"))
    return binned_sums(confidence, hits, answer, number)


def _answer_totals(
    batch: dict[str, Any], token: int, index: int, sums: dict[str, tuple[list[float], list[int]]]
) -> AnswerTotals:
    """The answer that `token` is the first of, the batch's `index`-th."""
    tokens = sums["nll"][1][index]
    own = {name: (total[index], count[index]) for name, (total, count) in sums.items()
           if count[index]}
    return AnswerTotals(
        batch["sources"][int(batch["row"][token])], int(batch["turn"][token]),
        batch["categories"][token], tokens, {name: total for name, (total, _) in own.items()},
        {name: count for name, (_, count) in own.items() if count != tokens},
        float(batch["weights"][token]) if "weights" in batch else 1.0)


@torch.no_grad()
def evaluate_pair(
    student: nn.Module,
    teacher: Teacher | Teachers | None,
    records: Sequence[Any],
    collator: DistillationCollator,
    pairing: Pairing | None,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    process: tuple[int, int] = (0, 1),
    progress: bool = False,
    keep_answers: bool = False,
    autocast: Autocast = contextlib.nullcontext,
    measure: Callable[..., dict[str, Measured] | None] | None = None,
) -> Tally:
    """Figures of one process's share of the held-out records.

    Touches no random state, no gradient and no schedule; the student's mode is restored.

    Args:
        records: a map-style dataset of records.
        process: (rank, world size); this call takes every world-size-th record.
        measure: gives all figures of a batch from student, teacher and batch, or None where they
            need all its logits at once; without it they always do.
    """
    shares = in_step(len(records), batch_size, process)
    # a generator of its own: a DataLoader draws its base seed from the global one otherwise
    loader: Any = DataLoader(records, collate_fn=collator,  # type: ignore[arg-type]
                             batch_sampler=[list(share) or [0] for share in shares],
                             generator=torch.Generator())
    tally = Tally(keep_answers=keep_answers)
    with evaluation_mode(student):
        bar = tqdm(loader, desc="evaluate", disable=None if progress else True, leave=False)
        for share, batch in zip(shares, bar, strict=True):
            batch = send_to_device(batch, device)
            figures = measure(student, teacher, batch) if measure else None
            if figures is None:
                with autocast():
                    s = student_forward(student, batch)
                figures = teacher_figures(batch, s, teacher, pairing, autocast)
            if share:
                tally.add(batch, figures)
    return tally


def in_step(records: int, batch_size: int, process: tuple[int, int]) -> list[range]:
    """The batches of one process, as numbers of records: as many as any other process has, so that
    models sharded over all of them are run by all; the last one may be empty."""
    rank, world = process
    share = range(rank, records, world)
    return [share[start : start + batch_size]
            for start in range(0, len(range(0, records, world)), batch_size)]


def teacher_figures(
    batch: Batch, s: Tensor, teacher: Teacher | Teachers | None, pairing: Pairing | None,
    autocast: Autocast,
) -> dict[str, Measured]:
    """All figures of a batch from the student's logits, against whatever the teacher gives; of
    several teachers, those of each at its tokens, joined."""
    if isinstance(teacher, Teachers) and batch["parts"]:
        return joined_figures(batch, {name: teacher_figures(
            part, s[part["student_at"]], teacher.by_name[name], teacher.pairings[name], autocast)
            for name, part in batch["parts"].items()})
    if isinstance(teacher, Teachers):
        return token_figures(batch, s, None, None, closely=True)
    if teacher is not None and teacher.top is not None and pairing is not None:
        signal = teacher.sparse(batch, teacher.top)
        return sparse_figures(batch, s, signal, pairing, closely=True)
    with autocast():
        u = teacher.logits(batch) if teacher is not None else None
    return token_figures(batch, s, u, pairing, closely=True)


def summarise(tally: Tally) -> dict[str, Any]:
    """Plain numbers for results.json.

    Returns:
        {figure: mean, figure_stderr: ..., n_tokens, n_answers, coverage, dropped,
        calibration: the bins behind `ece`, by_category: {...}}; `kl` is KL(teacher || student) in
        nats per answer token, `agreement` the share of tokens where both models' most likely entry
        is the same, all of them with the weights of the answers; `ece` the expected calibration
        error of the student's most likely tokens, each counted once. With different tokenizers
        figures against the teacher are over the tokens that both models have, `chunk_kl` is per
        chunk, both `nll` are per token of the student, and `chunk_coverage` is the share of its
        tokens that is compared by likelihood only.
    """
    means = {name: _means(figures, tally.calibration.get(name))
             for name, figures in sorted(tally.table.items())}
    overall = means.pop(ALL, {"n_tokens": 0, "n_answers": 0})
    supervised = max(tally.tokens["supervised"], 1)
    sure = tally.calibration.get(ALL)
    return {**overall, "coverage": tally.tokens["aligned"] / supervised,
            "chunk_coverage": tally.tokens["chunk"] / supervised, "dropped": dict(tally.dropped),
            **({} if sure is None else {"calibration": sure.bins()}), "by_category": means}


def _means(
    figures: dict[str, Moments], calibration: Calibration | None
) -> dict[str, float | int]:
    every = figures["nll"]
    out: dict[str, float | int] = {"n_tokens": every.counted, "n_answers": every.records}
    for name, moments in figures.items():
        out[name], out[f"{name}_stderr"] = moments.mean, moments.stderr
        if name.startswith("kl/"):  # of one of several teachers
            out[name.replace("kl", "n_tokens")] = moments.counted
    if calibration is not None:
        out["ece"], out["ece_stderr"] = calibration.error, calibration.stderr
    return out
