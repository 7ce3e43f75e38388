"""What every implementation is given: hidden states and heads of a student and its teacher."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from taid_vlm.config.training import MEMORY_BUDGET

LOGIT_SPREAD = 4.0  # standard deviation of the student's logits in a row
TEACHER_NOISE = 0.3  # of the teacher's hidden states, relative to the part shared with the student
TAID_T = 0.4


@dataclass(frozen=True)
class Case:
    """One problem.

    tokens: positions; answers: those of them that count, spread over all positions.
    memory_budget: bytes of a chunk, for our objective and for the floor alike.
    """

    tokens: int
    answers: int
    vocab: int
    student_hidden: int
    teacher_hidden: int
    dtype: torch.dtype
    objective: str
    device: str = "cpu"
    frozen_head: bool = False
    memory_budget: int = MEMORY_BUDGET

    @property
    def row_bytes(self) -> int:
        """The student's and the teacher's logits of one answer; on CUDA they are in float32, and
        their gradient does not take the former's place."""
        if self.device == "cuda":
            return 3 * self.vocab * max(4, self.dtype.itemsize)
        return 2 * self.vocab * self.dtype.itemsize

    def chunks(self) -> list[slice]:
        """The answers as `FusedDivergence` cuts them: within the budget, about equal."""
        most = max(1, self.memory_budget // self.row_bytes)
        parts = -(-self.answers // most)
        cuts = [part * self.answers // parts for part in range(parts + 1)]
        return [slice(*ends) for ends in itertools.pairwise(cuts)]


@dataclass
class Problem:
    """student_hidden [P, Hs] and student_head [V, Hs] are leaves; teacher_hidden [P, Ht] and
    teacher_head [V, Ht] need no gradient. mask [P] marks the answers; answers [n] counts them up.
    """

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    mask: Tensor
    answers: Tensor

    @property
    def labels(self) -> Tensor:
        """[P] as Liger and TRL mark positions that do not count: -100, otherwise any id."""
        return torch.where(self.mask, 0, -100)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.student_hidden, self.student_head,
                                      self.teacher_hidden, self.teacher_head))

    def take_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden states and head, which the leaves then no longer hold."""
        found = self.student_hidden.grad, self.student_head.grad
        self.student_hidden.grad = self.student_head.grad = None
        return found

    def first(self, answers: int) -> Problem:
        """The same problem up to its n-th answer, with the same heads."""
        end = int(self.answers[answers - 1]) + 1
        hidden = self.student_hidden.detach()[:end].clone().requires_grad_()
        return Problem(hidden, self.student_head, self.teacher_hidden[:end], self.teacher_head,
                       self.mask[:end], self.answers[:answers])

    def copy(self) -> Problem:
        """The same numbers at other addresses."""
        leaf = self.student_hidden.detach().clone().requires_grad_()
        head = self.student_head.detach().clone().requires_grad_(self.student_head.requires_grad)
        return Problem(leaf, head, self.teacher_hidden.clone(), self.teacher_head.clone(),
                       self.mask, self.answers)


def make_problem(case: Case, seed: int = 0) -> Problem:
    """A teacher that is the student with noise and, if it is wider, with more of its own.

    Distributions are about as peaked as a language model's (a few nats of entropy), and the two
    models agree to about one nat: where gradients are differences of nearly equal numbers.
    """
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    width = min(case.student_hidden, case.teacher_hidden)
    hidden = normal(case.tokens, case.student_hidden)
    head = normal(case.vocab, case.student_hidden)
    head *= LOGIT_SPREAD / case.student_hidden**0.5
    teacher_hidden = TEACHER_NOISE * normal(case.tokens, case.teacher_hidden)
    teacher_hidden[:, :width] += hidden[:, :width]
    teacher_head = normal(case.vocab, case.teacher_hidden)
    teacher_head *= LOGIT_SPREAD / case.student_hidden**0.5
    teacher_head[:, :width] = head[:, :width]
    answers = torch.arange(case.answers, device=case.device) * case.tokens // case.answers
    mask = torch.zeros(case.tokens, dtype=torch.bool, device=case.device)
    mask[answers] = True
    return Problem(hidden.to(case.dtype).requires_grad_(),
                   head.to(case.dtype).requires_grad_(not case.frozen_head),
                   teacher_hidden.to(case.dtype), teacher_head.to(case.dtype), mask, answers)
