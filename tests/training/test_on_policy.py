"""Answers that the student gives itself: the same mathematics and the same run under any split."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training.runs import make_trainer, rows, step_gradient, weights
from training.test_invariance import ALTERNATIVES, SGD, TOLERANCE, in_processes, relative

from taid_vlm.adapters import continued_record
from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.batch.losses import token_losses
from taid_vlm.errors import RecipeError, TaidError
from taid_vlm.models import generation
from taid_vlm.models.generation import Continued
from taid_vlm.objectives import parse_objective
from taid_vlm.training import on_policy
from taid_vlm.training.on_policy import WATCHED, repeating

torch.set_num_threads(1)
HALF: dict[str, Any] = {"lmbda": 0.6, "max_new_tokens": 12}
TAID = {"name": "taid", "on_policy": HALF}
PAIR = {"terms": [{"name": "skew_kl"}, {"name": "ce", "weight": 0.3}],
        "on_policy": {**HALF, "objective": "skew_rkl"}}  # as DistiLLM-2 pairs them


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return step_gradient(tmp_path_factory.mktemp("reference"), objective=TAID)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    in_processes(2, folder, gradient={**SGD, "objective": TAID, "per_device_train_batch_size": 4})
    return folder


# ----- exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_gradient_does_not_depend_on_batches(
    name: str, reference: dict[str, Tensor], tmp_path: Path
) -> None:
    other = step_gradient(tmp_path, objective=TAID, **ALTERNATIVES[name])
    assert relative(reference, other) < TOLERANCE


def test_gradient_does_not_depend_on_processes(
    reference: dict[str, Tensor], two_processes: Path, tmp_path: Path
) -> None:
    state = json.loads((two_processes / "gradient" / "guard-0.json").read_text())
    assert state["processes"] == 2
    start = weights(make_trainer(tmp_path))
    final = load_file(two_processes / "gradient" / "final.safetensors")
    assert relative(reference, {name: start[name] - final[name] for name in start}) < TOLERANCE


def test_fused_is_the_reference(reference: dict[str, Tensor], tmp_path: Path) -> None:
    other = step_gradient(tmp_path, objective=TAID, loss_implementation="reference")
    assert relative(reference, other) < TOLERANCE


@pytest.mark.parametrize("objective", [TAID, PAIR], ids=["taid", "pair"])
def test_gradient_is_that_of_a_naive_float64_loss(objective: Any, tmp_path: Path) -> None:
    """References by the objective, samples by theirs, over all tokens that were trained on."""
    trainer = make_trainer(tmp_path, objective=objective, **{**SGD, "max_steps": 1})
    filled, fill = [], trainer.rollouts.fill

    def keep(batches: Sequence[dict[str, Any]], *of: Any) -> None:
        fill(batches, *of)
        filled.extend(copy.deepcopy(list(batches)))

    trainer.rollouts.fill = keep
    student = copy.deepcopy(trainer.model).double()
    before = weights(trainer)
    trainer.train()
    gradient = {name: before[name] - after for name, after in weights(trainer).items()}
    assert [len(part["labels"]) > 5 for batch in filled for part in (batch, batch["sampled"])] == [
        True, True]
    teacher, main = copy.deepcopy(trainer.teacher_model).double(), parse_objective(objective)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in filled:
        for part, terms in ((batch, main), (batch["sampled"], main.sampled)):
            part = {key: {k: v.double() if v.is_floating_point() else v for k, v in value.items()}
                    if key.endswith("inputs") else value for key, value in part.items()}
            losses = token_losses(terms, part, student_forward(student, part),
                                  teacher_forward(teacher, part), trainer.pairing, t=0.4)
            total = total + terms.weighted({name: x.sum() for name, x in losses.items()})
            tokens += len(part["labels"])
    (total / tokens).backward()
    naive = {name: torch.zeros_like(p) if p.grad is None else p.grad
             for name, p in student.named_parameters()}
    assert relative({name: g.double() for name, g in gradient.items()}, naive) < 1e-4


def test_samples_are_learned_in_their_own_tokens(tmp_path: Path) -> None:
    """What was drawn stands in the student's inputs; the teacher has the text in its template."""
    trainer = make_trainer(tmp_path, objective={"name": "rkl", "on_policy": {**HALF, "lmbda": 1.0}})
    batch: dict[str, Any] = {"rows": rows(8)}
    drawn = {}
    answers = trainer.rollouts._answers

    def keep(*of: Any) -> Any:
        drawn.update(answers(*of))
        return drawn

    trainer.rollouts._answers = keep
    trainer.rollouts.fill([batch], trainer.model, 1)
    sampled = batch["sampled"]
    by_source = {each.source: each for each in drawn.values()}
    assert sampled["counts"]["rows"] > 4
    for row, source in enumerate(sampled["sources"]):
        answer, inputs = by_source[source], sampled["student_inputs"]
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        record, _ = continued_record(trainer.collator.student, answer)
        said = record.messages[-1].text
        end = [] if answer.end is None else [answer.end]
        whole = [*answer.ids, *end]
        assert any(ids[-n:] == whole[:n] for n in range(1, len(whole) + 1))
        teacher = trainer.collator.teacher
        shown = sampled["teacher_inputs"]["input_ids"][row].tolist()
        spelled = b"".join(teacher.table.text[i] or b"" for i in shown).decode(errors="replace")
        assert said.strip() in spelled


