"""A teacher that a vLLM server runs: its k most likely tokens, and the mass of all others."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import PreTrainedModel

from taid_vlm.batch.forward import Batch
from taid_vlm.batch.sparse import SparseSignal
from taid_vlm.config.model import ServerSpec
from taid_vlm.errors import TaidError
from taid_vlm.io.endpoint import Failure, ServerLost, endpoint_of, insist, longest_row, send
from taid_vlm.models.forward import head_rows
from taid_vlm.teachers.protocol import (
    Laws,
    Question,
    questions,
    read_laws,
    request,
)

SIGNAL = "teacher_signal"  # a batch's key: what was asked ahead
CALLED = "teacher.server"
PROBE_TOKENS = 8  # of the prompt that is asked again, to see whether the model is the same
PROBE_EVERY = 100  # batches
# `distance` between two answers of one model. Of SmolLM2-135M in bfloat16, by vLLM on a CPU and by
# transformers, it was 0.03 to 0.05 (0.03 between bfloat16 and float32); of laws one token apart 5.
SAME_MODEL = 0.15


class TeacherLost(ServerLost):
    """The teacher's server."""


class Pending:
    """Answers that are under way, one for each row of a batch that has any."""

    def __init__(self, rows: Sequence[Future[Laws]]) -> None:
        self.rows = rows


