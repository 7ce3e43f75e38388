"""DistillationTrainer as a library: what it takes, what it logs, and what it survives."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from training.runs import make_trainer, rows, weights
from transformers import TrainerCallback
from zoo import Built, build, save

from taid_vlm import DistillationConfig, DistillationTrainer
from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.batch.losses import token_losses
from taid_vlm.errors import AlignmentError, TaidError
from taid_vlm.training.trainer import EMPTY_STEPS

TEXT_ROWS = rows(8, text_only=True)
LOGGED = ("loss", "loss/taid", "t", "adaptive_share", "kl", "reverse_kl", "teacher_entropy",
          "student_entropy", "agreement", "nll", "teacher_nll", "answer_tokens_per_second")
EMPTY = {"prompt": "hello", "completion": "  "}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def teacher() -> Built:
    return build("llama")


@pytest.fixture
def student() -> Built:
    return build("qwen2", seed=1)


def config(folder: Path, **arguments: Any) -> DistillationConfig:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3,
                "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
                "logging_steps": 1, "dataloader_pin_memory": False, "max_left_out": 1}
    return DistillationConfig(str(folder), **{**defaults, **arguments})


def logs(trainer: DistillationTrainer, key: str = "loss") -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if key in row]


# ----- what it takes ------------------------------------------------------------------------


def test_names_and_objects_are_the_same(teacher: Built, student: Built, tmp_path: Path) -> None:
    names = [str(save(built, tmp_path / built.family)) for built in (student, teacher)]
    by_name = DistillationTrainer(names[0], names[1], config(tmp_path), TEXT_ROWS)
    given = DistillationTrainer(student.model, teacher.model, config(tmp_path), TEXT_ROWS, None,
                                student.processor, teacher.processor)
    for trainer in (by_name, given):
        trainer.train()
    first, second = weights(by_name), weights(given)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_models_by_name_with_vision(tmp_path: Path) -> None:
    names = [str(save(built, tmp_path / built.family))
             for built in (build("llava", seed=1, tokenizer="permuted"), build("internvl"))]
    trainer = DistillationTrainer(*names, config(tmp_path), rows(8))
    trainer.train()
    assert all(math.isfinite(row["loss"]) for row in logs(trainer))


def test_init_kwargs_reach_the_loader(teacher: Built, student: Built, tmp_path: Path) -> None:
    names = [str(save(built, tmp_path / built.family)) for built in (student, teacher)]
    trainer = DistillationTrainer(
        names[0], names[1], config(tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"}),
        TEXT_ROWS)
    assert next(trainer.teacher_model.parameters()).dtype == torch.bfloat16
    assert next(trainer.model.parameters()).dtype == torch.float32


def test_the_argument_names_of_trl(teacher: Built, student: Built, tmp_path: Path) -> None:
    """As in its GKDTrainer and SFTTrainer: all by keyword."""
    trainer = DistillationTrainer(
        model=student.model, teacher_model=str(save(teacher, tmp_path / "teacher")),
        args=config(tmp_path), train_dataset=TEXT_ROWS, eval_dataset=TEXT_ROWS[:2],
        processing_class=student.processor, callbacks=[TrainerCallback()],
        optimizers=(None, None), peft_config=None,
    )
    assert math.isfinite(trainer.train().training_loss)


def test_data_sets_of_the_datasets_library(
    teacher: Built, student: Built, tmp_path: Path
) -> None:
    import datasets

    table = datasets.Dataset.from_list(TEXT_ROWS)
    losses = [DistillationTrainer(
        build("qwen2", seed=1).model, teacher.model, config(tmp_path), data, None,
        student.processor, teacher.processor).train().training_loss
        for data in (table, TEXT_ROWS)]
    assert losses[0] == losses[1]
    streamed = DistillationTrainer(
        student.model, teacher.model, config(tmp_path), table.to_iterable_dataset(), None,
        student.processor, teacher.processor)
    assert math.isfinite(streamed.train().training_loss)


def test_rows_of_a_data_frame(teacher: Built, student: Built, tmp_path: Path) -> None:
    """Also to evaluate on; the same as a list of its rows."""
    listed = [{"messages": [{"role": "user", "content": "hello"},
                            {"role": "assistant", "content": f"red {n}"}],
               "image": float("nan")} for n in range(6)]
    trained = []
    for data in (listed, pd.DataFrame(listed)):
        trainer = DistillationTrainer(
            copy.deepcopy(student.model), teacher.model, config(tmp_path, max_steps=2), data, data,
            student.processor, teacher.processor)
        trainer.train()
        trained.append((weights(trainer), trainer.evaluate(data)["eval_kl"]))
    assert trained[0][1] == trained[1][1]
    assert all(torch.equal(x, trained[1][0][name]) for name, x in trained[0][0].items())


@pytest.mark.parametrize(("ours", "theirs", "named"), [
    (False, True, "processing_class"), (True, False, "teacher_processing_class"),
])
def test_objects_need_their_processors(
    ours: bool, theirs: bool, named: str, teacher: Built, student: Built, tmp_path: Path
) -> None:
    with pytest.raises(TaidError, match=f"^{named} is missing"):
        DistillationTrainer(
            student.model, teacher.model, config(tmp_path), TEXT_ROWS,
            processing_class=student.processor if ours else None,
            teacher_processing_class=teacher.processor if theirs else None)


def test_no_teacher(student: Built, tmp_path: Path) -> None:
    with pytest.raises(TaidError, match="teacher_model"):
        DistillationTrainer(student.model, None, config(tmp_path), TEXT_ROWS, None,
                            student.processor)
    trainer = DistillationTrainer(student.model, None, config(tmp_path, objective="ce"),
                                  TEXT_ROWS, None, student.processor)
    trainer.train()
    assert logs(trainer)[0]["loss/ce"] == pytest.approx(logs(trainer)[0]["nll"], rel=1e-6)
    assert "t" not in logs(trainer)[0]


def test_different_tokenizers_are_refused_where_tokens_must_be_shared(
    teacher: Built, tmp_path: Path
) -> None:
    other = build("qwen2", tokenizer="other")
    args = config(tmp_path, objective={"name": "taid", "alignment": "shared"})
    with pytest.raises(AlignmentError, match="split text differently"):
        DistillationTrainer(other.model, teacher.model, args, TEXT_ROWS, None,
                            other.processor, teacher.processor)


def test_models_that_cannot_see_are_refused(
    teacher: Built, student: Built, tmp_path: Path
) -> None:
    with pytest.raises(TaidError, match="the teacher and the student cannot see"):
        DistillationTrainer(student.model, teacher.model, config(tmp_path), rows(4), None,
                            student.processor, teacher.processor)


@pytest.mark.parametrize(("arguments", "told"), [
    ({"supervise": "everything"}, "supervise = 'everything'"),
    ({"padding_side": "middle"}, "padding_side = 'middle'"),
    ({"max_length": 1}, "max_length = 1"),
    ({"objective": "tiad"}, "'taid'"),
])
def test_wrong_arguments(arguments: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=told):
        config(tmp_path, **arguments)


def test_a_peft_adapter_is_all_that_moves(teacher: Built, student: Built, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trainer = DistillationTrainer(
        student.model, teacher.model, config(tmp_path, learning_rate=1e-2), TEXT_ROWS, None,
        student.processor, teacher.processor, peft_config=adapter)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, after in weights(trainer).items()
             if not torch.equal(before[name], after)}
    assert moved
    assert all("lora_" in name for name in moved)
    assert len(moved) == sum("lora_" in name for name in before)


def test_teacher_and_given_mode_are_left_alone(
    teacher: Built, student: Built, tmp_path: Path
) -> None:
    before = {name: p.detach().clone() for name, p in teacher.model.named_parameters()}
    trainer = DistillationTrainer(
        student.model, teacher.model, config(tmp_path), TEXT_ROWS, None, student.processor,
        teacher.processor)
    trainer.train()
    assert not trainer.teacher_model.training
    for name, p in teacher.model.named_parameters():
        assert torch.equal(before[name], p)
        assert p.grad is None


# ----- what it logs -------------------------------------------------------------------------


def test_every_figure_is_logged(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=2)
    trainer.train()
    found = logs(trainer)
    assert len(found) == 2
    for row in found:
        assert [key for key in LOGGED if not math.isfinite(row.get(key, math.nan))] == []
        assert row["answer_tokens_per_second"] > 0
        assert 0 <= row["agreement"] <= 1


def by_hand(trainer: DistillationTrainer, data: list[dict[str, Any]]) -> float:
    """The mean TAID loss over all answer tokens, rows encoded one by one."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in data:
            batch = trainer.data_collator([row])
            s = student_forward(trainer.model, batch)
            u = teacher_forward(trainer.teacher_model, batch)
            schedule = trainer.objective.schedule(1)
            losses = token_losses(trainer.objective, batch, s, u, trainer.pairing, schedule.t)
            total += float(losses["taid"].double().sum())
            tokens += len(batch["labels"])
    return total / tokens