def test_ending_is_learned_where_the_student_ended(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, objective={"name": "rkl", "on_policy": {**HALF, "lmbda": 1.0}})
    adapter = trainer.collator.student
    ids = adapter.tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    end = adapter.end_of_turn_id
    for said, learned in ((Continued(ids, end), [*ids, end]), (Continued(ids, None), ids)):
        trainer.rollouts._ask = lambda questions, *_, said=said: [said for _ in questions]
        batch: dict[str, Any] = {"rows": rows(1, kinds=["text"])}
        trainer.rollouts.fill([batch], trainer.model, 1)
        assert batch["sampled"]["labels"].tolist() == learned
        assert not len(batch["labels"])


def test_the_loss_is_chosen_before_anyone_samples(tmp_path: Path) -> None:
    """By references: which process has samples first would differ in a run that goes on."""
    trainer = make_trainer(tmp_path, max_steps=1, objective={
        "name": "rkl", "on_policy": {**HALF, "lmbda": 1.0}})
    trainer.rollouts._ask = lambda questions, *_: [Continued([], 0) for _ in questions]
    trainer.train()
    assert {part: type(step).__name__ for part, step in trainer._steps.items()} == {
        "": "FusedStep", "sampled": "FusedStep"}


def test_in_mixed_precision_weights_are_cast_once_for_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at every token, and the answers are the same; the next step casts what it has learned."""
    trainer = make_trainer(tmp_path, objective=TAID, bf16=True)
    model, rollouts = trainer.accelerator.prepare_model(trainer.model), trainer.rollouts
    questions = [on_policy.Question(str(i), on_policy._record(row), 1)
                 for i, row in enumerate(rows(4, kinds=["text"]))]
    said = []
    with Casts(model) as casts:
        said.append(rollouts._ask(questions, model, 1))
        assert max(len(answer.ids) for answer in said[0]) > 4
        assert casts.of and set(casts.of.values()) == {1}
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        rollouts._ask(questions, model, 1)
        assert set(casts.of.values()) == {2}
    with torch.no_grad():
        next(model.parameters()).div_(1.5)
    monkeypatch.setattr(generation, "_casts_kept", lambda device: contextlib.nullcontext())
    with Casts(model) as casts:
        assert rollouts._ask(questions, model, 1) == said[0]
        assert min(casts.of.values()) > 4


class Casts(TorchDispatchMode):
    """Counts by weight of a model how often it is cast."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.of = Counter[str]()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.names:
            self.of[self.names[args[0].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


# ----- who samples, and what becomes of it ------------------------------------------------------


def test_who_samples_follows_from_seed_step_and_record(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, objective=TAID)
    records = [on_policy._record(row) for row in rows(32)]

    def who(step: int) -> list[bool]:
        return [trainer.rollouts._question(record, step) is not None for record in records]

    shares = [sum(who(step)) / 32 for step in range(200)]
    assert abs(sum(shares) / 200 - 0.6) < 0.03
    assert who(1) == who(1) != who(2)
    turns = {trainer.rollouts._question(records[3], step).turn for step in range(30)
             if who(step)[3]}
    assert turns == {0, 1}  # any of its learned answers


@pytest.mark.parametrize(("said", "reason"), [
    (Continued([], 0), "empty"), ("no room for an answer", "no room for an answer"),
])
def test_what_cannot_be_learned_is_counted_and_its_reference_learned(
    said: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, objective={"name": "rkl", "on_policy": {**HALF, "lmbda": 1.0}})
    trainer.rollouts._ask = lambda questions, *_: [said for _ in questions]
    batch: dict[str, Any] = {"rows": rows(4, kinds=["text"])}
    with caplog.at_level(logging.WARNING):
        trainer.rollouts.fill([batch], trainer.model, 1)
    assert batch["counts"]["rows"] == 4
    assert not batch["counts"]["dropped"] and not batch["sampled"]["counts"]["dropped"]
    report = trainer.rollouts.report()
    assert report["unused"] == {reason: 4} and report["share"] == 0
    assert "A record is left out" not in caplog.text


def test_a_prompt_that_leaves_no_room_does_not_stop_the_others(tmp_path: Path) -> None:
    data = [*rows(2, kinds=["text"]), {"prompt": "long " * 60, "completion": "yes"}]
    trainer = make_trainer(tmp_path, data=data, max_length=120, objective={
        "name": "rkl", "on_policy": {"lmbda": 1.0, "max_new_tokens": 60}})
    batch: dict[str, Any] = {"rows": data}
    trainer.rollouts.fill([batch], trainer.model, 1)
    report = trainer.rollouts.report()
    assert report["unused"].get("no room for an answer") == 1
    assert report["asked"] == 3 and report["sampled"] >= 1


def test_an_answer_is_learned_again_only_while_it_is_young(tmp_path: Path) -> None:
    spec = {**HALF, "lmbda": 1.0, "max_age": 2}
    trainer = make_trainer(tmp_path, objective={"name": "rkl", "on_policy": spec})
    asked = []
    ask = trainer.rollouts._ask
    trainer.rollouts._ask = lambda questions, *of: asked.append(len(questions)) or ask(
        questions, *of)
    labels = []
    for step in (1, 3, 4):
        batch: dict[str, Any] = {"rows": rows(3, kinds=["text"])}
        trainer.rollouts.fill([batch], trainer.model, step)
        labels.append(batch["sampled"]["labels"].tolist())
    assert asked == [3, 3]  # at step 3 they are 2 steps old, at step 4 older
    assert labels[0] == labels[1] != labels[2]
    report = trainer.rollouts.report()
    assert (report["reused"], report["stale"]) == (3, 3)


def test_copies_of_a_few_tokens_are_repetition() -> None:
    assert repeating([9, *[1, 2, 3] * 8])
    assert repeating([5] * 24)
    assert not repeating([5] * 20)
    assert not repeating(range(100))
    assert not repeating([*range(20), 1, 1, 1, 1])


@pytest.mark.parametrize("stop", [False, True])
def test_a_collapse_is_said_or_stops_the_run(
    stop: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, objective={"name": "rkl", "on_policy": {
        **HALF, "lmbda": 1.0, "stop_when_collapsed": stop}})
    trainer.rollouts._ask = lambda questions, *_: [Continued([65] * 30, None) for _ in questions]

    def go() -> None:
        for step in range(1, 2 + WATCHED // 8):
            trainer.rollouts.fill([{"rows": rows(8, kinds=["text"])}], trainer.model, step)

    if stop:
        with pytest.raises(TaidError, match="collapsed: 100% of its last 64"):
            go()
    else:
        with caplog.at_level(logging.WARNING):
            go()
        assert caplog.text.count("the student has collapsed") == 1


# ----- runs -------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """One process and two, with answers that are learned again."""
    run = {"objective": {"name": "taid", "on_policy": {**HALF, "max_age": 3}}, "max_steps": 6,
           "save_strategy": "steps", "save_steps": 2, "kinds": ["text", "one"]}
    for number in (1, 2):
        folder = tmp_path / str(number)
        own = {**run, "per_device_train_batch_size": 8 // number}
        in_processes(number, folder / "a", whole=own)
        with contextlib.suppress(AssertionError):  # a killed process takes the other along
            in_processes(number, folder / "b", killed={**own, "kill_at": 5})
        checkpoint = folder / "b" / "killed" / "checkpoint-4"
        assert (checkpoint / "on_policy.json").is_file()
        in_processes(number, folder / "c", again={**own, "resume": str(checkpoint)})
        first, second = (load_file(path / "final.safetensors")
                         for path in (folder / "a" / "whole", folder / "c" / "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_samples_are_logged_beside_references(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, objective=TAID, max_steps=2)
    trainer.train()
    line = next(log for log in trainer.state.log_history if "on_policy/share" in log)
    assert 0.3 < line["on_policy/share"] < 0.9
    assert 0 < line["on_policy/time_share"] < 1
    assert {"on_policy/kl", "on_policy/kl_early", "on_policy/kl_late", "on_policy/student_entropy",
            "on_policy/tokens", "on_policy/cut", "on_policy/repeating", "on_policy/unused",
            "kl"} <= line.keys()
    early, late = line["on_policy/kl_early"], line["on_policy/kl_late"]
    assert min(early, late) <= line["on_policy/kl"] <= max(early, late)


def test_a_part_without_tokens_asks_the_other_processes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are chosen before the first step, for which all are asked once a part; no micro-batch
    may ask the other processes on its own."""
    from taid_vlm.training import trainer as module

    objective = {"name": "rkl", "on_policy": {**HALF, "lmbda": 1.0}}
    trainer = make_trainer(tmp_path, objective=objective, kinds=["text"], max_steps=3,
                           per_device_train_batch_size=2, gradient_accumulation_steps=2)
    calls, step = [], module.DistillationTrainer._loss_step
    gathered: list[Any] = []
    monkeypatch.setattr(module, "gather_object", lambda x: gathered.append(x) or [x])
    monkeypatch.setattr(module.DistillationTrainer, "_loss_step", lambda self, batch, part="": (
        calls.append((part, len(batch["labels"]))), step(self, batch, part))[1])
    trainer.train()
    assert len(calls) == 2 + 12 and len(gathered) == 2
    assert "sampled" in trainer._steps


def test_windows_are_refused_before_weights(tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=r"train.window = 64 learns plain texts"):
        make_trainer(tmp_path, objective=TAID, window=64, max_steps=2)


# ----- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "message"), [
    ({"name": "ce", "on_policy": {}}, "compares sampled answers with the teacher"),
    ({"name": "taid", "on_policy": {"lmbd": 1}}, "Did you mean 'lmbda'"),
    ({"name": "taid", "on_policy": {"lmbda": 2}}, "lmbda"),
    ({"name": "taid", "on_policy": {"objective": "ce"}}, "a sampled answer is no reference"),
    ({"name": "taid", "on_policy": {"objective": {"name": "rkl", "on_policy": {}}}}, "no meaning"),
    ({"name": "taid", "on_policy": {"objective": "tiad"}}, "Did you mean 'taid'"),
])
def test_what_has_no_meaning_is_refused(objective: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_objective(objective)