class ServedTeacher:
    """The model behind a server; no weights are in this process.

    Args:
        server: where it is and how it is asked.
        skeleton: the model's shapes (`models.loading.load_skeleton`), for its configuration and
            the rows of its head.

    Raises:
        TaidError: no server there, none with that model, or one that gives no such laws.
    """

    model = None  # in this process
    asks = True  # a plan's does not

    def __init__(self, server: ServerSpec, skeleton: PreTrainedModel) -> None:
        self.server, self.skeleton = server, skeleton
        self.rows = head_rows(skeleton)
        self.top = min(server.top_logprobs, self.rows)
        self.end = endpoint_of(server, CALLED)
        self.received = self.tokens = 0  # bytes of answers, and tokens that they are about
        self.retried = False
        self._waited = 0
        self._closing = threading.Event()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # and the process it belongs to
        self.longest = self._connect()
        probe = torch.arange(PROBE_TOKENS).remainder(self.rows).tolist()
        self._probe = Question(probe, list(range(1, PROBE_TOKENS)), None, "a probe")
        self._first = self._ask(self._probe)

    def __getstate__(self) -> dict[str, Any]:  # for data-loader workers that are not forked
        return {**vars(self), "_pool": None, "_closing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _closing=threading.Event())

    # ----- what every teacher gives ---------------------------------------------------------

    def logits(self, batch: Batch) -> Tensor:
        raise TaidError("a served teacher gives its most likely tokens only.")

    def hidden(self, batch: Batch) -> None:
        """A server keeps its hidden states."""

    def sparse(self, batch: Batch, k: int) -> SparseSignal:
        """The k most likely tokens, see `Teacher`; those that were asked ahead, or asks now."""
        assert k == self.top
        ahead = dict(batch)
        if SIGNAL not in ahead:
            ahead[SIGNAL] = self.submit(batch)
            self.wait([ahead])
        device = batch["teacher_labels"].device
        return SparseSignal(**{name: part.to(device) for name, part in ahead[SIGNAL].items()})

    # ----- asking ahead ---------------------------------------------------------------------

    def submit(self, batch: Batch) -> Pending:
        """Send a batch's requests, at most `concurrency` at once."""
        asked = questions(batch)
        self._refuse_placeholders(asked)
        return Pending([self._threads().submit(self._ask, question) for question in asked])

    def ask_ahead(self, batch: dict[str, Any]) -> None:
        """Put the answers that are under way into a batch, or what went wrong.

        What a data-loader worker gives is sent to another process, so that the worker waits; it
        works ahead as it is.
        """
        try:
            pending = self.submit(batch)
            in_worker = get_worker_info() is not None
            batch[SIGNAL] = _joined([future.result() for future in pending.rows],
                                    self.top) if in_worker else pending
        except TaidError as problem:
            batch[SIGNAL] = str(problem)
        batch.pop("teacher_chats", None)  # large, and sent

    def wait(self, batches: Sequence[dict[str, Any]]) -> None:
        """Put the answers, the parts of a SparseSignal by name, in place of what is under way.

        Raises:
            TeacherLost: there is no answer, or a wrong one; nothing is asked any more then.
        """
        try:
            for batch in batches:
                pending = batch.get(SIGNAL)
                if isinstance(pending, str):  # from a data-loader worker
                    raise TeacherLost(pending)
                if isinstance(pending, Pending):
                    laws = [future.result() for future in pending.rows]
                    pending = _joined(laws, self.top)
                if isinstance(pending, Laws):
                    self.received += pending.size
                    self.tokens += len(pending.ids)
                    batch[SIGNAL] = to_signal(pending, self.rows)._asdict()
                self._waited += 1
            if self.retried or self._waited >= PROBE_EVERY:
                self._check_same()
        except TaidError:
            self.close()
            raise

    def close(self) -> None:
        """Ask no more; what waits for another attempt gives up."""
        self._closing.set()
        if self._pool is not None:
            self._pool[1].shutdown(wait=False, cancel_futures=True)

    def report(self) -> dict[str, Any]:
        """For the run's results. Bytes per token are those on the wire."""
        return {"name": self.server.model, "top_logprobs": self.top,
                "bytes_per_token": self.received / self.tokens if self.tokens else None}

    # ----- one request ----------------------------------------------------------------------

    def _ask(self, question: Question) -> Laws:
        path, body = request(question, self.server.model, self.top)

        def attempt() -> Laws:
            try:
                return send(self.end, path, body, lambda data: read_laws(
                    data, question, self.server.model, self.top, self.rows))
            except Failure as failure:
                self.retried |= failure.passing
                raise

        return insist(self.end, path, attempt, self._closing, called=CALLED, lost=TeacherLost,
                      about=question.source, mend=lambda words: _mend(words, self.top))

    def _connect(self) -> int | None:
        """The longest row that the server takes, if it says so."""
        length = longest_row(self.end, CALLED, TeacherLost, self._closing)
        return length and length - 1  # a token is generated, too

    def _check_same(self) -> None:
        """After an interruption, and now and then: is it still the model of the beginning?"""
        again, self.retried, self._waited = self._ask(self._probe), False, 0
        moved = distance(self._first, again)
        if not moved <= SAME_MODEL:
            raise TeacherLost(f"teacher.server: '{self.server.model}' at '{self.server.url}' is "
                              "not the model it was when the run began: the same prompt has other "
                              f"probabilities (by {moved:.2g} nats).")

    def _refuse_placeholders(self, asked: Sequence[Question]) -> None:
        """A server takes the ids of an image without one, and answers as if it had seen noise."""
        config = self.skeleton.config
        image = {getattr(config, key, None) for key in ("image_token_id", "image_token_index")}
        for question in asked:
            if question.chat is None and not image.isdisjoint(question.ids):
                raise TeacherLost(f"{question.source} has image tokens, but no image to send.")

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():
            worker = get_worker_info()
            share = self.server.concurrency // (1 if worker is None else worker.num_workers)
            self._pool = os.getpid(), ThreadPoolExecutor(max(1, share))
        return self._pool[1]


class AskingCollator:
    """A collator whose batches carry the teachers' answers, or are waiting for them: they are under
    way while the student trains.

    Args:
        teachers: by the name of their part of the batch, "" for all of it.
    """

    def __init__(self, collator: Any, teachers: Mapping[str, ServedTeacher]) -> None:
        self.collator, self.teachers = collator, teachers

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(rows)
        for name, teacher in self.teachers.items():
            for part in parts_for(name, [batch]):
                teacher.ask_ahead(part)
        return batch


def parts_for(name: str, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A teacher's parts of some batches (`batch/several.py`), or all of them for ""."""
    return [batch["parts"][name] if name else batch for batch in batches
            if not name or name in batch["parts"]]


def _joined(laws: Sequence[Laws], k: int) -> Laws:
    """All rows' tokens one behind the other, as `teacher_mask` has them."""
    none = torch.empty(0, k)
    columns = list(zip(*laws, strict=True)) or [(none.long(),), (none.double(),),
                                                (none[:, 0].double(),), (0,)]
    ids, log_probs, own, sizes = columns
    return Laws(torch.cat(ids), torch.cat(log_probs), torch.cat(own), sum(sizes))


def to_signal(laws: Laws, rows: int) -> SparseSignal:
    """In float32, with the exact rest: log(1 - sum) in float64; -inf where all tokens are known."""
    mass = laws.log_probs.exp().sum(-1)
    whole = laws.ids.shape[-1] >= rows
    rest = torch.full_like(mass, -torch.inf) if whole else torch.log1p(-mass.clamp(max=1.0))
    return SparseSignal(laws.ids, laws.log_probs.float(), rest.float(), laws.own.float())


def distance(first: Laws, second: Laws) -> float:
    """The mean over tokens of sum p |log p - log q| over the first's k, in nats.

    A token that is not among the second's k counts as its least likely one at most.
    """
    same = first.ids[:, :, None] == second.ids[:, None, :]
    least = second.log_probs.min(-1, keepdim=True).values
    q = torch.where(same, second.log_probs[:, None, :], -torch.inf).amax(-1)
    q = torch.where(q > -torch.inf, q, torch.minimum(least, first.log_probs))
    gaps = first.log_probs.exp() * (first.log_probs - q).abs()
    return float(gaps.sum(-1).mean()) if len(gaps) else 0.0


def _mend(words: str, k: int) -> str:
    if "logprobs" in words:
        return f" Start the server with --max-logprobs {k}, or lower teacher.server.top_logprobs."
    if "context length" in words:
        return " Lower train.max_length, or start the server with a larger --max-model-len."
    if "chat template" in words or "chat_template" in words:
        return " Start the server with --chat-template, as the processor has it."
    return ""