@pytest.mark.parametrize("split", [(8, 1), (4, 2), (1, 8)])
def test_the_logged_loss_is_the_mean_over_tokens(split: tuple[int, int], tmp_path: Path) -> None:
    data = rows(8)
    trainer = make_trainer(
        tmp_path, data=data, per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1], logging_steps=1, max_steps=1, learning_rate=0.0)
    expected = by_hand(trainer, data)
    trainer.train()
    row = logs(trainer)[0]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["loss/taid"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("alpha", "warned"), [(5e-4, True), ("auto", False)])
def test_an_adaptive_term_that_never_acts_is_told(
    alpha: Any, warned: bool, teacher: Built, student: Built, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    objective = {"name": "taid", "alpha": alpha}
    trainer = DistillationTrainer(
        student.model, teacher.model, config(tmp_path, objective=objective, max_steps=6),
        TEXT_ROWS, None, student.processor, teacher.processor)
    with caplog.at_level(logging.WARNING, "taid_vlm"):
        trainer.train()
    assert ("never acted" in caplog.text) == warned
    assert (logs(trainer)[-1]["adaptive_share"] == 0) == warned


# ----- what it survives ---------------------------------------------------------------------


def test_a_batch_without_a_usable_row_changes_nothing(tmp_path: Path) -> None:
    """Loss 0, no step of t, no step of the weights; then training goes on."""
    history: list[tuple[float, dict[str, Tensor]]] = []

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            history.append((trainer.schedule.t, weights(trainer)))

    good = rows(4, text_only=True)
    trainer = make_trainer(
        tmp_path, data=[*good, EMPTY, EMPTY, EMPTY, EMPTY], per_device_train_batch_size=1,
        max_steps=8, logging_steps=1, optim="sgd", lr_scheduler_type="constant", max_left_out=1)
    trainer.add_callback(Steps())
    trainer.train()
    losses = [row["loss"] for row in logs(trainer)]
    assert sum(loss == 0 for loss in losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    assert trainer.schedule.state.skipped == 4
    assert dict(trainer.dropped) == {"empty answer": 4}
    for index in range(1, 8):
        same = all(torch.equal(a, b) for a, b in zip(
            history[index - 1][1].values(), history[index][1].values(), strict=True))
        assert same == (losses[index] == 0)
        if losses[index] == 0:
            assert history[index][0] == history[index - 1][0]


def test_many_steps_without_a_usable_row_end_the_run(
    teacher: Built, student: Built, tmp_path: Path
) -> None:
    """One fewer in a row is survived, and the count starts again after a usable row."""
    data = [TEXT_ROWS[0], *[EMPTY] * (EMPTY_STEPS - 1), TEXT_ROWS[1], *[EMPTY] * (EMPTY_STEPS + 1)]
    trainer = DistillationTrainer(
        student.model, teacher.model,
        config(tmp_path, per_device_train_batch_size=1, max_steps=len(data), logging_steps=100,
               train_sampling_strategy="sequential"),
        data, None, student.processor, teacher.processor)
    told = f"{EMPTY_STEPS} optimizer steps in a row .* {2 * EMPTY_STEPS - 1} x empty answer"
    with pytest.raises(TaidError, match=told):
        trainer.train()
    assert trainer.state.global_step == 2 * EMPTY_STEPS + 1


def test_a_streamed_batch_without_a_usable_row(
    teacher: Built, student: Built, tmp_path: Path
) -> None:
    import datasets

    data = [TEXT_ROWS[0], EMPTY, TEXT_ROWS[1], EMPTY]
    losses = []
    for rows_of in (data, datasets.Dataset.from_list(data).to_iterable_dataset()):
        trainer = DistillationTrainer(
            build("qwen2", seed=1).model, teacher.model,
            config(tmp_path, per_device_train_batch_size=1, max_steps=4,
                   train_sampling_strategy="sequential"),
            rows_of, None, student.processor, teacher.processor)
        trainer.train()
        losses.append([row["loss"] for row in logs(trainer)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("side", ["train", "eval"])
@pytest.mark.parametrize("number", [2, 32, 40])
def test_each_side_needs_a_usable_record_among_its_first(
    side: str, number: int, teacher: Built, student: Built, tmp_path: Path
) -> None:
    sides = {"train": TEXT_ROWS, "eval": TEXT_ROWS, side: [EMPTY] * number + TEXT_ROWS[:number - 2]}
    with pytest.raises(TaidError, match=f"first {min(number, 32)} records .* x empty answer"):
        DistillationTrainer(student.model, teacher.model, config(tmp_path), sides["train"],
                            sides["eval"], student.processor, teacher.processor)


def test_the_last_of_the_first_records_may_be_the_only_usable_one(
    teacher: Built, student: Built, tmp_path: Path
) -> None:
    late = [*[EMPTY] * 31, TEXT_ROWS[0]]
    DistillationTrainer(student.model, teacher.model, config(tmp_path), late, late,
                        student.processor, teacher.processor)


def test_a_dict_of_evaluation_sets(teacher: Built, student: Built, tmp_path: Path) -> None:
    sets = {"first": TEXT_ROWS[:3], "second": TEXT_ROWS[3:]}
    trainer = DistillationTrainer(
        student.model, teacher.model, config(tmp_path, eval_strategy="steps", eval_steps=1),
        TEXT_ROWS, sets, student.processor, teacher.processor)
    trainer.train()
    found = trainer.evaluate()
    assert {"eval_first_kl", "eval_second_kl"} <= found.keys()
    assert logs(trainer, "eval_first_kl")


def test_a_dict_of_sets_given_to_evaluate(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    sets = {"first": TEXT_ROWS[:3], "second": TEXT_ROWS[3:]}
    both = trainer.evaluate(sets)
    for name, part in sets.items():
        alone = trainer.evaluate(part)
        assert both[f"eval_{name}_kl"] == alone["eval_kl"]
        assert both[f"eval_{name}_loss"] == alone["eval_kl"]


def test_evaluation_needs_data(teacher: Built, student: Built, tmp_path: Path) -> None:
    trainer = DistillationTrainer(student.model, teacher.model, config(tmp_path), TEXT_ROWS, None,
                                  student.processor, teacher.processor)
    with pytest.raises(TaidError, match="eval_dataset"):
        trainer.evaluate()


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_the_best_weights_come_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    """The KL falls, so with "greater is better" the first step's weights have to come back."""
    seen: list[dict[str, Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(trainer))

    trainer = make_trainer(
        tmp_path, student=family, tokenizer="plain", learning_rate=1e-2, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="kl", greater_is_better=True)
    trainer.add_callback(Keep())
    trainer.train()
    kl = [row["eval_kl"] for row in logs(trainer, "eval_kl")]
    best = kl.index(max(kl))
    assert best < len(kl) - 1
    after = weights(trainer)
    assert all(torch.equal(after[name], seen[best][name]) for name in after)
    assert trainer.evaluate()["eval_kl"] == kl[best]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path)
    saving = make_trainer(tmp_path, gradient_checkpointing=True,
                          gradient_checkpointing_kwargs={"use_reentrant": False})
    for trainer in (plain, saving):
        trainer.train()
    first, second = weights(plain), weights(saving)
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-5, rtol=1e-4)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=True, logging_steps=1)
    plain = make_trainer(tmp_path, logging_steps=1)
    for one in (trainer, plain):
        one.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    for rough, exact in zip(logs(trainer), logs(plain), strict=True):
        assert rough["kl"] == pytest.approx(exact["kl"], rel=0.1)


@pytest.mark.parametrize(("completion", "warned"), [("A square.", True), (" A square.", False)])
def test_a_question_and_its_answer_that_nothing_separates_are_named(
    completion: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, data = build("gpt2"), [{"prompt": "It shows:", "completion": completion}] * 4
    with caplog.at_level(logging.WARNING, "taid_vlm"):
        DistillationTrainer(base.model, None, config(tmp_path, objective="ce"), data, None,
                            base.processor)
    told = caplog.text.count("student: no chat template, so a question and its answer are joined")
    assert told == warned
