"""Several teachers: every token's loss is the sum over its own, divided as with one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.runs import make_trainer, rows, weights
from training.several import MIXTURE, several_trainer, shared_out
from training.test_fused_step import launched
from training.test_invariance import SGD, TOLERANCE, in_processes, relative
from training.vllm import NAME, standing_in, wide_llama
from zoo import build

from taid_vlm import DistillationConfig, DistillationTrainer
from taid_vlm.batch.losses import by_weight, token_losses
from taid_vlm.config.model import ServerSpec
from taid_vlm.errors import TaidError
from taid_vlm.models.forward import answer_logits
from taid_vlm.objectives import Objective, parse_objective
from taid_vlm.teachers import ServedTeacher

OBJECTIVE: dict[str, Any] = {"terms": ["taid", {"name": "ce", "weight": 0.3}]}
SPLITS = {
    "4 x 2 accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "1 x 8 accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "left padding": {"padding_side": "left"},
    "from logits": {"loss_implementation": "reference"},
    "workers": {"dataloader_num_workers": 2},
}


def gradient(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Of one optimizer step over the first eight rows, in order."""
    trainer = several_trainer(folder, **{**SGD, "objective": OBJECTIVE, **options})
    trainer._get_train_sampler = lambda *_: None
    before = weights(trainer)
    trainer.train()
    return {name: before[name] - after for name, after in weights(trainer).items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return gradient(tmp_path_factory.mktemp("reference"))


def naive(trainer: DistillationTrainer, data: list[dict[str, Any]], objective: Objective,
          t: float) -> dict[str, Tensor]:
    """Record by record and teacher by teacher in float64, each pair collated for itself."""
    student = trainer.model.double()
    total, tokens = torch.zeros((), dtype=torch.float64), 0.0
    for row in data:
        shares = {row["teacher"]: 1.0} if "teacher" in row else MIXTURE
        for index, (name, share) in enumerate(shares.items()):
            batch = trainer.collator.parts[name]([row])
            for key, side in batch.items():
                if key.endswith("_inputs"):
                    batch[key] = {k: v.double() if v.is_floating_point() else v
                                  for k, v in side.items()}
            model = trainer.teacher.by_name[name].model.double()
            with torch.no_grad():
                u = answer_logits(model, batch["teacher_inputs"], batch["teacher_mask"])
            s = answer_logits(student, batch["student_inputs"], batch["student_mask"])
            losses = token_losses(objective, batch, s, u, trainer.teacher.pairings[name], t)
            total = total + share * by_weight(batch, losses["taid"]).sum()
            if not index:  # of the data once
                total = total + 0.3 * by_weight(batch, losses["ce"]).sum()
                tokens += float(by_weight(batch, torch.ones_like(losses["ce"])).sum())
    total = total / tokens
    total.backward()
    return {name: p.grad.float() for name, p in student.named_parameters() if p.grad is not None}


def test_gradient_is_the_naive_sum_in_float64(
    reference: dict[str, Tensor], tmp_path: Path
) -> None:
    """Two tokenizers, images and texts, weights of answers, mixtures and single teachers in one
    batch."""
    trainer = several_trainer(tmp_path, objective=OBJECTIVE)
    expected = naive(trainer, shared_out()[:8], parse_objective(OBJECTIVE), 0.4)
    assert relative({name: reference[name] for name in expected}, expected) < TOLERANCE


@pytest.mark.parametrize("name", SPLITS)
def test_gradient_does_not_depend_on_batches(
    name: str, reference: dict[str, Tensor], tmp_path: Path
) -> None:
    assert relative(reference, gradient(tmp_path, **SPLITS[name])) < TOLERANCE


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two; in the first batch one of them has no row of the teacher b."""
    folder = tmp_path_factory.mktemp("two")
    options = {"several": True, "objective": OBJECTIVE, "per_device_train_batch_size": 1,
               "max_steps": 6, "logging_steps": 1}
    in_processes(2, folder, trajectory=options)
    return folder


def test_two_processes_go_the_way_of_one(processes: Path, tmp_path: Path) -> None:
    trainer = several_trainer(tmp_path, objective=OBJECTIVE, per_device_train_batch_size=2,
                              max_steps=6, logging_steps=1)
    trainer.train()
    two = json.loads((processes / "trajectory" / "trajectory.json").read_text())
    assert two == pytest.approx(trainer.recorder.t, abs=1e-6)
    after = load_file(processes / "trajectory" / "final.safetensors")
    assert relative(weights(trainer), after) < TOLERANCE


@pytest.mark.parametrize("kind", ["ddp-several", "fsdp-several"])
def test_wrapped_students_have_the_gradient_of_one_process(kind: str, tmp_path: Path) -> None:
    one, two = launched(tmp_path, kind, 1), launched(tmp_path, kind, 2)
    assert relative(two, one) < TOLERANCE


def test_a_mixture_is_learned_as_the_mixed_law(tmp_path: Path) -> None:
    """Where vocabularies agree, sum w KL(p_i || q) has the gradient of KL(sum w p_i || q)."""
    data = rows(4)
    options = {"data": data, "objective": "forward_kl", "per_device_train_batch_size": 4,
               "tokenizers": ("permuted", "permuted"), "families": ("llava", "llava"), **SGD}
    trainer = several_trainer(tmp_path, **options)
    assert {pairing.case for pairing in trainer.teacher.pairings.values()} == {"a"}
    batch = trainer.collator(data)
    laws = {name: trainer.teacher.by_name[name].logits(part).double().softmax(-1)
            for name, part in batch["parts"].items()}
    mixed = sum(MIXTURE[name] * law for name, law in laws.items())
    s = answer_logits(trainer.model, batch["student_inputs"], batch["student_mask"]).double()
    loss = (mixed * (mixed.log() - s.log_softmax(-1))).sum(-1).mean()
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = {name: g for name, g in zip(names, found, strict=True) if g is not None}
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert relative({name: before[name] - after[name] for name in expected}, expected) < TOLERANCE
    assert trainer.answer_tokens == len(batch["labels"])  # of the student, whoever teaches it


def test_the_only_one_is_a_single_teacher_bit_for_bit(tmp_path: Path) -> None:
    data = [{key: value for key, value in row.items() if key != "teacher"} for row in shared_out()]
    single = make_trainer(tmp_path / "single", data=data, objective=OBJECTIVE, seed=7)
    named = several_trainer(tmp_path / "named", data=[{**row, "teacher": "a"} for row in data],
                            only="a", objective=OBJECTIVE)
    for trainer in (single, named):
        trainer.train()
    one, other = weights(single), weights(named)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert single.recorder.t == named.recorder.t


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "dropout": 0.1,
               "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
               "objective": OBJECTIVE}
    in_processes(1, tmp_path, killed={**options, "several": True, "kill_at": 5})
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    whole, resumed = (several_trainer(tmp_path / name, **options) for name in ("whole", "killed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-3"))
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.schedule.state_dict() == resumed.schedule.state_dict()


def test_held_out_figures_are_each_teachers_own(tmp_path: Path) -> None:
    """Of its rows what an evaluation against it alone says; the student's own are as ever."""
    trainer = several_trainer(tmp_path, per_device_eval_batch_size=3)
    data = shared_out()[:12]
    figures = trainer.held_out(data)
    for name in ("a", "b"):
        own = [{**row, "teacher": name} for row in data if row.get("teacher", name) == name]
        alone = several_trainer(tmp_path / name, only=name, data=own).held_out(own)
        for figure in ("kl", "reverse_kl", "teacher_nll"):
            assert figures[f"{figure}/{name}"] == pytest.approx(alone[figure], rel=1e-5)
    plain = make_trainer(tmp_path / "plain").held_out(
        [{key: value for key, value in row.items() if key != "teacher"} for row in data])
    assert figures["nll"] == pytest.approx(plain["nll"], rel=1e-5)
    assert figures["n_tokens"] == plain["n_tokens"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_served_teacher_is_one_of_them(workers: int, tmp_path: Path) -> None:
    """Asked ahead for its own rows; trained as with the same teacher here that says its top k."""
    data = [{key: value for key, value in row.items() if key != "messages"}
            for row in shared_out(24, text_only=True)]
    theirs, runs = wide_llama(), {}
    with standing_in(theirs) as server:
        spec = ServerSpec(url=server.url, model=NAME, top_logprobs=24, timeout=20.0, retries=1)
        for kind, b in (("served", ServedTeacher(spec, theirs.model)), ("local", theirs.model)):
            ours, a = build("llama", seed=5), build("llama", seed=2, tokenizer="permuted")
            trainer = _trainer(
                tmp_path / kind, ours, {"a": a, "b": replace(theirs, model=b)}, data, max_steps=3,
                per_device_train_batch_size=4, logging_steps=1, save_strategy="no", seed=7,
                disable_tqdm=True, dataloader_num_workers=workers, teacher_weights=MIXTURE)
            if kind == "local":
                trainer.teacher.by_name["b"].top = 24
            trainer.train()
            runs[kind] = trainer
    assert runs["served"].loss_report["name"] == "several"
    assert "b: sparse" in runs["served"].loss_report["reason"]
    one, other = weights(runs["served"]), weights(runs["local"])
    assert relative(one, other) < TOLERANCE
    assert [*runs["served"].state.log_history[0]] == [*runs["local"].state.log_history[0]]


def test_a_record_that_one_of_its_teachers_cannot_use_is_left_out_once(tmp_path: Path) -> None:
    trainer = several_trainer(tmp_path)
    data = [{"prompt": "hello", "completion": "red " * 40}, *rows(1, kinds=("text",))]
    trainer.collator.teacher_of("a").max_length = 32
    batch = trainer.collator(data)
    assert batch["counts"]["dropped"] == {"longer than max_length": 1}
    assert {name: len(part["sources"]) for name, part in batch["parts"].items()} == {"a": 1, "b": 1}
    own = trainer.collator([{**data[0], "teacher": "b"}])
    assert {name: len(part["sources"]) for name, part in own["parts"].items()} == {"b": 1}


def test_a_text_model_is_not_shown_images(tmp_path: Path) -> None:
    """Of its own it has texts; a mixture with pictures is refused by its name."""
    texts, pictures = rows(2, kinds=("text",)), rows(2, kinds=("one",))
    ours, teachers = build("llava", seed=1), {"sees": build("internvl"), "text": build("llama")}
    data = [*({**row, "teacher": "text"} for row in texts),
            *({**row, "teacher": "sees"} for row in pictures)]
    batch = _trainer(tmp_path, ours, teachers, data).collator(data)
    assert batch["counts"]["rows"] == 4
    with pytest.raises(TaidError, match=r"teachers\.text: the records hold images"):
        _trainer(tmp_path, ours, teachers, texts + pictures)


def test_without_a_term_against_them_teachers_are_not_asked(tmp_path: Path) -> None:
    """ce alone trains as without any; an evaluation has the figures against them all the same."""
    data = rows(8, text_only=True)
    ours, teachers = build("llama", seed=1), {"a": build("llama"), "b": build("llama", seed=2)}
    options = {"objective": "ce", "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    trainer = _trainer(tmp_path, ours, teachers, data, **options)
    trainer.train()
    assert {"kl/a", "kl/b"} <= trainer.held_out(data).keys()
    again = build("llama", seed=1)
    alone = DistillationTrainer(
        again.model, None, DistillationConfig(str(tmp_path), report_to="none", use_cpu=True,
                                              **options), data, None, again.processor)
    alone.train()
    one, other = weights(trainer), weights(alone)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_names_are_checked(tmp_path: Path) -> None:
    data = rows(6, text_only=True)
    ours, teachers = build("llama", seed=1), {"math": build("llama"), "code": build("llama")}
    wrong = [{**row, "teacher": "maths" if index < 2 else "code"} for index, row in enumerate(data)]
    with pytest.raises(TaidError, match=r"2 of the first 6 rows name the teacher 'maths'.*'math'"):
        _trainer(tmp_path, ours, teachers, wrong)
    some = [{**row, "teacher": "code"} if index < 5 else row for index, row in enumerate(data)]
    trainer = _trainer(tmp_path, ours, teachers, some, max_left_out=1.0)
    counts = trainer.collator(some)["counts"]
    assert counts["dropped"] == {"names no teacher": 1}
    assert counts["rows"] == 5
    empty = trainer.collator([{**data[0], "teacher": ""}])
    assert empty["counts"]["dropped"] == {"names no teacher": 1}
    assert empty["parts"] == {}
    assert empty["student_mask"].sum() == 0
    later = trainer.collator([{**data[0], "teacher": "coda"}])
    assert later["counts"]["dropped"] == {"names an unknown teacher": 1}
    alike = _trainer(tmp_path, ours, teachers, data)
    assert alike.collator.shares.usual == {"math": 1.0, "code": 1.0}


def _trainer(output: Path, ours: Any, teachers: dict[str, Any], data: Any, **arguments: Any
             ) -> DistillationTrainer:
    return DistillationTrainer(
        ours.model, {name: one.model for name, one in teachers.items()},
        DistillationConfig(str(output), report_to="none", use_cpu=True, **arguments), data, None,
        ours.processor, {name: one.processor for name, one in teachers.items()})
